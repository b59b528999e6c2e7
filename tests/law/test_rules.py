"""Every rule of the registry, by its own example; and what registration refuses."""

import pytest
import torch
from torch import nn

import structrep
from structrep import ConvMap, Registry, Rule
from structrep.errors import InvalidRule, UnknownRule
from structrep.pattern import Affine, Conv, Identity, Many, Norm, Optional, Seq, Sum, conv_norm, pointwise, spatial
from structrep.registry import default
from tests.support.models import Branches, example_input, settled
from tests.support.truth import relative_error

FAMILIES = [rule for rule in default if not rule.law]


@pytest.mark.parametrize("rule", FAMILIES, ids=lambda rule: rule.name)
def test_a_rule_merges_its_example_under_its_name(rule: Rule) -> None:
    assert rule.example is not None
    model = settled(nn.Sequential(rule.example()))
    plan = structrep.plan(model)
    assert [merge.rules for merge in plan.merges] == [(rule.name,)]
    assert [merge.sources for merge in plan.merges] == [(rule.source,)]
    deploy = plan.apply()
    (layer,) = (module for module in deploy.modules() if list(module.parameters(recurse=False)))
    assert type(layer) in (nn.Conv2d, nn.Linear)
    x = example_input(rule, model)
    assert relative_error(deploy(x), model(x)) < 1e-13


@pytest.mark.parametrize("rule", FAMILIES, ids=lambda rule: rule.name)
def test_a_rule_alone_is_enough_for_its_example(rule: Rule) -> None:
    assert rule.example is not None
    plan = structrep.plan(settled(nn.Sequential(rule.example())), rules=[rule.name])
    assert [merge.rules for merge in plan.merges] == [(rule.name,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", FAMILIES, ids=lambda rule: rule.name)
def test_weights_of_any_dtype_merge_alike(rule: Rule, dtype: torch.dtype) -> None:
    """What a block computes from its weights, a border say, is rounded in its dtype, and in float64 it is not."""
    assert rule.example is not None
    model = settled(nn.Sequential(rule.example())).to(dtype)
    plan = structrep.plan(model)
    assert [merge.rules for merge in plan.merges] == [(rule.name,)]
    plan.prove()
    assert len(plan.merges) == 1
    truth = settled(nn.Sequential(rule.example())).double()
    truth.load_state_dict(model.state_dict())
    exact, rounded = structrep.reparameterize(truth).state_dict(), plan.apply().state_dict()
    assert rounded.keys() == exact.keys()
    for name, value in rounded.items():
        assert value.dtype == dtype
        assert relative_error(value.double(), exact[name]) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("rule", FAMILIES, ids=lambda rule: rule.name)
def test_no_rule_matches_its_own_output(rule: Rule) -> None:
    assert rule.example is not None
    deploy = structrep.reparameterize(settled(nn.Sequential(rule.example())))
    again = structrep.plan(deploy)
    assert not again.merges


def test_families_come_before_laws() -> None:
    laws = [rule.law for rule in default]
    assert laws == sorted(laws)
    assert {"repvgg", "acb", "diracnet", "doconv", "expandnet"} <= {rule.name for rule in default if not rule.law}


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
    assert relative_error(plan.apply()(x), model(x)) < 1e-13


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
    assert [rule.name for rule in registry] == ["two"]


@pytest.mark.parametrize(
    "loops",
    [
        Conv().named("a"),
        Seq(Conv().named("a"), Optional(Affine())),
        Seq(Optional(Conv()), Conv().named("a")),
        Many(Conv()).named("a"),
        (Conv() | Norm()).named("a"),
    ],
    ids=str,
)
def test_a_pattern_that_matches_its_own_output_is_refused(loops: object) -> None:
    with pytest.raises(InvalidRule, match="would match its own output"):
        Registry().add(Rule("loop", loops, lambda a: a, "a test"))  # type: ignore[arg-type]


def test_an_unknown_rule_name_says_what_there_is() -> None:
    with pytest.raises(UnknownRule, match="did you mean 'repvgg'"):
        structrep.plan(nn.Conv2d(1, 1, 1), rules=["repvg"])
    with pytest.raises(UnknownRule, match="there are acb"):
        structrep.plan(nn.Conv2d(1, 1, 1), rules=["qqqqqq"])


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
