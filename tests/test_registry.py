"""Registries: what a rule has to be to be in one, what is refused of wrong ones, and what installed packages bring."""

import sys
import tomllib
import warnings
from dataclasses import replace
from importlib import metadata

import pytest
import torch
from torch import nn

import structrep
from structrep import ConvMap, Registry, Rule, registry
from structrep.errors import InvalidRule, UnknownRule
from structrep.pattern import Affine, Conv, Identity, Many, Norm, Optional, Seq, Sum, conv_norm, pointwise, spatial
from structrep.read.modules import _MODULES
from structrep.registry import default
from structrep.testing import check_rule
from tests.foreign import repvgg
from tests.support import ROOT
from tests.support.models import Branches, bn, conv, noise, randomised, settled
from tests.support.truth import CLOSE, equal, executed, relative_error, says

# --- rules of a user's own ---------------------------------------------------------------------------------------

TWO = Sum(conv_norm(spatial).named("a"), conv_norm(pointwise).named("b"))


def _two(a: ConvMap, b: ConvMap) -> ConvMap:
    return a + b


def test_a_users_rule_merges_in_a_registry_of_its_own() -> None:
    registry = Registry()
    registry.rule(TWO, source="a test")(_two)
    model = settled(Branches(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)))
    plan = structrep.plan(model, rules=registry)
    assert [merge.rules for merge in plan.merges] == [("_two",)]
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    assert relative_error(plan.apply()(x), model(x)) < CLOSE


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a, b: a - b,
        lambda a, b: a,
        lambda a, b: a + b + b,
        lambda a, b: (a + b) * 1.001,
        lambda a, b: None,
        lambda a, b: 0,
    ],
    ids=["sign", "forgotten branch", "branch twice", "scaled", "nothing", "zero"],
)
def test_a_wrong_merge_is_refused_by_its_coefficients(wrong: object) -> None:
    registry = Registry()
    registry.add(Rule("wrong", TWO, wrong, "a test"))  # type: ignore[arg-type]
    model = settled(Branches(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)))
    plan = structrep.plan(model, rules=registry)
    assert not plan.merges
    assert [(r.rule, r.kind) for r in plan.refusals] == [("wrong", "WrongMerge")]
    assert equal(plan.apply(), model, noise(2, 3, 6, 5), within=0.0)


def test_a_wrong_merge_says_by_how_much() -> None:
    registry = Registry()
    registry.add(Rule("wrong", TWO, lambda a, b: a, "a test"))
    plan = structrep.plan(settled(Branches(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1))), rules=registry)
    assert "coefficients differ by" in plan.refusals[0].reason


def test_an_absent_branch_is_zero_and_an_absent_stage_one() -> None:
    registry = Registry()
    seen = {}

    @registry.rule(
        Sum(
            Seq(Conv(spatial).named("dense"), Optional(Norm()).named("norm")),
            Conv(pointwise).named("point"),
            Optional(Identity()).named("skip"),
            Optional(Many(Conv(pointwise)).named("more")),
        ),
        source="a test",
    )
    def absent(dense, norm, point, skip, more):
        seen.update(norm=norm, skip=skip, more=more)
        return (dense >> norm) + point + skip + sum(more)

    model = settled(Branches(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)))
    assert [merge.rules for merge in structrep.plan(model, rules=registry).merges] == [("absent",)]
    assert seen == {"norm": 1, "skip": 0, "more": []}


def test_registration_refuses_what_cannot_work() -> None:
    registry = Registry()
    registry.add(Rule("two", TWO, _two, "the first"))
    with pytest.raises(InvalidRule, match=r"two rules named 'two': 'the first', registered first, and 'the second'"):
        registry.add(Rule("two", TWO, _two, "the second"))
    with pytest.raises(InvalidRule, match=r"takes \(a\), its pattern captures \(a, b\).*does not take 'b'"):
        registry.add(Rule("three", TWO, lambda a: a, "a test"))
    with pytest.raises(InvalidRule, match=r"takes \(a, b, c\).*nothing in the pattern is named 'c'"):
        registry.add(Rule("three", TWO, lambda a, b, c: a, "a test"))
    with pytest.raises(InvalidRule, match="name 'a' twice"):
        registry.add(Rule("three", Sum(Conv().named("a"), Conv().named("a")), lambda a: a, "a test"))
    with pytest.raises(InvalidRule, match=r"rule 'three' has no source: .*source=\.\.\."):
        registry.add(Rule("three", TWO, _two, " "))
    with pytest.raises(InvalidRule, match=r"'<lambda>' is no name for a rule.*give name="):
        registry.rule(TWO, source="a test")(lambda a, b: a + b)
    assert [rule.name for rule in registry] == ["two"]


