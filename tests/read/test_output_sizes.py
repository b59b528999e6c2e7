"""Transposed convolutions that are told, at each call, how large their output is to be."""

import pytest
import torch
from torch import nn

import structrep
from tests.support.models import Written, bn, conv, noise, randomised
from tests.support.truth import EXACT, call, check, distance

X, Y = noise(2, 4, 5, 6), noise(2, 4, 4, 3)


def up(run, **more):
    return Written(run, t=nn.ConvTranspose2d(4, 6, 3, stride=2), n=bn(6), **more)


MERGED = {
    "a formula": lambda m, x: m.n(m.t(x, output_size=[2 * x.shape[2] + 1, 2 * x.shape[3] + 2])),
    "by place": lambda m, x: m.n(m.t(x, [2 * x.shape[2] + 2, 2 * x.shape[3] + 1])).relu(),
    "with batch and channels": lambda m, x: m.n(m.t(x, output_size=(2, 6, 2 * x.size(2) + 2, 2 * x.size(3) + 1))),
    "of a skip": lambda m, x: m.n(m.t(m.down(x).relu(), output_size=m.skip(x).size()[2:])) + m.skip(x),
}


@pytest.mark.parametrize("run", MERGED.values(), ids=MERGED)
def test_a_norm_behind_it_goes_into_it(run):
    model = up(run, down=conv(4, 4, stride=2), skip=conv(4, 6, padding=2))
    deploy = check(model, X, Y, merges=1, norm=0)
    assert isinstance(deploy.t, nn.ConvTranspose2d)
    assert isinstance(deploy.n, nn.Identity)


def test_a_scale_before_it_goes_into_it():
    model = Written(
        lambda m, x: m.t(x * m.gain, output_size=(2 * x.shape[2] + 2, 2 * x.shape[3] + 2)),
        t=nn.ConvTranspose2d(4, 6, 3, stride=2),
    )
    model.gain = nn.Parameter(torch.rand(4, 1, 1))
    check(model, X, Y, merges=1)


STAYS = {
    "a norm before it, which shifts": ("Inexact", lambda m, x: m.t(m.m(x), output_size=(12, 14))),
    "another beside it": ("Unreadable", lambda m, x: m.t(x, output_size=(12, 14)) + m.u(x, output_size=(12, 14))),
    "a layer behind it": ("Unreadable", lambda m, x: m.p(m.t(x, output_size=(12, 14)))),
    "of stride 1": ("Isolated", lambda m, x: m.n(m.one(x, output_size=(5, 6)))),
}


@pytest.mark.parametrize(("kind", "run"), STAYS.values(), ids=STAYS)
def test_nothing_else_does(kind, run):
    model = up(
        run,
        m=bn(4),
        u=nn.ConvTranspose2d(4, 6, 3, stride=2),
        p=conv(6, 2, k=1),
        one=nn.ConvTranspose2d(4, 6, 1),
    )
    check(model, X, merges=0, refused=kind)


def test_a_size_that_no_call_may_have_is_still_refused():
    deploy = structrep.reparameterize(randomised(up(lambda m, x: m.n(m.t(x, output_size=(40, 40))))))
    with pytest.raises(ValueError, match="requested an output size"):
        deploy(X)


def test_another_forward_takes_another_size():
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.t, self.n = nn.ConvTranspose2d(4, 6, 3, stride=2), bn(6)

        def forward(self, x):
            return self.n(self.t(x, output_size=(2 * x.shape[2] + 1, 2 * x.shape[3] + 1)))

        def forward_large(self, x):
            return self.n(self.t(x, output_size=(2 * x.shape[2] + 2, 2 * x.shape[3] + 2)))

    model = randomised(Up())
    deploy = check(model, X, merges=1, norm=0)
    assert distance(call(deploy, X, "forward_large"), call(model, X, "forward_large")) < EXACT
