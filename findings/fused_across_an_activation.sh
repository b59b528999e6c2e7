#!/usr/bin/env bash
# mmcv-lite 2.2.0, mmcv/cnn/utils/fuse_conv_bn.py (`fuse_conv_bn`), with mmengine 0.10.7, torch 2.13.0
#
# Guess: a batch norm is fused into the convolution whose output it normalizes, or left alone.
# Behaviour: it goes by the order in which children were registered, and does not forget a convolution when another child
# comes between. So the norm of Conv - GELU - BatchNorm, the order of ConvMixer's blocks, is multiplied into the convolution
# before the activation, and one convolution that two norms take turns with, RTMDet's shared heads, is multiplied twice.
# Nothing is said; the outputs are others.
#
# Output seen:
#   conv - gelu - norm: off by 0.68 of the largest output
#   one conv, two norms: off by 0.78 of the largest output
#   conv - norm: off by 3e-16
# Exits with 0 while it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 mmcv-lite==2.2.0 mmengine==0.10.7
"$folder/venv/bin/python" -W ignore - <<'PROGRAM'
import copy

import torch
from mmcv.cnn.utils.fuse_conv_bn import fuse_conv_bn
from torch import nn

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)


class Level(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv, self.norm = conv, nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


class Shared(nn.Module):
    """One convolution for two levels of a pyramid, each with a norm of its own."""

    def __init__(self):
        super().__init__()
        conv = nn.Conv2d(4, 4, 1)
        self.levels = nn.ModuleList([Level(conv), Level(conv)])

    def forward(self, x):
        return torch.cat([level(x) for level in self.levels], 1)


def off(model):
    for one in model.modules():
        if isinstance(one, nn.BatchNorm2d):
            one.running_mean.normal_(), one.running_var.uniform_(0.5, 1.5)
            one.weight.data.uniform_(0.5, 1.5), one.bias.data.normal_()
    model, x = model.eval(), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        y = model(x)
        return float((fuse_conv_bn(copy.deepcopy(model))(x) - y).abs().max() / y.abs().max())


between = off(nn.Sequential(nn.Conv2d(4, 4, 3), nn.GELU(), nn.BatchNorm2d(4)))
shared, plain = off(Shared()), off(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
print(f"conv - gelu - norm: off by {between:.2f} of the largest output")
print(f"one conv, two norms: off by {shared:.2f} of the largest output")
print(f"conv - norm: off by {plain:.0e}")
assert between > 0.1 and shared > 0.1, "changed: what is fused is what the forward does"
assert plain < 1e-12
PROGRAM
