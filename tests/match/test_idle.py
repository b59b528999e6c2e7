"""What is run for nothing: norms whose value nobody reads, activations that give what they are given."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.support.models import Written, bn, conv, noise, randomised, settled
from tests.support.truth import EXACT, check, followed_or_told, relative_error, says

X = noise(2, 4, 6, 7)


def watched(run):
    return Written(run, f=conv(), watch=bn(4), n=bn(4))


def _watch(m, x):
    m.watch(x)
    return x


UNREAD = {  # how many merges, and what runs
    "behind a layer": (1, dict(conv=1, norm=0), lambda m, x: _watch(m, m.f(x)).relu()),
    "between a layer and its norm": (2, dict(conv=1, norm=0), lambda m, x: m.n(_watch(m, m.f(x))).relu()),
    "of the input": (1, dict(conv=1, norm=0), lambda m, x: m.f(_watch(m, x)).relu()),
    "behind a norm": (2, dict(conv=1, norm=0), lambda m, x: _watch(m, m.n(m.f(x))).relu()),
}


@pytest.mark.parametrize(("merges", "ran", "run"), UNREAD.values(), ids=UNREAD)
def test_a_norm_that_nobody_reads_is_not_run(merges, ran, run):
    deploy = check(watched(run), X, merges=merges, **ran)
    assert isinstance(deploy.watch, nn.Identity)


class Functional(nn.Module):
    """Statistics are watched by a function, in the forward itself."""

    def __init__(self):
        super().__init__()
        self.f, self.watch, self.n = conv(), bn(4), bn(4)

    def forward(self, x):
        y = self.f(x)
        F.batch_norm(y, self.watch.running_mean, self.watch.running_var)
        return self.n(y).relu()


def test_a_functional_norm_that_nobody_reads():
    check(Functional(), X, merges=2, conv=1, norm=0)


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.watch, self.seen = conv(), bn(4), []

    def forward(self, x):
        y = self.f(x)
        self.seen.append(self.watch(y))
        return y.relu()


class Hooked(Keeps):
    """Someone listens."""

    def __init__(self):
        super().__init__()
        self.watch.register_forward_hook(lambda *_: None)

    def forward(self, x):
        y = self.f(x)
        self.watch(y)
        return y.relu()


class OfEachBatch(Hooked):
    def __init__(self):
        super().__init__()
        self.watch = nn.BatchNorm2d(4, track_running_stats=False)


class ReadElsewhere(Hooked):
    def __init__(self):
        super().__init__()
        self.watch = bn(4)

    def forward_features(self, x):
        return self.watch(x)


class Asked(ReadElsewhere):
    def forward(self, x):
        y = self.f(x)
        z = self.watch(y)
        return y.relu() * z.shape[1]

    forward_features = None


@pytest.mark.parametrize("make", [Keeps, Hooked, OfEachBatch, ReadElsewhere, Asked])
def test_a_norm_that_something_hears_of_stays(make):
    model = settled(make())
    deploy = structrep.reparameterize(model)
    assert isinstance(deploy.watch, nn.BatchNorm2d)
    assert relative_error(deploy(X), model(X)) < EXACT


def test_a_report_shows_it(tmp_path):
    for model in (Functional(), watched(UNREAD["between a layer and its norm"][2])):
        plan = structrep.plan(settled(model), X)
        plan.report(tmp_path / f"{type(model).__name__}.html", X)
        assert "nothing" in (tmp_path / f"{type(model).__name__}.html").read_text()
        assert plan.draw() != plan.draw(deploy=True)


def test_the_plan_says_so():
    (record,) = structrep.plan(settled(watched(UNREAD["behind a layer"][2]))).merges
    assert (record.where, record.rules, record.before, record.after) == ("watch", ("unread",), "norm", "nothing")
    assert record.parameters == (16, 0)
    assert "nothing" in str(structrep.plan(settled(watched(UNREAD["behind a layer"][2]))))


CURVES = {
    "LeakyReLU": lambda: nn.Sequential(conv(), nn.ReLU(), nn.LeakyReLU(1.0), nn.MaxPool2d(2)),
    "PReLU": lambda: nn.Sequential(conv(), nn.ReLU(), nn.PReLU(init=1.0).requires_grad_(False), nn.MaxPool2d(2)),
    "leaky_relu": lambda: Written(lambda m, x: F.leaky_relu(m.f(x).relu(), 1.0).sigmoid(), f=conv()),
    "prelu": lambda: Written(lambda m, x: F.prelu(m.f(x).relu(), torch.ones(1, dtype=x.dtype)).sigmoid(), f=conv()),
}


@pytest.mark.parametrize("make", CURVES.values(), ids=CURVES)
def test_an_activation_of_slope_1_is_not_run(make):
    deploy = check(make(), X, merges=1)
    program = torch.export.export(deploy, (X,)).graph
    assert not any("prelu" in str(node.target) or "leaky" in str(node.target) for node in program.nodes)


STAYS = {
    "of the input": lambda m, x: (F.leaky_relu(x, 1.0), m.f(x)),
    "written to": lambda m, x: (y := m.f(x).relu()).sigmoid() + F.leaky_relu(y, 1.0).add_(1),
    "its input written to": lambda m, x: (F.leaky_relu(y := m.f(x).relu(), 1.0), y.add_(1)),
    "another slope": lambda m, x: F.leaky_relu(m.f(x).relu(), 0.99),
}


@pytest.mark.parametrize("run", STAYS.values(), ids=STAYS)
def test_what_would_be_the_same_tensor_stays(run):
    check(Written(run, f=conv()), X, merges=0)


def test_a_slope_that_is_learned_stays():
    says(structrep.plan(randomised(nn.Sequential(conv(), nn.ReLU(), nn.PReLU(4)))), 0)


def test_a_slope_that_is_set_later_is_guarded():
    """VanillaNet's activation, whose slope a training loop sets."""

    class Vanilla(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.slope = conv(), 1

        def forward(self, x):
            return F.leaky_relu(self.f(x).relu(), self.slope).sigmoid()

    deploy = check(Vanilla(), X, merges=1)
    deploy.slope = 0.5
    with pytest.raises(ValueError, match="slope"):
        deploy(X)


@pytest.mark.parametrize(
    "act", [lambda: nn.LeakyReLU(1.0), lambda: nn.LeakyReLU(1.0, inplace=True), lambda: lambda x: F.leaky_relu(x, 1.0)]
)
def test_an_activation_of_slope_1_within_a_merge_is_not_run(act):
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.act = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3), act()

        def forward(self, x):
            return self.second(self.act(self.first(x))).relu()

    model = settled(Between())
    for inputs in ((), (X,)):
        plan = structrep.plan(model, *inputs)
        assert len(plan.merges) == 1, plan
        deploy = plan.apply()
        assert relative_error(deploy(X), model(X)) < 1e-12
        assert not structrep.plan(deploy, *inputs).merges


