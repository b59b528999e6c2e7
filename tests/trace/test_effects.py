"""What a forward draws, switches and enters: it goes on doing so at every call of the deploy model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.support.models import Written, bn, conv, made, noise, randomised
from tests.support.truth import EXACT, call, check, distance, relative_error, says

X = noise(2, 4, 6, 7)


def drawn(m, x):
    return m.c(x) + m.d(x) * torch.rand(1, dtype=x.dtype)


def test_random_numbers_are_not_baked_in():
    model = randomised(Written(drawn, c=conv(), d=conv(k=1)))
    deploy = says(structrep.plan(model), 0).reparameterize()
    torch.manual_seed(3)
    a = call(model, X)
    torch.manual_seed(3)
    assert distance(call(deploy, X), a) <= EXACT


def dropped_weights(self, x):
    return F.conv2d(x, F.dropout(self.a.weight, 0.5, True), padding=1) + self.b(x)


def gumbel(self, x):
    return self.a(x) * F.gumbel_softmax(self.b.bias, dim=0)[0] + self.b(x)


@pytest.mark.parametrize("forward", [dropped_weights, gumbel])
def test_random_weights_are_drawn_at_every_call(forward):
    deploy = says(structrep.plan(made(forward)), 0, "Untraceable").reparameterize()
    with torch.no_grad():
        torch.manual_seed(0)
        assert relative_error(deploy(X), deploy(X)) > 1e-3


class Switching(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n = conv(), bn(4)

    def forward(self, x):
        self.n.train()
        y = self.n(self.c(x))
        self.n.eval()
        return y


def test_modes_switched_as_the_forward_runs():
    check(Switching(), X, merges=0)


def autocast(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.a(x) + self.b(x)


def test_autocast_goes_on():
    model = made(autocast).float()
    deploy = says(structrep.plan(model), 0).reparameterize()
    assert deploy(X.float()).dtype == torch.bfloat16
