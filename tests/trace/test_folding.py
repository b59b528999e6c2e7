"""What a forward computes from weights alone: in float64 if that is rounding, as the model has it if it is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import structrep
from tests.support.models import settled
from tests.support.truth import CLOSE, relative_error, says

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    """A constant between two convolutions."""

    def __init__(self, factor, k):
        super().__init__()
        self.c, self.d, self.factor = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), factor
        self.register_buffer("k", k)

    def forward(self, x):
        return self.d(self.c(x) * self.factor(self.k, x))


def rewritten(k, x):
    t = k.clone()
    scale = t * 2
    t.zero_()
    return scale


def grown(k, x):
    t = torch.ones(4, 1, 1) * 3
    scale = t * 2
    t *= 5
    return scale


@pytest.mark.parametrize(
    ("factor", "start"),
    [
        (lambda k, x: torch.round(k * 10), 0.35),
        (lambda k, x: torch.floor(k * 10), 0.7),
        (rewritten, 0.7),
        (grown, 0.7),
        (lambda k, x: 1 / (k * 3).sqrt(), 0.7),
    ],
)
def test_constants_are_what_the_model_has(factor, start):
    for exported in (False, True):
        model = Scaled(factor, torch.full((4, 1, 1), start)).eval()
        given = torch.export.export(model, (X,)).module() if exported else model
        with torch.no_grad():
            for plan in (structrep.plan(given), structrep.plan(given, X)):
                says(plan, 1).prove()
                assert relative_error(plan.apply()(X), model(X)) < 1e-5


@pytest.mark.parametrize(
    "factor",
    [
        lambda k, x: F.dropout(torch.ones(4, 1, 1, device=x.device), 0.5),
        lambda k, x: torch.poisson(torch.ones(4, 1, 1, device=x.device)),
        lambda k, x: F.rrelu(-torch.ones(4, 1, 1, device=x.device), training=True),
    ],
)
def test_numbers_that_are_drawn_are_no_constants(factor):
    plan = structrep.plan(Scaled(factor, torch.ones(4, 1, 1)).eval())
    assert not plan.merges


def test_planning_draws_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    before = torch.get_rng_state()
    says(structrep.plan(model, X), 1).reparameterize(X)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("function", "merges"),
    [
        (lambda y: torch.rsub(y, 1.5, alpha=2), 0),
        (lambda y: torch.ops.aten.add.Scalar(y, 1.5, 2), 1),
        (lambda y: torch.ops.aten.sub.Scalar(y, 1.5, 2), 1),
    ],
)
@pytest.mark.parametrize("how", ["exported", "traced"])
def test_operators_with_a_factor(function, merges, how):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.d = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.d(function(self.c(x)))

    model = Model().eval()
    try:
        graph = torch.export.export(model, (X,)).module() if how == "exported" else fx.symbolic_trace(model)
    except Exception as error:
        if "too many positional arguments" not in str(error):
            raise
        pytest.skip("torch 2.6 exports no operator whose factor is given by its place")
    with torch.no_grad():
        deploy = says(structrep.plan(graph), merges).apply()
        assert relative_error(deploy(X), model(X)) < 1e-5


class OnPairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, xs, scale=1.0):
        first, second = xs.values() if isinstance(xs, dict) else xs
        return self.n(self.c(first)) + self.n(self.c(second)) * scale


@pytest.mark.parametrize("given", [([X, X + 1],), ({"a": X, "b": X + 1},), ([X, X + 1], 2.0)])
def test_programs_of_structured_inputs(given):
    model = OnPairs().eval()
    graph = torch.export.export(model, given).module()
    deploy = says(structrep.plan(graph, given), 2).reparameterize(given)
    with torch.no_grad():
        assert relative_error(deploy(*given), model(*given)) < 1e-5


def test_norms_are_folded_or_kept():
    with pytest.raises(structrep.StructrepError, match="norms='kep': give 'fold' or 'keep'"):
        structrep.plan(OnPairs().eval(), norms="kep")


class GivesItsConstant(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.conv, self.how = nn.Conv2d(4, 4, 3, padding=1), how
        self.shift = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        shift = self.how(self.shift)
        return self.conv(x) + shift, [shift]


@pytest.mark.parametrize(
    "how", [lambda p: p, lambda p: p + p, lambda p: p.exp().mul(2)], ids=["itself", "sum", "formula"]
)
def test_a_constant_that_is_merged_and_given_back_stays(how):
    model = settled(GivesItsConstant(how))
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    found, (shift,) = says(structrep.plan(model, x), 1).reparameterize(x)(x)
    expected, (given,) = model(x)
    assert relative_error(found, expected) < CLOSE
    assert torch.equal(shift, given)


class ByAView(nn.Module):
    """As relative positions in halo attention: the kernel is a parameter turned around, which computes nothing."""

    def __init__(self):
        super().__init__()
        self.rel = nn.Parameter(torch.randn(5, 4))

    def kernel(self):
        return self.rel.transpose(-1, -2)

    def forward(self, x):
        return (x @ self.kernel()).relu()


class ByAProduct(ByAView):
    def kernel(self):
        return self.rel.transpose(-1, -2) * 2


@pytest.mark.parametrize(("cls", "merges"), [(ByAView, 0), (ByAProduct, 1)])
def test_a_view_of_a_parameter_is_no_kernel_that_is_computed(cls, merges):
    model, x = settled(cls()), torch.randn(2, 3, 4, dtype=torch.float64)
    plan = structrep.plan(model, x)
    assert len(plan.merges) == merges
    assert not plan.refusals
    assert relative_error(plan.apply()(x), model(x)) < 1e-14
