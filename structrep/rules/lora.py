"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., ICLR 2022, arXiv:2106.09685.

Training time: a Linear, and a product of two thin ones, scaled, added (section 4.1): W + s B A. RepAdapter
(arXiv:2302.08106) and other adapters in a row with a Linear are chains, which the law of that name merges.
"""

from torch import nn

from structrep.algebra import ConvMap
from structrep.blocks import Branches, LoRALinear
from structrep.pattern import Affine, Conv, Many, Optional, Seq, Sum, pointwise
from structrep.registry import rule


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
