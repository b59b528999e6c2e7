"""Diverse Branch Block: Building a Convolution as an Inception-like Unit. Ding et al., CVPR 2021, arXiv:2103.13425.

Training time: four branches, each with a norm: k×k; 1x1; 1x1, norm, average; 1x1, norm, k×k. The norm between two steps
is padded with what it makes of 0, so that each chain is one convolution (transforms I to VI, section 3.2).
"""

from torch import nn

from structrep.algebra import ConvMap
from structrep.blocks import Branches, DiverseBranchBlock2d
from structrep.pattern import Affine, Identity, Optional, Pad, Seq, Sum, conv_norm, pointwise, spatial
from structrep.registry import rule
from structrep.rules.branches import AVERAGE, CHAIN


@rule(
    Sum(
        conv_norm(spatial).named("dense"),
        AVERAGE.named("average"),
        Optional(CHAIN.named("chain")),
        Optional(conv_norm(pointwise).named("point")),
        Optional(Seq(Optional(Pad()), Affine() | Identity()).named("identity")),
    ),
    source="DBB, arXiv:2103.13425, section 3.3",
    example=lambda: DiverseBranchBlock2d(8, 8, 3, padding=1),
    counter_examples=[
        (
            "Inexact",  # the average reads zeros outside, where a norm before it gives something else
            lambda: Branches(
                nn.Conv2d(8, 8, 3, padding=1),
                nn.Sequential(nn.Conv2d(8, 8, 1), nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(8)),
            ),
        ),
    ],
    narrower_than=["dyrep"],
    published="The authors' (DingXiaoH/DiverseBranchBlock at 8d2b16b) computes 1/9 in float32: off by 1.1e-8 in a "
    "float64 model. It stops with an error on models in half precision.",
)
def dbb(dense: ConvMap, average: ConvMap, chain: ConvMap, point: ConvMap, identity: ConvMap) -> ConvMap:
    return dense + average + chain + point + identity
