"""FastViT: A Fast Hybrid Vision Transformer using Structural Reparameterization. Vasu et al., ICCV 2023,
arXiv:2303.14189.

Training time: x + scale * (mixer(x) - norm(x)), the mixer a MobileOne block (section 3.2.1, RepMixer). A minus is a
scale of -1, a skip a Dirac kernel.
"""

from torch import nn

from structrep.algebra import ConvMap
from structrep.blocks import Branches, LearnableAffine, MobileOneBlock2d, RepMixer2d
from structrep.pattern import Affine, Identity, Many, Seq, Sum, conv_norm
from structrep.registry import rule

BRANCH = conv_norm() | Affine()


@rule(
    Sum(Identity().named("skip"), Seq(Sum(Many(BRANCH, least=2).named("mixer")), Affine().named("scale"))),
    source="FastViT, arXiv:2303.14189, section 3.2.1",
    example=lambda: RepMixer2d(8, 8, 3, padding=1, groups=8),
    counter_examples=[
        (
            "",
            lambda: Branches(
                nn.Identity(), nn.Sequential(MobileOneBlock2d(8, 8, 3, padding=1), nn.ReLU(), LearnableAffine(0.5))
            ),
        ),
    ],
    published="The authors' (apple/ml-fastvit at 8af5928) leaves 10 of the 70 norms of FastViT-T8, those behind the "
    "7x7 of its feed-forward blocks.",
)
def repmixer(skip: ConvMap, mixer: list[ConvMap], scale: ConvMap) -> ConvMap:
    return skip + (sum(mixer) >> scale)


@rule(
    Sum(Identity().named("skip"), Affine().named("minus"), Affine().named("plus"), Many(conv_norm()).named("mixer")),
    source="FastViT, arXiv:2303.14189, section 3.2.1",
    example=lambda: RepMixer2d(8, 8, 3, padding=1, groups=8, layer_scale=None),
    counter_examples=[("", lambda: RepMixer2d(8, 8, 3, padding=1, groups=8))],
)
def repmixer_unscaled(skip: ConvMap, minus: ConvMap, plus: ConvMap, mixer: list[ConvMap]) -> ConvMap:
    return skip + minus + plus + sum(mixer)
