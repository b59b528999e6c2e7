"""OREPA: Online Convolutional Re-parameterization. Hu et al., CVPR 2022, arXiv:2204.00826.

Training time: one convolution whose kernel is a sum of branches, each contracted from parameters and scaled per filter
(section 3.2). It depends on parameters alone, so it is evaluated once, by the block's own code.
"""

from structrep.algebra import ConvMap
from structrep.blocks import DOConv2d, OREPA2d
from structrep.pattern import Conv
from structrep.registry import rule
from structrep.rules.formulas import CONTRACTIONS, NORMS, SUMS
from structrep.terms.layer import Formula


def summed_contractions(formula: Formula) -> bool:
    """Contractions of at least four parameters, added."""
    return bool(
        formula.calls & CONTRACTIONS
        and formula.calls & SUMS
        and not formula.calls & NORMS
        and len(formula.parameters) > 3
    )


@rule(
    Conv(formula=summed_contractions).named("conv"),
    source="OREPA, arXiv:2204.00826, section 3.2",
    example=lambda: OREPA2d(8, 8, 3, padding=1),
    counter_examples=[("", lambda: DOConv2d(8, 8, 3, padding=1))],
)
def orepa(conv: ConvMap) -> ConvMap:
    return conv
