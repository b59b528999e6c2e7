"""DyRep: Bootstrapping Training with Dynamic Re-parameterization. Huang et al., CVPR 2022, arXiv:2204.00868.

Training time: a k×k and what grew beside it: the branches of DBB and ACNet, perhaps a whole block in the place of a
convolution, and the identity, each with a norm (section 3.2).
"""

from torch import nn

from structrep.algebra import ConvMap
from structrep.blocks import Branches, EdgeBlock2d
from structrep.pattern import Affine, Conv, Many, Optional, Pad, Seq, Sum, pointwise, spatial
from structrep.registry import rule
from structrep.rules.branches import AVERAGE, BORDER


def _example() -> nn.Module:
    sizes = (((3, 3), (1, 1)), ((1, 3), (0, 1)), ((3, 1), (1, 0)), ((1, 1), (0, 0)))
    convs = (nn.Sequential(nn.Conv2d(8, 8, k, padding=p, bias=False), nn.BatchNorm2d(8)) for k, p in sizes)
    return Branches(*convs, nn.BatchNorm2d(8))


NORMED = Seq(Optional(Pad()), Conv(), Affine())
BRANCH = AVERAGE | Seq(Conv(pointwise), BORDER, Conv(spatial), Affine()) | NORMED | Affine()
NESTED = Seq(Optional(Seq(Conv(pointwise), BORDER)), Sum(Many(BRANCH)), Affine())  # a block in the place of a conv


@rule(
    Sum(
        (Seq(Optional(Pad()), Conv(spatial), Affine()) | NESTED).named("dense"),
        Many(BRANCH | NESTED, least=3).named("branches"),
    ),
    source="DyRep, arXiv:2204.00868, section 3.2",
    example=_example,
    counter_examples=[
        (
            "",
            lambda: Branches(
                nn.Conv2d(8, 8, 3, padding=1), *(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()) for _ in "abc")
            ),
        ),
        ("", lambda: EdgeBlock2d(8, 8, 3, padding=1)),  # whose branches have no norms
    ],
    published="The authors' (hunto/image_classification_sota at 6f7a70a) computes 1/9 in float32: off by 2e-9 to "
    "8e-9 in a float64 model.",
)
def dyrep(dense: ConvMap, branches: list[ConvMap]) -> ConvMap:
    return dense + sum(branches)
