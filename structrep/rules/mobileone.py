"""MobileOne: An Improved One millisecond Mobile Backbone. Vasu et al., CVPR 2023, arXiv:2206.04040.

Training time: several k×k convolutions alike, a 1x1, a skip, each with a norm, added (section 3.2, figure 3). Kernels
of one size of which some are dilated are another block (RSBB, arXiv:2110.09720), which takes more as one layer.
PP-LCNetV3, the backbone of PP-OCRv4, scales and shifts the sum by one number each.
"""

from torch import nn

from structrep.algebra import ConvMap
from structrep.blocks import Branches, LearnableAffine, MobileOneBlock2d
from structrep.pattern import Affine, Conv, Many, Optional, Pad, Scalar, Seq, Sum, pointwise, spatial
from structrep.registry import rule

NORMED = Seq(Optional(Pad()), Conv(), Affine())


@rule(
    Seq(
        Sum(Optional(Affine().named("skip")), Many(NORMED).named("branches")),
        Many(Scalar(learned=True)).named("affine"),
    ),
    source="PP-LCNetV3, PaddleOCR, learnable affine block",
    example=lambda: nn.Sequential(MobileOneBlock2d(8, 8, 3, padding=1), LearnableAffine(0.5, 0.25)),
    counter_examples=[
        ("", lambda: nn.Sequential(MobileOneBlock2d(8, 8, 3, padding=1), nn.ReLU(), LearnableAffine(0.5, 0.25))),
    ],
    published="That of Topdu/OpenOCR at ae934e5 leaves the affine, and keeps the branches beside the merged layer: "
    "35 convolutions where the training-time model has 29.",
)
def pplcnetv3(branches: list[ConvMap], skip: ConvMap, affine: list[ConvMap]) -> ConvMap:
    whole = sum(branches) + skip
    for step in affine:
        whole = whole >> step
    return whole


@rule(
    Sum(
        Optional(Seq(Optional(Pad()), Conv(pointwise), Affine()).named("point")),
        Optional(Affine().named("skip")),
        Many(Seq(Optional(Pad()), Conv(spatial), Affine()), least=2, alike=True).named("dense"),
    ),
    source="MobileOne, arXiv:2206.04040, section 3.2",
    example=lambda: MobileOneBlock2d(8, 8, 3, padding=1),
    counter_examples=[
        ("", lambda: Branches(*(nn.Sequential(nn.Conv2d(8, 8, k, padding=k // 2), nn.BatchNorm2d(8)) for k in (3, 5)))),
        ("", lambda: Branches(*(nn.Sequential(nn.Conv2d(8, 8, 3, 1, d, d), nn.BatchNorm2d(8)) for d in (1, 2)))),
    ],
    narrower_than=["dyrep"],
)
def mobileone(dense: list[ConvMap], point: ConvMap, skip: ConvMap) -> ConvMap:
    return sum(dense) + point + skip


@rule(
    Sum(Affine().named("skip"), Many(Seq(Conv(pointwise), Affine()), alike=True).named("dense")),
    source="MobileOne, arXiv:2206.04040, section 3.2",
    example=lambda: MobileOneBlock2d(8, 8, 1),
    counter_examples=[("", lambda: MobileOneBlock2d(8, 8, 3, padding=1))],
)
def mobileone_pointwise(dense: list[ConvMap], skip: ConvMap) -> ConvMap:
    return sum(dense) + skip
