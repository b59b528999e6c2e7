"""DiracNets: Training Very Deep Neural Networks Without Skip-Connections. Zagoruyko and Komodakis, arXiv:1706.00388.

Training time: one convolution whose kernel is computed, diag(a) I + diag(b) W / ||W||, the norm over each output filter
(section 3.2). It depends on parameters alone, so it is evaluated once and what is left is a convolution.
"""

from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from structrep.algebra import ConvMap
from structrep.blocks import DiracConv2d
from structrep.pattern import Conv
from structrep.registry import rule
from structrep.rules.formulas import NORMS, SUMS
from structrep.terms.layer import Formula


def normalized_plus_identity(formula: Formula) -> bool:
    """A normalised kernel to which something is added, each of them scaled."""
    return bool(formula.calls & NORMS and formula.calls & SUMS and len(formula.parameters) > 1)


@rule(
    Conv(formula=normalized_plus_identity).named("conv"),
    source="DiracNets, arXiv:1706.00388, section 3.2",
    example=lambda: DiracConv2d(8, 8, 3, padding=1),
    counter_examples=[("", lambda: weight_norm(nn.Conv2d(8, 8, 3)))],
    published="The authors publish none for models of one's own.",
)
def diracnet(conv: ConvMap) -> ConvMap:
    return conv
