"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., ICLR 2022, arXiv:2106.09685.

Training time: a Linear, and a product of two thin ones, scaled, added (section 4.1): W + s B A. Of a convolution the
product is computed and added to the kernel (ConvLoRA, as in Chai et al., arXiv:2504.11271).
"""

from torch import nn

from structrep.algebra import ConvMap
from structrep.blocks import Branches, DOConv2d, LoRAConv2d, LoRALinear
from structrep.pattern import Affine, Conv, Many, Optional, Seq, Sum, pointwise
from structrep.registry import rule
from structrep.rules.formulas import CONTRACTIONS, NORMS, SUMS
from structrep.terms.layer import Formula


@rule(
    Sum(
        Conv(pointwise).named("base"),
        Many(Seq(Conv(pointwise), Conv(pointwise), Optional(Affine()))).named("deltas"),
    ),
    source="LoRA, arXiv:2106.09685, section 4.1",
    example=lambda: LoRALinear(8, 6, rank=2),
    counter_examples=[
        ("", lambda: Branches(nn.Linear(8, 6), nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 6)))),
    ],
)
def lora(base: ConvMap, deltas: list[ConvMap]) -> ConvMap:
    return base + sum(deltas)


def kernel_plus_product(formula: Formula) -> bool:
    """A kernel, and the product of two matrices that has as many numbers, added."""
    matrices = [parameter for parameter in formula.parameters if parameter.ndim == 2]
    kernels = [parameter for parameter in formula.parameters if parameter.ndim > 2]
    if len(matrices) != 2 or len(kernels) != 1 or formula.calls & NORMS:
        return False
    (a, b), (kernel,) = matrices, kernels
    products = {len(one) * other.shape[1] for one, other in ((a, b), (b, a)) if one.shape[1] == len(other)}
    return bool(formula.calls & CONTRACTIONS and formula.calls & SUMS and kernel.numel() in products)


@rule(
    Conv(formula=kernel_plus_product).named("conv"),
    source="ConvLoRA, arXiv:2504.11271",
    example=lambda: LoRAConv2d(8, 8, 3, padding=1, rank=2),
    counter_examples=[("", lambda: DOConv2d(8, 8, 3, padding=1))],
    narrower_than=["doconv"],
)
def conv_lora(conv: ConvMap) -> ConvMap:
    return conv