def test_the_narrower_rule_is_tried_first_whenever_it_was_registered() -> None:
    def named(*rules: tuple[str, tuple[str, ...]]) -> list[str]:
        registry = Registry()
        for name, wider in rules:
            registry.rule(TWO, source="a test", name=name, narrower_than=wider)(_two)
        return [rule.name for rule in registry]

    assert named(("a", ()), ("b", ()), ("c", ("a",)), ("d", ("c",))) == ["d", "c", "a", "b"]
    assert named(("a", ("c", "lost")), ("b", ()), ("c", ())) == ["a", "b", "c"]
    with pytest.raises(InvalidRule, match="rule 'c' is narrower than a, and so than itself"):
        named(("a", ("b",)), ("b", ("c",)), ("c", ("a",)))
    with pytest.raises(InvalidRule, match="rule 'a' is narrower than a"):
        named(("a", ("a",)))


@pytest.mark.parametrize(
    "loops",
    [
        Conv().named("a"),
        Seq(Conv().named("a")),
        Seq(Conv().named("a"), Optional(Affine())),
        Seq(Optional(Conv()), Conv().named("a")),
        Many(Conv()).named("a"),
        (Conv() | Norm()).named("a"),
    ],
    ids=str,
)
def test_a_pattern_that_matches_its_own_output_is_refused(loops: object) -> None:
    with pytest.raises(InvalidRule, match=r"plain convolution.*would match its own output"):
        Registry().add(Rule("loop", loops, lambda a: a, "a test"))  # type: ignore[arg-type]


@pytest.mark.parametrize("rules", [["repvg"], "repvg", ["repvgg", "repvg"]])
def test_an_unknown_rule_name_says_what_there_is(rules) -> None:
    for convert in (structrep.plan, structrep.reparameterize):
        with pytest.raises(UnknownRule, match="did you mean 'repvgg'"):
            convert(nn.Conv2d(1, 1, 1), rules=rules)
    with pytest.raises(UnknownRule, match="there are acb"):
        structrep.plan(nn.Conv2d(1, 1, 1), rules=["qqqqqq"])


@pytest.mark.parametrize(("rules", "merges", "norms"), [("repvgg", 1, 1), (["repvgg"], 1, 1), ([], 0, 4)])
def test_chosen_rules_only(rules, merges, norms) -> None:
    model = randomised(nn.Sequential(repvgg.Summed(4), nn.ReLU(), conv(), bn(4)))
    deploy = says(structrep.plan(model, rules=rules), merges, "Isolated").reparameterize()
    x = noise(2, 4, 5, 6)
    assert equal(deploy, model, x)
    assert executed(deploy, x)["norm"] == norms


def test_a_rule_that_raises_is_refused_and_named():
    registry = Registry()
    registry.rule(Seq(Conv().named("first"), Conv().named("second")), source="by zero")(broken)
    registry.rule(Seq(Conv(lambda kernel: kernel.size), Conv()), source="kernels are tuples")(unmatched)
    net = settled(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU()))
    plan = structrep.plan(net, rules=[*registry, *default])
    assert [merge.rules for merge in plan.merges] == [("chain",)]
    reasons = " ".join(refusal.reason for refusal in plan.refusals if refusal.kind == "WrongMerge")
    assert "the merge function of rule 'broken' fails: ZeroDivisionError" in reasons
    assert "cannot be matched: AttributeError" in reasons


def broken(first, second):
    return 1 / 0


def test_a_predicate_must_be_one():
    with pytest.raises(InvalidRule, match=r"Conv\(kernel=\(3, 3\)\): give a function of it"):
        Conv((3, 3))


def unmatched():
    raise NotImplementedError


