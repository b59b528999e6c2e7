"""The reader: which map a layer is."""

from structrep import ConvMap, reader
from structrep_twins import Gained


@reader(Gained)
def gained(layer: Gained) -> ConvMap:
    return ConvMap(layer.weight * layer.gain.reshape(-1, 1, 1, 1), pad=1)
