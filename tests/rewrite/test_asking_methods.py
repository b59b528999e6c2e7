"""A method that a forward calls may ask of its input what holds for the example alone: its call stays as it is, and
what neither takes nor gives anything of a merge keeps no edit out. So it is in speechbrain's recurrent layers."""

import copy

import pytest
import torch
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import EXACT, check, relative_error

X = torch.randn(4, 10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Gates(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.norm, self.other = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.batch, self.normalize, self.gain = 4, True, 1.0


class Flat(Gates):
    def forward(self, x):
        w = self.w(x)
        flat = self.norm(w.reshape(w.shape[0] * w.shape[1], w.shape[2]))
        w = flat.reshape(w.shape[0], w.shape[1], w.shape[2])
        return w.relu()


class Sized(Gates):
    """The sizes are of use to what stays, too."""

    def forward(self, x):
        w = self.w(x)
        n, t, c = w.shape
        w = self.norm(w.reshape(n * t, c)).reshape(n, t, c)
        return w.relu() * t


@pytest.mark.parametrize("make", [Flat, Sized])
def test_sizes_that_only_what_vanishes_asks_for_vanish_too(make):
    check(make(), X, merges=1)
    assert structrep.plan(settled(make()), X).merges[0].edit == "edit"


class Counts(Gates):
    """As speechbrain's layers note how many sequences there are."""

    def note(self, x):
        if self.batch != x.shape[0]:
            self.batch = x.shape[0]

    def forward(self, x):
        self.note(x)
        w = self.w(x)
        if self.normalize:
            flat = self.norm(w.reshape(w.shape[0] * w.shape[1], w.shape[2]))
            w = flat.reshape(w.shape[0], w.shape[1], w.shape[2])
        return w.relu()


class GivesTheInput(Gates):
    def note(self, x):
        return x if x.shape[0] == 4 else x.tanh()

    def forward(self, x):
        x = self.note(x)
        w = self.w(x)
        flat = self.norm(w.reshape(w.shape[0] * w.shape[1], w.shape[2]))
        w = flat.reshape(w.shape[0], w.shape[1], w.shape[2])
        return w.relu()


class TakesWhatVanishes(Gates):
    def note(self, w):
        return w if w.shape[0] == 4 else w.tanh()

    def forward(self, x):
        w = self.w(x)
        w = self.note(w)
        flat = self.norm(w.reshape(w.shape[0] * w.shape[1], w.shape[2]))
        w = flat.reshape(w.shape[0], w.shape[1], w.shape[2])
        return w.relu()


class GivesAFactor(Gates):
    def note(self, x):
        return 1.5 if x.shape[0] == 4 else 2.0

    def forward(self, x):
        k = self.note(x)
        w = self.w(x) * k
        flat = self.norm(w.reshape(w.shape[0] * w.shape[1], w.shape[2]))
        w = flat.reshape(w.shape[0], w.shape[1], w.shape[2])
        return w.relu()


class SetsAFactor(GivesAFactor):
    def note(self, x):
        if x.shape[0] != 4:
            self.gain = 2.0
        return 1.0

    def forward(self, x):
        self.note(x)
        w = self.w(x) * self.gain
        flat = self.norm(w.reshape(w.shape[0] * w.shape[1], w.shape[2]))
        w = flat.reshape(w.shape[0], w.shape[1], w.shape[2])
        return w.relu()


class SetsWhetherToNorm(Counts):
    def note(self, x):
        if x.shape[0] != 4:
            self.normalize = False


class GivesTheNorm(Gates):
    def note(self, x):
        return self.norm if x.shape[0] == 4 else self.other

    def forward(self, x):
        norm = self.note(x)
        w = self.w(x)
        flat = norm(w.reshape(w.shape[0] * w.shape[1], w.shape[2]))
        w = flat.reshape(w.shape[0], w.shape[1], w.shape[2])
        return w.relu()


class GivesHowOften(Gates):
    def note(self, x):
        return 1 if x.shape[0] == 4 else 2

    def forward(self, x):
        w = self.w(x)
        for _ in range(self.note(x)):
            flat = self.norm(w.reshape(w.shape[0] * w.shape[1], w.shape[2]))
            w = flat.reshape(w.shape[0], w.shape[1], w.shape[2])
        return w.relu()


@pytest.mark.parametrize(
    ("make", "merges"),
    [(Counts, 1), (GivesTheInput, 1), (TakesWhatVanishes, 0), (GivesAFactor, 0), (SetsAFactor, 0),
     (SetsWhetherToNorm, 0), (GivesTheNorm, 0), (GivesHowOften, 0)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::structrep.NothingMerged")
def test_a_method_that_asks_what_holds_for_the_example_alone(make, merges):
    model = settled(make())
    plan = structrep.plan(model, X)
    assert len(plan.merges) == merges
    for x in (X, X[:3]):
        deploy, own = plan.apply(), copy.deepcopy(model)
        assert relative_error(deploy(x), own(x)) < EXACT