# --- plugins ---------------------------------------------------------------------------------------------------

PLUGIN = ROOT / "examples" / "plugin"


@pytest.fixture
def installed(monkeypatch):
    """The example plugin, as if it was installed, and what other entry points a test gives; all undone afterwards."""
    declared = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]["entry-points"]
    points = [metadata.EntryPoint(n, v, group) for group, found in declared.items() for n, v in found.items()]

    def install(*more):
        known = {group: metadata.EntryPoints(p for p in (*points, *more) if p.group == group) for group in declared}
        monkeypatch.setattr(metadata, "entry_points", lambda group: known[group])

    monkeypatch.syspath_prepend(str(PLUGIN))
    monkeypatch.setattr(registry, "_loaded", set())
    monkeypatch.setattr(registry.default, "_rules", dict(registry.default._rules))
    monkeypatch.setattr("structrep.read.modules._MODULES", dict(_MODULES))
    yield install
    for name in [name for name in sys.modules if name.startswith("structrep_twins")]:
        del sys.modules[name]


def test_a_plugin_s_rule_and_reader_are_there_without_being_asked_for(installed):
    installed()
    registry.load_plugins()
    from structrep_twins import Gained, Twins

    torch.manual_seed(0)
    model = settled(nn.Sequential(Twins(4), nn.ReLU(), Gained(4, 6), nn.BatchNorm2d(6)))
    plan = structrep.plan(model)
    assert [merge.rules for merge in plan.merges] == [("twins",), ("fold_norm",)]
    x = torch.randn(1, 4, 6, 5, dtype=torch.float64)
    assert relative_error(plan.apply()(x), model(x)) < CLOSE
    check_rule(registry.default["twins"])
    registry.load_plugins()  # once is enough


def test_a_first_plan_loads_them(installed):
    installed()
    structrep.plan(nn.ReLU().eval())
    assert "twins" in registry.default


def test_a_plugin_that_cannot_be_loaded_is_told_and_left_out(installed):
    installed(metadata.EntryPoint("lost", "no_such_package.rules", registry.RULES))
    with pytest.warns(UserWarning, match=r"structrep.rules .*lost = no_such_package.rules, could not be loaded"):
        structrep.plan(nn.ReLU().eval())
    assert "twins" in registry.default
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        structrep.plan(nn.ReLU().eval())


def test_a_rule_or_a_registry_may_be_named_itself(installed, monkeypatch):
    known = registry.default["repvgg"]
    mine = Registry()
    mine.add(Rule("renamed", known.pattern, known.merge, "mine", known.example))
    other = Rule("other", known.pattern, known.merge, "mine", known.example)
    module = type(sys)("structrep_twins_objects")
    module.mine, module.other = mine, other
    monkeypatch.setitem(sys.modules, "structrep_twins_objects", module)
    values = ("structrep_twins_objects:mine", "structrep_twins_objects:other")
    installed(*(metadata.EntryPoint(v[-5:], v, registry.RULES) for v in values))
    registry.load_plugins()
    assert {"renamed", "other", "twins"} <= {rule.name for rule in registry.default}


class Beside(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.a, self.b, self.join = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), join

    def forward(self, x):
        return self.join([self.a(x), self.b(x)])


class Kernel(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x):
        return nn.functional.conv2d(x, self.w * self.w.abs().tanh(), padding=1)


OF_LAWS = {
    "constant_kernel": Kernel,
    "fold_norm": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
    "fold_prenorm": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)),
    "branches": lambda: Beside(sum),
    "concat": lambda: Beside(lambda parts: torch.cat(parts, 1)),
    "chain": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)),
}


@pytest.mark.parametrize("rule", [rule for rule in default if rule.law], ids=lambda rule: rule.name)
def test_the_function_of_a_law_computes_its_pattern(rule):
    """What a law merges is a term's value, whatever its function says: here the two are compared."""
    (merge,) = structrep.plan(settled(OF_LAWS[rule.name]())).merged.values()
    assert merge.rules == (rule.name,)
    found = rule.match(merge.term)
    assert found is not None
    proved = replace(rule, law=False).merged(merge.term, found)
    assert proved.distance(merge.value()) == 0
