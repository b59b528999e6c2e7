"""What a plan believes of scales, of orders and of residuals is proved by the graph as it was traced: a wrong belief is
caught where it is, without example inputs, and no other merge suffers."""

import operator
from dataclasses import replace

import pytest
import torch
from torch import nn

import structrep
from structrep.algebra import ConvMap
from structrep.match import residuals
from structrep.match.absorption import Absorption
from structrep.match.residuals import _range
from structrep.match.shared_scales import absorptions
from structrep.match.sum_order import _write
from structrep.terms.layers import diagonal_layer
from structrep.terms.term import signed, sum_terms
from tests.support.models import settled
from tests.support.truth import EXACT, distance

X = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Apart(nn.Module):
    """A convolution and a norm, which merge whatever becomes of the part behind a nonlinearity."""

    def __init__(self, part, *, last=False):
        super().__init__()
        self.own = nn.Linear(4, 4) if last else nn.Conv2d(4, 4, 1)
        self.scale = nn.Parameter(torch.rand(4) + 0.5) if last else nn.BatchNorm2d(4)
        self.last, self.part = last, part

    def forward(self, x):
        y = self.own(x)
        return self.part((y * self.scale if self.last else self.scale(y)).relu())


class Attention(nn.Module):
    """One norm of three readers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.q, self.k, self.v = (nn.Conv2d(4, 4, kernel) for kernel in (1, 1, 3))

    def forward(self, x):
        y = self.norm(x)
        return self.q(y).sigmoid() * self.k(y), self.v(y), x


class Stacked(nn.Module):
    """One norm behind two branches of one input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(torch.cat([self.a(x), self.b(x.tanh())], 1))


