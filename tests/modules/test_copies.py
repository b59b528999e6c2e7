"""Copies: a model is copied as deepcopy copies it, or an error says that it cannot be; the two are apart."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from structrep import errors
from tests.foreign import repvgg
from tests.support.models import Written, bn, conv, noise, randomised, settled
from tests.support.truth import CLOSE, call, distance, equal, fingerprint, relative_error, says

X = noise(2, 4, 8, 8)


@pytest.mark.parametrize(
    ("make", "merges"),
    [
        (lambda: repvgg.Official(4, 4), 1),
        (lambda: nn.Sequential(nn.Sequential(conv(), bn(4)), nn.ReLU(), nn.Sequential(conv(), bn(4))), 2),
        (lambda: nn.Sequential(conv(), nn.ReLU(), conv(), bn(4)), 1),
        (lambda: Written(lambda m, x: m.c(x) + m.d(x), c=conv(), d=conv(k=1, bias=False)), 1),
        (lambda: Written(lambda m, x: m.c(x) * 1.0, c=conv()), 0),
        (lambda: Written(lambda m, x: F.conv2d(x, m.c.weight * 1.0, m.c.bias), c=conv()), 1),
    ],
)
def test_weights_of_the_original_and_the_result_are_apart(make, merges):
    """Writing to one must not change the other, in any layer, merged or not."""
    model = randomised(make())
    deploy = says(structrep.plan(model), merges).reparameterize()
    truth = call(deploy, X)
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.zero_()
    assert distance(call(deploy, X), truth) == 0


def test_model_that_cannot_be_copied():
    model = randomised(nn.Sequential(conv(), bn(4)))
    model.lock = threading.Lock()
    before = fingerprint(model)
    with pytest.raises(errors.BadInput, match="copied"):
        structrep.reparameterize(model)
    assert fingerprint(model) == before


def test_computed_tensor_in_an_attribute():
    """A non-leaf tensor, which torch refuses to deep-copy."""
    model = randomised(nn.Sequential(conv(), bn(4)))
    model.cached, model.more = model[0].weight * 2, [model[0].weight.sum()]
    deploy = says(structrep.plan(model), 1).reparameterize()
    assert equal(deploy, model, X)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


class Shares(nn.Module):
    """A list that two modules hold: one writes, the other reads."""

    def __init__(self):
        super().__init__()
        self.pair, self.kept = Pair(), []
        self.pair.kept = self.kept

    def forward(self, x):
        self.pair.kept.append(1)
        return self.pair(x) * self.kept.pop()


class Mixed:
    def __deepcopy__(self, memo):
        made = type(self)()
        made.load_state_dict(self.state_dict())
        return made.to(next(self.parameters())).eval()


class Locked(nn.Module, Mixed):
    def __init__(self):
        super().__init__()
        self.pair, self.lock = Pair(), threading.Lock()

    def forward(self, x):
        return self.pair(x)


@pytest.mark.parametrize("make", [Shares, Locked])
def test_models_are_copied_as_deepcopy_copies_them(make):
    model = settled(make())
    deploy = says(structrep.plan(model), 1).reparameterize()
    assert relative_error(deploy(X), model(X)) < CLOSE
