"""The conformance suite of rules: what it says of those that do not conform."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import structrep
from structrep import Registry, Rule
from structrep.blocks import Branches, RepVGGBlock2d
from structrep.errors import BrokenRule, InvalidRule
from structrep.pattern import Conv, Identity, Many, Norm, Seq, Sum, conv_norm, pointwise, spatial
from structrep.registry import default
from structrep.testing import Overlap, check_rule, overlaps


def two(*more):
    return Branches(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), *more)


def normed(layer):
    return nn.Sequential(layer, nn.BatchNorm2d(4))


TWO = Sum(Conv(spatial).named("a"), Conv(pointwise).named("b"))
BROKEN = {
    "no example": (Rule("r", TWO, lambda a, b: a + b, "s"), "has no example"),
    "an example that cannot be made": (Rule("r", TWO, lambda a, b: a + b, "s", lambda: 1 / 0), "ZeroDivisionError"),
    "an example that is no module": (Rule("r", TWO, lambda a, b: a + b, "s", lambda: 3), "is a int, not a torch.nn"),
    "a wrong merge": (Rule("r", TWO, lambda a, b: a + 2 * b, "s", two), "coefficients differ by"),
    "a merge that gives no map": (Rule("r", TWO, lambda a, b: 0, "s", two), "not a ConvMap"),
    "a merge that raises": (Rule("r", TWO, lambda a, b: a >> a, "s", two), "does not merge"),
    "another example": (
        Rule("r", TWO, lambda a, b: a + b, "s", lambda: two(nn.Identity())),
        r"is nowhere in it; nearest comes\n  \(conv 3x3 \+ conv 1x1 \+ x\)\n  branch x is none of its"),
    "a pattern within another": (
        Rule("r", Seq(TWO, Norm()), lambda a, b: a + b, "s", lambda: normed(two(nn.Identity()))),
        r"nearest comes\n  \(\(conv 3x3 \+ conv 1x1 \+ x\) -> norm\)\n  first it wants .*: branch x is none of its"),
    "an example without layers": (Rule("r", TWO, lambda a, b: a + b, "s", nn.ReLU), "where no layer is read"),
    "narrower than what does not match it": (
        Rule("r", TWO, lambda a, b: a + b, "s", two, narrower_than=("dyrep",)), "does not match its example at all"),
    "an example of two": (Rule("r", TWO, lambda a, b: a + b, "s", lambda: nn.Sequential(two(), nn.ReLU(), two())),
                          "does not become one layer"),
    "a counter-example that merges": (
        Rule("r", TWO, lambda a, b: a + b, "s", two, (("Inexact", two),)), "which was to be refused"),
    "a counter-example refused otherwise": (
        Rule("r", TWO, lambda a, b: a + b, "s", two, (("Overflow", lambda: nn.Conv2d(4, 4, 3)),)), "to be refused as"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_rules_that_do_not_conform(name: str) -> None:
    rule, said = BROKEN[name]
    with pytest.raises(BrokenRule, match=said):
        check_rule(rule)


def test_a_rule_that_cannot_be_registered() -> None:
    with pytest.raises(InvalidRule):
        check_rule(Rule("r", TWO, lambda a: a, "s", two))


def test_a_rule_with_counter_examples() -> None:
    registry = Registry()

    def biased() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, padding=1))

    @registry.rule(
        Seq(Conv(pointwise).named("first"), Many(Conv(spatial)).named("rest")),
        source="mine",
        example=lambda: nn.Sequential(nn.Conv2d(4, 8, 1, padding=1), nn.Conv2d(8, 4, 3)),
        counter_examples=[("Inexact", biased), ("", lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))],
    )
    def narrow(first, rest):  # type: ignore[no-untyped-def]
        for conv in rest:
            first = first >> conv
        return first

    done = check_rule(registry["narrow"])
    assert done[-2:] == [
        "a counter-example is refused: Inexact",
        "a counter-example is refused: its pattern passes it by",
    ]


def test_what_is_checked_is_what_is_merged() -> None:
    torch.manual_seed(0)
    skip = (Norm() | Identity()).named("c")
    pattern = Sum(conv_norm(spatial).named("a"), conv_norm(pointwise).named("b"), skip)
    rule = Rule("mine", pattern, lambda a, b, c: a + b + c, "mine", lambda: RepVGGBlock2d(4, 4, 3, padding=1))
    assert "dtypes stay" in check_rule(rule)
    assert "mine" not in default
    assert structrep.plan(nn.Sequential(RepVGGBlock2d(4, 4, 3, padding=1)).eval()).merges[0].rules == ("repvgg",)


def test_rules_that_overlap() -> None:
    registry = Registry()
    a, b = conv_norm(spatial).named("a"), conv_norm().named("b")
    registry.rule(Sum(a, b), source="mine", name="wide", example=lambda: two())(lambda a, b: a + b)
    registry.rule(TWO, source="mine", name="narrow", example=lambda: two())(lambda a, b: a + b)
    other = Seq(Conv().named("a"), Norm().named("b"))
    registry.rule(other, source="mine", name="other", example=lambda: normed(nn.Conv2d(4, 4, 3)))(lambda a, b: a >> b)
    assert overlaps(registry) == [Overlap("wide", "narrow", "wide", ""), Overlap("narrow", "wide", "wide", "")]
    said = Registry()
    for rule in registry:
        said.add(replace(rule, narrower_than=("wide",) if rule.name == "narrow" else ()))
    assert overlaps(said) == [
        Overlap("narrow", "wide", "narrow", "narrow"),
        Overlap("wide", "narrow", "narrow", "narrow"),
    ]
