"""A conformance suite for rules: what structrep's own rules are held to, for yours.

from structrep.testing import check_rule

def test_my_rule():
    check_rule(structrep.registry.default["my_rule"])
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structrep import process
from structrep.convert.calls import plan
from structrep.convert.plan import Plan
from structrep.errors import BrokenRule, TrainingMode
from structrep.match.find import find
from structrep.pattern.base import layers_in
from structrep.prove.run import relative_error
from structrep.registry import Registry, Rule, default
from structrep.terms.term import geometry
from structrep.trace.follow import trace

EXACT = 1e-11  # in float64, relative to the largest output
SEEDS = 3


def check_rule(rule: Rule) -> list[str]:
    """Hold a rule to what it says, on its own examples.

    Checked are: that it can be registered and says its source; that its example merges under its name, by this rule
    alone, to one layer, for several random weights; that the merged layer gives what the example gives in float64, on
    the smallest inputs and on odd and even ones, copied or in place; that dtypes stay; that nothing is left to merge
    afterwards; that a norm in training mode is an error; that a hook inside is not merged over; that weights that are
    no numbers are left; and that its counter-examples are refused as it says.

    Examples:
        >>> @pytest.mark.parametrize("rule", my_registry, ids=lambda rule: rule.name)
        ... def test_rules(rule):
        ...     check_rule(rule)

    Returns:
        What was checked, in words.

    Raises:
        BrokenRule: one of these does not hold; says which, on what, and what was found instead.
        InvalidRule: it cannot be registered.
    """
    return list(_checks(rule))


def _checks(rule: Rule) -> Iterator[str]:
    Registry().add(rule)
    if rule.example is None:
        raise _broken(rule, "it has no example: give example=lambda: MyBlock(8, 8), a small module of its structure")
    yield "it can be registered, and says its source"
    for seed in range(SEEDS):
        model = _settled(rule, rule.example, seed)
        found = _merged(rule, model)
        compared = [_compare(rule, model, found.apply(), shape) for shape in _shapes(rule, found)]
        if not any(compared):
            raise _broken(
                rule,
                f"its example takes no input of {_shapes(rule, found)[-1]} or smaller: say of which, example_shape=",
            )
    yield f"its example merges under its name and gives the same on all sizes, for {SEEDS} random weights"
    for name in rule.narrower_than:
        if name in default and not _matches(default[name], found):
            raise _broken(rule, f"it says that it is narrower than {name}, which does not match its example at all")
    deploy = found.apply()
    layers = [m for m in deploy.modules() if list(m.parameters(recurse=False))]
    if len(layers) != 1:
        raise _broken(rule, f"its example does not become one layer: {len(layers)} with parameters are left\n{deploy}")
    if plan(deploy, rules=[rule]).merges:
        raise _broken(rule, "it matches its own output, so that a model would be merged again and again")
    yield "what it gives is one layer, which it does not match again"
    twin = copy.deepcopy(model)
    _compare(rule, model, plan(twin, rules=[rule]).apply(inplace=True), _shapes(rule, found)[-1])
    yield "in place it gives the same"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        kinds = {p.dtype for p in plan(copy.deepcopy(model).to(dtype), rules=[rule]).apply().parameters()}
        if kinds != {dtype}:
            raise _broken(rule, f"in {dtype} its example becomes a layer of {kinds}")
    yield "dtypes stay"
    _check_refusals(rule, model)
    yield "norms in training mode, hooks and weights that are no numbers are not merged over"
    for kind, make in rule.counter_examples:
        _check_counter_example(rule, kind, make)
        yield f"a counter-example is refused: {kind or 'its pattern passes it by'}"


@dataclass(frozen=True)
class Overlap:
    """Two rules that one block fits.

    Args:
        rule: whose example the block is.
        other: which matches it too.
        credited: what a plan calls it that has both.
        narrower: which of the two says that it is narrower than the other, "" where the order of registration decides.
    """

    rule: str
    other: str
    credited: str
    narrower: str


def overlaps(registry: Registry) -> list[Overlap]:
    """All pairs of families in a registry of which one matches the example of the other, in the order of the registry.

    Examples:
        >>> [one for one in overlaps(structrep.registry.default) if not one.narrower]
        []

    Raises:
        BrokenRule: an example cannot be made.
    """
    found: list[Overlap] = []
    families = [rule for rule in registry if not rule.law]
    for rule in families:
        if rule.example is None:
            continue
        model = _settled(rule, rule.example, 0)
        alone = plan(model, rules=[rule])
        for other in families:
            if other is not rule and _matches(other, alone):
                both = [one for one in families if one in (rule, other)]
                merges = plan(model, rules=registry.select(both)).merges
                credited = " + ".join(dict.fromkeys(name for merge in merges for name in merge.rules))
                says = [one.name for one in both if registry.wider_than(one) & {rule.name, other.name}]
                found.append(Overlap(rule.name, other.name, credited, *says or [""]))
    return found


def _matches(rule: Rule, found: Plan) -> bool:
    """Whether a rule's pattern matches something that a plan merges."""
    return any(rule.match(term) is not None for term in found.terms)


def _broken(rule: Rule, what: str) -> BrokenRule:
    return BrokenRule(f"rule {rule.name!r}: {what}")


