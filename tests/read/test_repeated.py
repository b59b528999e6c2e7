"""Constants that are repeated to the shape of a value, weighed stacks, and constants that are taken apart."""

import pytest
import torch
from torch import nn

from tests.support.models import Written, settled
from tests.support.truth import check

X = torch.randn(2, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(1, 3, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Shift(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.p, self.run, self.conv = nn.Parameter(torch.randn(1, 3, 1, 1)), run, nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(self.run(self.p, x)).relu()


REPEATED = {
    "expand to a size": lambda p, x: p.expand(x.size(0), -1, -1, -1) + x,
    "expand to sizes": lambda p, x: x - p.expand(x.shape[0], 3, x.shape[2], x.shape[-1]),
    "repeat": lambda p, x: x * p.repeat(1, 1, x.shape[2], x.shape[3]),
    "ones": lambda p, x: x + torch.ones_like(x) * p,
    "full": lambda p, x: x - torch.full_like(x, 2.0),
    "zeros": lambda p, x: torch.zeros_like(x) + x * p,
    "rsub": lambda p, x: torch.rsub(x, p.expand_as(x)),
    "addcmul": lambda p, x: torch.addcmul(p, x, p),
    "addcmul the other way": lambda p, x: torch.addcmul(p, p, x),
}


@pytest.mark.parametrize("run", REPEATED.values(), ids=REPEATED)
def test_it_is_a_scale_or_a_shift(run):
    deploy = check(settled(Shift(run)), X, OTHER, merges=1)
    assert sum(one.numel() for one in deploy.parameters()) == 16 + 3 * (run is REPEATED["full"])


ELSE = {
    "twice": lambda p, x: torch.cat([x, x], 2) + p.repeat(1, 1, 2 * x.shape[2], x.shape[3]),
    "channels": lambda p, x: x[:, :1] + p.expand(x.shape[0], 3, x.shape[2], x.shape[3]),
    "other rows": lambda p, x: x.transpose(2, 3) + p.repeat(1, 1, x.shape[3], x.shape[2]),
    "two values": lambda p, x: torch.addcmul(x, x.tanh(), p),
}


@pytest.mark.parametrize("run", ELSE.values(), ids=ELSE)
def test_other_repetitions_stay_right(run):
    check(settled(Shift(run)), X, OTHER, merges=0, refused="Costlier" if run is ELSE["twice"] else "")


class Weighed(nn.Module):
    """DARTS' mixed operation: branches, each times its share."""

    def __init__(self, run):
        super().__init__()
        self.ops, self.run = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)]), run
        self.alphas = nn.Parameter(torch.randn(2))

    def forward(self, x):
        return self.run(self.alphas.softmax(-1), [op(x) for op in self.ops]).relu()


def unbound(w, ys):
    first, second = w.unbind(0)
    return first * ys[0] + second * ys[1]


def unpacked(w, ys):
    first, second = w
    return first * ys[0] + second * ys[1]


WEIGHED = {
    "zip": lambda w, ys: sum(one * y for one, y in zip(w, ys, strict=True)),
    "unbind": unbound,
    "unpacked": unpacked,
    "chunk": lambda w, ys: ys[0] * w.chunk(2)[0] + ys[1] * w.split(1)[1],
    "einsum": lambda w, ys: torch.einsum("n,nbchw->bchw", w, torch.stack(ys)),
    "einsum along another dim": lambda w, ys: torch.einsum("bnchw,n->bchw", torch.stack(ys, 1), w),
    "tensordot": lambda w, ys: torch.tensordot(w, torch.stack(ys), 1),
}


@pytest.mark.parametrize("run", WEIGHED.values(), ids=WEIGHED)
def test_branches_with_shares_of_a_parameter(run):
    check(settled(Weighed(run)), X, OTHER, merges=1, conv=1)


def test_a_weighed_stack_that_is_not_added_up_stays_right():
    model = Written(
        lambda s, x: torch.einsum("n,nbchw->nbchw", s.w, torch.stack([s.a(x), s.b(x)])).prod(0),
        a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), w=nn.Parameter(torch.randn(2)),
    )  # fmt: skip
    check(settled(model), X, OTHER, merges=0)
