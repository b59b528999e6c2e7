"""Layers on the last dim of values whose other dims are one for as long as that."""

import pytest
import torch
from torch import nn

from tests.support.models import noise
from tests.support.truth import check

X = noise(2, 5, 6)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.k, self.n = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.w, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))


def conv1d(self, x):
    """As transformers' `Conv1D`."""
    y = torch.addmm(self.b, x.view(-1, x.size(-1)), self.w).view(x.size()[:-1] + (6,))  # noqa: RUF005 as it is written there
    return y + self.l(x)


def normed(self, x):
    b, t, c = x.shape
    return self.n(self.l(x).view(b * t, c)).view(b, t, c)


def reshaped(self, x):
    return self.n(self.l(x).reshape(-1, 6)).reshape(x.shape)


def flattened(self, x):
    return self.n(torch.flatten(self.l(x), 0, 1)).unflatten(0, x.shape[:2])


def both(self, x):
    y = self.l(x)
    b, t, _ = y.shape
    return self.n(self.k(y.reshape(b * t, -1))).view(b, t, -1) + x


def one_pixel(self, x):
    """Where the sizes are told, they are the example's."""
    return self.k(self.l(x).view(-1, 6)).view(x.shape[0], x.shape[1], 6)


def turned(self, x):
    b, t, c = x.shape
    return self.n(self.l(x).view(b * t, c)).view(t, b, c)


def split(self, x):
    b, t, c = x.shape
    return self.n(self.l(x).view(t, b * c // 6, 6)[:, 0]).view(t, c) + x[0]


def halved(self, x):
    """Right for an even number of tokens alone."""
    b, t, c = x.shape
    return self.k(self.l(x).view(b * t, c)).view(t // 5 * 2, -1, c)


def moved(self, x):
    b, t, c = x.shape
    return self.n(self.l(x).transpose(0, 1).reshape(b * t, c)).view(b, t, c)


def looked_at(self, x):
    b, t, c = x.shape
    y = self.l(x).view(b * t, c)
    return self.n(y).view(b, t, c), y


def of_each_row(self, x):
    """A constant for each token of ten, of both batches."""
    b, t, c = x.shape
    return self.k((self.l(x).reshape(b * t, c) * torch.arange(1.0, 11.0)[:, None]).view(b, t, c))


def of_each_channel(self, x):
    b, t, c = x.shape
    return self.k((self.l(x).reshape(b * t, c) * self.b).view(b, t, c))


def of_another(self, x):
    b, t, c = x.shape
    return self.k(self.l(x).view(b * t, c)).view(x.mT.size(0), x.mT.size(2), c)


# With how many merges, and for what others are refused.
FORWARDS = {
    conv1d: (1, ""), normed: (1, ""), reshaped: (1, ""), flattened: (1, ""), both: (1, ""), one_pixel: (1, ""),
    turned: (0, "Isolated"), split: (0, "Isolated"), halved: (0, ""), moved: (0, "Isolated"),
    looked_at: (0, "Isolated"), of_another: (0, ""), of_each_row: (0, ""), of_each_channel: (1, ""),
}  # fmt: skip


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda one: one.__name__)
def test_layers_between_a_flattening_and_its_inverse(forward):
    merges, refused = FORWARDS[forward]
    cls = type("Flattens", (Tokens,), {"forward": forward})
    others = [noise(3, 5, 6)] if forward not in (halved, of_each_row) else []
    # of what `flatten(0, 1)` gives only the example tells how many dims it has
    ways = ("with an example",) if forward is flattened else ("with an example", "in place")
    check(cls(), X, *others, merges=merges, refused=refused, ways=ways)


class OfWidth(nn.Module):
    """A Linear of the width of an image, not of its channels."""

    def __init__(self):
        super().__init__()
        self.c, self.l = nn.Conv2d(5, 5, 1), nn.Linear(6, 6)

    def forward(self, x):
        y = self.c(x)
        return self.l(y.view(-1, y.shape[-1])).view(y.shape)


def test_another_dim_is_no_channel():
    check(OfWidth(), noise(2, 5, 4, 6), merges=0, refused="Incompatible")