class PerhapsRead(nn.Module):
    """A norm whose value is read where a setting says so."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), "not"

    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y)
        return z if self.how == "read" else y


class PerhapsRunAgain(PerhapsRead):
    def forward(self, x):
        y = self.conv(x)
        self.norm(y)
        return self.norm(y) + 1 if self.how == "read" else y


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return y, self.norm(y)


class PicksOne(nn.Module):
    """One of several values that a part gives is what a setting says."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.how = Both(), 1

    def forward(self, x):
        return self.both(x)[self.how]


class NormsByAMethod(nn.Module):
    """A method that is called for two layers, and that may leave out the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.how = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), "norm"

    def normed(self, y):
        return self.norm(y) if self.how == "norm" else y

    def forward(self, x):
        return self.normed(self.a(x)).relu() + self.normed(self.b(x)).sigmoid()


@pytest.mark.parametrize(
    ("model", "how", "merges"),
    [(PerhapsRead, "read", 1), (PerhapsRunAgain, "read", 1), (PicksOne, 0, 1), (NormsByAMethod, "none", 2)],
)
def test_a_value_that_a_setting_may_have_read_is_guarded(model, how, merges):
    x = torch.randn(2, 3, 6, 6).double()
    deploy = check(source := model().double().eval(), x, merges=merges)
    deploy.how = how
    source.how = how
    assert followed_or_told(source, deploy, x)


def test_an_activation_of_slope_1_beside_its_input_stays():
    """Whoever got both could write to one, and would see it in the other."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.conv(x)
            return y, F.leaky_relu(y, 1.0)

    for inputs in ((), (X,)):
        one, other = structrep.plan(settled(Both()), *inputs).apply()(X)
        assert one.data_ptr() != other.data_ptr()