def _settled(rule: Rule, make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A module in a sequence, in float64 and eval mode, with weights as training leaves them."""
    with process.same_chance(cuda=True):
        torch.manual_seed(seed)
        try:
            module = make()
        except Exception as error:
            raise _broken(rule, f"its example cannot be made: {type(error).__name__}: {error}") from error
        if not isinstance(module, nn.Module):
            raise _broken(rule, f"its example is a {type(module).__name__}, not a torch.nn.Module")
        model = nn.Sequential(module).double().eval()
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._NormBase) and part.running_mean is not None:
                part.running_mean.normal_(0, 0.5)
                part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def _merged(rule: Rule, model: nn.Module) -> Plan:
    found = plan(model, rules=[rule])
    if not found.merges:
        told = "".join(f"\n  {r.where}, {r.what} ({r.kind}): {r.reason}" for r in found.refusals if r.rule == rule.name)
        raise _broken(rule, f"its example does not merge:{told or _nowhere(rule, model)}\n{model}")
    found.prove()
    wrong = [r for r in found.refusals if r.kind == "WrongMerge"]
    if wrong:
        raise _broken(rule, f"its merge is wrong: {wrong[0].reason}")
    return found


def _nowhere(rule: Rule, model: nn.Module) -> str:
    """That a pattern is nowhere in a model: the term in it that comes nearest, and what keeps that from matching."""
    terms = [
        stretch.term
        for segments, nodes in ((one.segments, one.readings) for one in find(model, None, Registry()).searches)
        for node in nodes
        if not segments.is_addend(node)
        for stretch in segments.stretches(node)
    ]
    said = f"\n  its pattern, {rule.pattern}, is nowhere in it"
    if not terms:
        return f"{said}, where no layer is read"
    term = min(terms, key=lambda one: (rule.pattern.miss(one).parts, -layers_in(one)))
    return f"{said}; nearest comes\n  {term}\n  {rule.pattern.miss(term)}"


def _shapes(rule: Rule, found: Plan) -> list[tuple[int, ...]]:
    """Inputs for the layer that an example became: one of the smallest size, odd ones, even ones."""
    if rule.example_shape is not None:
        return [rule.example_shape]
    (first, *_) = found.terms
    shape = geometry(first)
    if not shape.dims:
        return [(1, shape.in_channels), (3, shape.in_channels), (2, 5, shape.in_channels)]
    least = [max(1, 1 - over, max(pad) + 1) for over, pad in zip(shape.overhang, shape.pad, strict=True)]
    return [
        (batch, shape.in_channels, *(n + more + index * (more > 0) for index, n in enumerate(least)))
        for batch, more in ((1, 0), (2, 3), (3, 8))
    ]


def _compare(rule: Rule, model: nn.Module, deploy: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether the model takes an input of that shape; raises if the other then gives anything else."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        try:
            truth = model(x)
        except (RuntimeError, ValueError):
            return False  # too small for the layers as they were
        try:
            value: Tensor = deploy(x)
        except (RuntimeError, ValueError) as error:
            raise _broken(rule, f"merged, its example does not take an input of shape {shape}: {error}") from error
    if truth.shape != value.shape:
        raise _broken(rule, f"on {shape} its example gives {tuple(truth.shape)}, merged {tuple(value.shape)}")
    error_ = relative_error(value, truth)
    if not error_ <= EXACT:
        raise _broken(rule, f"on {shape} its example and what it merges to differ by {error_:.1e}, relative")
    return True


def _check_refusals(rule: Rule, model: nn.Module) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    if norms:
        training = copy.deepcopy(model).train()
        try:
            plan(training, rules=[rule])
        except TrainingMode:
            pass
        else:
            raise _broken(rule, "its example in training mode is merged, where its norms have no fixed scale")
    leaves = [path for path, m in model.named_modules() if not list(m.children()) and list(m.parameters())]
    called = {call.path for calls in trace(model).calls.values() for call in calls}
    for leaf in [path for path in leaves if path in called][:1]:  # a kernel may be held by a layer that never runs
        hooked = copy.deepcopy(model)
        hooked.get_submodule(leaf).register_forward_hook(lambda module, args, output: output)
        kept = plan(hooked, rules=[rule]).apply()
        if not kept.get_submodule(leaf)._forward_hooks:
            raise _broken(rule, f"a layer with a hook, {leaf}, was merged away")
    broken = copy.deepcopy(model)
    next(p for p in broken.get_submodule(leaves[0]).parameters()).data.flatten()[0] = float("nan")
    kept = plan(broken, rules=[rule]).apply()
    if type(kept.get_submodule(leaves[0])) is not type(model.get_submodule(leaves[0])):
        raise _broken(rule, f"a layer with a weight that is no number, {leaves[0]}, was merged away")


def _check_counter_example(rule: Rule, kind: str, make: Callable[[], nn.Module]) -> None:
    model = _settled(rule, make, 0)
    found = plan(model, rules=[rule])
    if found.merges:
        what = found.merges[0].before
        raise _broken(
            rule, f"a counter-example, which was to be refused ({kind or 'passed by'}), merges: {what}\n{model}"
        )
    kinds = {refusal.kind for refusal in found.refusals if refusal.rule == rule.name}
    if kind and kind not in kinds:
        raise _broken(rule, f"a counter-example was to be refused as {kind}, and is as {sorted(kinds) or 'nothing'}")
