"""Pads: of a layer of their own, of copies of pixels, with a crop, with another fill for each channel."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.models import bn, made, noise
from tests.support.truth import check

X = noise(2, 4, 6, 7)


def per_channel_fill(self, x):
    y = F.pad(self.p(x) * self.g, (1, 2, 2, 1), value=0.5)
    return self.n(self.a(y) - self.b(y)).relu()


class PerChannel(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.g = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.a, self.b = (nn.Conv2d(4, 4, 2, groups=4, bias=False) for _ in range(2))
        self.n = nn.BatchNorm2d(4)


def test_a_merge_that_no_layer_can_do_is_refused_before_anything_changes():
    check(made(per_channel_fill, PerChannel), X, merges=2)


class Reflected(nn.Module):
    def __init__(self):
        super().__init__()
        self.r = nn.Conv2d(4, 4, 1, padding=2, padding_mode="reflect")

    def forward(self, x):
        return self.r(x)[:, :, 1:-1, 1:-1].relu()


def test_a_pad_wider_than_the_smallest_input_of_the_merged_layer():
    check(nn.Sequential(bn(4), Reflected()), X, merges=1)


@pytest.mark.parametrize("pad", [nn.CircularPad1d, nn.ReflectionPad1d, nn.ReplicationPad1d])
def test_a_pad_that_copies_pixels_and_then_a_crop(pad):
    """torch's pad layers crop first and copy then; the formula copies first."""
    model = nn.Sequential(pad((3, 0)), nn.ConstantPad1d((0, -1), 0.0), nn.Conv1d(1, 1, 2))
    check(model, *(noise(2, 1, size) for size in (4, 5, 9)), merges=0, refused="Unreadable")


def test_a_pad_layer_that_copies_and_crops_at_once():
    model = nn.Sequential(nn.CircularPad1d((3, -1)), nn.Conv1d(1, 1, 2))
    check(model, noise(2, 1, 6), merges=0, refused="Unreadable")