class Turned(nn.Module):
    """A norm of values whose dims were moved since the Linear, and perhaps a scale behind it."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.gamma = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x):
        return (self.norm(self.linear(x).permute(0, 2, 1)) * self.gamma.view(1, -1, 1)).softmax(1)


class Tokens(nn.Module):
    """What a layer norm ends with, given to two Linears."""

    def __init__(self):
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        y = self.norm(x)
        return self.q(y) @ self.k(y).transpose(1, 2)


class Pieces(nn.Module):
    """A matrix on all numbers of a piece, a norm behind it and a convolution beside it, as in RepMLP."""

    def __init__(self):
        super().__init__()
        self.whole, self.norm, self.conv = nn.Conv2d(36, 36, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        wide = self.whole(x.reshape(-1, 36, 1, 1)).reshape(-1, 4, 3, 3)
        return (self.norm(wide) - self.conv(x.reshape(-1, 4, 3, 3))).relu()


PARTS = {"before": Attention, "behind": Stacked, "moved": Turned, "ends": Tokens, "beside": Pieces}
LAST = ("moved", "ends")


def model_of(name):
    return settled(Apart(PARTS[name](), last=name in LAST)), TOKENS if name in LAST else X


@pytest.mark.parametrize("name", PARTS)
def test_what_is_believed_rightly_is_merged(name):
    model, x = model_of(name)
    for example in (None, x):
        plan = structrep.plan(model, example)
        listed = [merge.where for merge in plan.merges]
        assert any(where.startswith("part.") for where in listed)
        plan.prove()
        assert [merge.where for merge in plan.merges] == listed
        assert distance(plan.apply()(x), model(x)) < EXACT


def scaled(layer, factor=1.0, shift=0.0, order=None):
    """A scale with other numbers."""
    count = layer.in_channels

    def load(c, d):
        map_ = layer.load(count, d)
        numbers, bias = map_.kernel.flatten() * factor, map_.bias + shift
        if order is not None:
            numbers, bias = numbers[order], bias[order]
        return ConvMap.scale(numbers, bias, dims=d)

    return replace(diagonal_layer(layer.kind, load, count, layer.dims, layer.parameters), shifts=True)


def nothing(layer):
    """A scale that leaves values as they are."""
    count = layer.in_channels
    return diagonal_layer(layer.kind, ConvMap.identity, count, layer.dims, layer.parameters)


def squared(layer):
    count = layer.in_channels
    return replace(
        diagonal_layer(
            layer.kind, lambda c, d: layer.load(count, d) >> layer.load(count, d), count, layer.dims, layer.parameters
        ),
        shifts=True,
    )


def first_only(change):
    """A change of the part of one taker."""
    return lambda parts: {node: change(one) if i == 0 else one for i, (node, one) in enumerate(parts.items())}


def of_all(change):
    return lambda parts: {node: change(one) for node, one in parts.items()}


def exchanged(parts):
    """Each taker is given the part of the next."""
    first, *others = parts.values()
    return dict(zip(parts, [*others, first], strict=True))


WRONG = {
    "counted twice": of_all(squared),
    "counted twice by one": first_only(squared),
    "forgotten": of_all(lambda one: nothing(one)),
    "forgotten by one": first_only(lambda one: nothing(one)),
    "another number": first_only(lambda one: scaled(one, 1 + 1e-6)),
    "another shift": first_only(lambda one: scaled(one, shift=1e-6)),
    "channels in another order": first_only(lambda one: scaled(one, order=torch.arange(one.in_channels - 1, -1, -1))),
}


def planted(monkeypatch, change, at):
    """Have scales absorbed otherwise than they should be."""
    honest = absorptions

    def wrongly(readings, endings):
        for one in honest(readings, endings):
            if isinstance(one, Absorption) and all(taker.name.startswith("part") for taker in one.takers):
                one = replace(one, **{kind: change(getattr(one, kind)) for kind in at if getattr(one, kind)})
            yield one

    monkeypatch.setattr("structrep.match.search.absorptions", wrongly)


def caught(model, x, *, where="part"):
    """What is wrong is refused, alone, with example inputs and without."""
    for example in (None, x):
        plan = structrep.plan(model, example)
        listed = {merge.where for merge in plan.merges}
        wrong = {name for name in listed if name.startswith(where)}
        assert wrong
        assert "own" in listed
        with pytest.warns(structrep.MergeDropped) as told:
            deploy = structrep.reparameterize(model, example)
        assert {str(one.message).partition(" ")[0] for one in told} == wrong
        assert len(told) == len(wrong)
        assert all(one.filename == __file__ for one in told)
        assert distance(deploy(x), model(x)) < EXACT
        assert {merge.where for merge in plan.merges} == listed
        plan.prove()
        assert {merge.where for merge in plan.merges} == listed - wrong
        assert {refusal.where for refusal in plan.refusals if refusal.kind == "WrongMerge"} == wrong


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["before", "behind", "ends"])
def test_a_scale_that_is_absorbed_wrongly_is_caught(monkeypatch, name, wrong):
    planted(monkeypatch, WRONG[wrong], ("before", "behind"))
    caught(*model_of(name))


def test_a_scale_that_is_given_to_another_taker_is_caught(monkeypatch):
    planted(monkeypatch, exchanged, ("behind",))
    caught(*model_of("behind"))


@pytest.mark.parametrize("wrong", ["counted twice", "forgotten", "channels in another order"])
def test_one_of_two_scales_that_a_layer_takes_is_caught(monkeypatch, wrong):
    planted(monkeypatch, WRONG[wrong], ("behind",))
    caught(*model_of("moved"))


@pytest.mark.parametrize("wrong", [lambda one: sum_terms([one, one]), lambda one: signed(one, -1.0)])
def test_what_is_added_wrongly_beside_a_matrix_is_caught(monkeypatch, wrong):
    planted(monkeypatch, of_all(wrong), ("beside",))
    caught(*model_of("beside"))


def test_a_scale_that_two_absorptions_take_is_caught(monkeypatch):
    """As if a norm were spread in two ways that know nothing of each other."""
    honest = absorptions

    def twice(readings, endings):
        for one in honest(readings, endings):
            yield one
            if isinstance(one, Absorption):
                yield replace(one, before=one.before, behind=one.behind)

    monkeypatch.setattr("structrep.match.search.absorptions", twice)
    for name in ("before", "behind", "moved", "ends"):
        caught(*model_of(name))


class Sum(nn.Module):
    """Three convolutions of one input, and two values that are none, added from left to right."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x):
        return (self.a(x) + x.sin() + self.b(x) + x.exp() + self.c(x)).tanh()


def _lost(write, additions, groups):
    undo = write(additions, groups)
    additions[-1].target, additions[-1].args = operator.pos, additions[-1].args[:1]
    return undo


def _doubled(write, additions, groups):
    return write(additions, [*groups[:-1], groups[-2]])


def _merged_twice(write, additions, groups):
    return write(additions, [[*groups[0][:-1], groups[0][0]], *groups[1:]])


def _minus(write, additions, groups):
    undo = write(additions, groups)
    additions[-1].target = operator.sub
    return undo


def _minus_inside(write, additions, groups):
    undo = write(additions, groups)
    additions[0].target = operator.sub
    return undo


@pytest.mark.parametrize("wrong", [_lost, _doubled, _merged_twice, _minus, _minus_inside])
def test_a_sum_in_a_wrong_order_is_caught_and_keeps_the_one_that_it_had(monkeypatch, wrong):
    model = settled(Apart(Sum()))
    honest = _write
    with monkeypatch.context() as patch:
        patch.setattr("structrep.match.sum_order._write", lambda *given: wrong(honest, *given))
        caught(model, X)
    assert distance(structrep.reparameterize(model)(X), model(X)) < EXACT
    assert sum(isinstance(part, nn.Conv2d) for part in structrep.reparameterize(model).modules()) == 2


class Residual(nn.Module):
    """A block of which RMNet carries the residual."""

    def __init__(self, act=torch.relu, stride=1):
        super().__init__()
        self.act = act
        self.a, self.n = nn.Conv2d(4, 6, 3, stride, padding=1), nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 4, 3, padding=1)
        self.skip = nn.Conv2d(4, 4, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        x = self.act(x)
        return self.b(torch.relu(self.n(self.a(x)))) + self.skip(x)


def _other_channels(channels, stride, step):
    eye = torch.eye(channels, dtype=torch.float64).roll(1, 0).reshape(channels, channels, *[1] * len(stride))
    return residuals.leaf(residuals.conv_layer(eye, None, stride, 0, 1, 1))


CARRIED = {
    "doubled": ("_identity", lambda honest: lambda *given: signed(honest(*given), 2.0)),
    "lost": ("_identity", lambda honest: lambda *given: signed(honest(*given), 0.0)),
    "of other channels": ("_identity", lambda honest: _other_channels),
    "of the layer's own channels": ("_after", lambda honest: lambda count: lambda _: slice(0, 4)),
}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("wrong", CARRIED)
def test_a_residual_that_is_carried_wrongly_is_caught(monkeypatch, wrong, stride):
    name, change = CARRIED[wrong]
    monkeypatch.setattr(residuals, name, change(getattr(residuals, name)))
    _caught_carry(settled(Apart(Residual(stride=stride))))


def test_a_residual_that_activations_do_not_leave_as_it_is_is_caught(monkeypatch):
    model = settled(Apart(Residual(torch.tanh)))
    assert any("own output" in refusal.reason for refusal in structrep.plan(model, reserve="part").refusals)
    honest = _range
    monkeypatch.setattr(residuals, "_range", lambda node: ("relu", honest(node)[1]))
    _caught_carry(model)


def _caught_carry(model):
    for example in (None, X):
        listed = {merge.where for merge in structrep.plan(model, example, reserve="part").merges}
        assert {"own", "part.a", "part.b"} == listed
        with pytest.warns(structrep.MergeDropped) as told:
            deploy = structrep.reparameterize(model, example, reserve="part")
        assert [str(one.message).split()[:2] for one in told] == [["part.a", "(rmnet)"], ["part.b", "(rmnet)"]] or {
            str(one.message).split()[0] for one in told
        } == {"part.a", "part.b"}
        assert distance(deploy(X), model(X)) < EXACT
        assert isinstance(deploy.scale, nn.Identity)


@pytest.mark.parametrize("name", PARTS)
def test_what_a_deploy_layer_gives_is_compared_where_the_model_has_that_value(name):
    model, x = model_of(name)
    plan = structrep.plan(model.float(), x.float())
    found = plan.verify(x.float())
    assert found.ok
    assert {region.where for region in found.regions} == {merge.where for merge in plan.merges}
    assert found.first_off is None
    deploy = plan.apply()
    (wrong, *_) = (merge.where for merge in plan.merges if merge.where != "own")
    deploy.get_submodule(wrong).bias.data += 0.1
    assert plan.verify(x.float(), deploy).first_off.where == wrong


class Open(nn.Module):
    """A norm behind two branches, of which one is inexact at the border."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 2, 3, padding=1)
        self.b, self.norm = nn.Conv2d(4, 3, 1), nn.BatchNorm2d(5)

    def forward(self, x):
        return self.norm(torch.cat([self.second(self.first(x)), self.b(x.tanh())], 1)).relu()


@pytest.mark.parametrize("example", [None, X.repeat(1, 1, 2, 2)])
def test_a_border_that_is_left_open_is_open_for_what_shares_a_scale_too(monkeypatch, example):
    model, x = settled(Apart(Open())), X.repeat(1, 1, 2, 2)
    plan = structrep.plan(model, example, inexact_borders="part.*")
    (record,) = (merge for merge in plan.merges if merge.where == "part.first")
    assert f"of an input of {'36x37' if example is None else '12x12'} pixels" in record.border
    plan.prove()
    assert len(plan.merges) == 3
    deploy = plan.apply()
    assert distance(deploy(x), model(x)) > EXACT
    assert distance(deploy(x)[..., 2:-2, 2:-2], model(x)[..., 2:-2, 2:-2]) < EXACT
    planted(monkeypatch, WRONG["another number"], ("behind",))
    plan = structrep.plan(model, example, inexact_borders="part.*")
    plan.prove()
    assert [merge.where for merge in plan.merges] == ["own"]


def test_dims_that_are_folded_between_a_linear_and_its_norm():
    class Folds(nn.Module):
        def __init__(self):
            super().__init__()
            self.l, self.n = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.n(self.l(x).flatten(0, 1))

    model = settled(Folds())
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    deploy = structrep.reparameterize(model, x)
    assert not isinstance(deploy.n, nn.BatchNorm1d)
    assert deploy(x).shape == (12, 4)
    assert torch.allclose(deploy(x), model(x), atol=1e-12)


def test_an_output_that_is_made_of_pads_alone_is_no_proof_against_a_merge():
    torch.manual_seed(0)
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, stride=2, padding=1, bias=False)))
    plan = structrep.plan(model)
    assert plan.merges
    plan.prove()
    assert plan.merges
