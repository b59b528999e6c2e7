"""The calls that a user makes."""

from __future__ import annotations

import fnmatch

from torch import nn

from structrep import process
from structrep.algebra import precision
from structrep.blocks.places import expand_layers
from structrep.convert.options import Cost, Layers, Names, Norms, Options, Rules
from structrep.convert.plan import IN_TORCH, Plan
from structrep.convert.probed import probed, unmerged_adapters
from structrep.convert.selection import select
from structrep.errors import BadInput, Unmerged, listed
from structrep.graph.observed import Observed
from structrep.guard.ready import check_ready
from structrep.match.find import find
from structrep.match.findings import Findings
from structrep.modules.arguments import Example
from structrep.modules.copies import eval_copy, shallow_copy
from structrep.modules.parametrized import uncached
from structrep.modules.wrappers import adapting, excluded, settle, unwrapped
from structrep.prove.run import observe
from structrep.records.base import counted
from structrep.records.plan import Explanation
from structrep.registry import resolve


def plan(
    model: nn.Module,
    example_inputs: Example | None = None,
    *,
    rules: Rules = None,
    inexact_borders: Names = (),
    probe: Layers = (),
    reserve: Names = (),
    norms: Norms = "fold",
    cost: Cost = "counted",
) -> Plan:
    """Find every merge in a model, and say of the others why not. The model is not changed.

    Example:
        >>> structrep.plan(model, torch.randn(1, 3, 224, 224)).merges[0].rules
        ('repvgg',)

    Args:
        model: any module in eval mode. What torch wraps around a model to train or compile it (DataParallel,
            DistributedDataParallel, `torch.compile`) is seen through: the plan is for the model inside. So is what
            `peft` puts around a model or a part of it (PeftModel, PeftMixedModel, a bare tuner such as LoraModel),
            whose own methods would no longer be right. Of a program of `torch.export` it is for a graph module of its
            own.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments; tells shapes, which some
            merges need, and how parts are called by code that cannot be followed.
        rules: a registry, or names of registered rules and rules; all registered ones by default.
        inexact_borders: names of modules, or globs, whose merges may differ where they read outside their input, if
            nothing else helps; the plan says of each how many output pixels differ and by how much.
        probe: names of layers, globs, or types, whose code cannot be read: what they are is found out by
            `structrep.probe`, on inputs like those that the example inputs give them.
        reserve: names of blocks, or globs, whose residual is carried through their activations in channels of its own,
            so that no addition is left (RMNet, arXiv:2111.00687). Their layers take more multiply-adds than before.
        norms: "keep" merges nothing but the blocks that `structrep.expand` has put into a model, each into the layer
            that it stands for, and puts norms back that stood behind: the model that there was, trained.
        cost: what decides whether a merge pays. "counted": multiply-adds and stored numbers. "measured": the time that
            both forms take, on the example inputs and their device; what is slower merged is left as it is, or merged
            in part, and the whole model is never slower than with all merges or with none. A `structrep.Measured` says
            in which runtime, and where timings are kept.

    Raises:
        TrainingMode: a norm has no fixed scale yet.
        Uninitialized: a lazy parameter has no value yet.
        Sharded: parameters are spread over processes (FSDP).
        UnknownRule: a name in `rules` is not registered.
        BadInput: the model rejects the example inputs; a setting is none that there is, or names no module;
            `cost="measured"` or `probe` without example inputs; `norms="keep"` without blocks of `expand`.
    """
    options = Options.of(
        rules=rules, inexact_borders=inexact_borders, probe=probe, reserve=reserve, norms=norms, cost=cost
    )
    made = planned(model, example_inputs, options)
    for merge in made.merged.values():
        merge.cached = None  # weights may be written to before the plan is applied
    return made


@uncached()
def planned(model: nn.Module, example_inputs: Example | None, options: Options) -> Plan:
    """`plan`, with merged maps at hand."""
    options.demand(example_inputs)
    registry = resolve(options.rules)
    wrapper = adapting(model)
    given = model = unwrapped(model)
    check_ready(model)
    if settle(model, change=False):
        model = shallow_copy(model)
        settle(model)
    named = {one: _named(model, one) for one in options.chosen}
    observed = Observed()
    if example_inputs is not None:
        observed = observe(model, example_inputs, {path for one in options.probe for path in named[one]})
        example_inputs = observed.inputs
    maps, refused = probed(model, observed)
    blocks = tuple(expand_layers(model)) if options.norms == "keep" else ()
    if options.norms == "keep" and not blocks:
        raise BadInput(
            "norms='keep' gives back a model that structrep.expand has made, and in this one is no such block"
        )
    with process.same_chance(), process.room(), precision.whole():  # a forward may draw numbers
        kept = excluded(model)

        def found() -> Findings:
            return find(
                model,
                example_inputs,
                registry,
                inexact_borders=options.inexact_borders,
                probed=maps,
                beforehand=refused,
                blocks=blocks,
                observed=observed,
                excluded=kept,
            )

        selection = select(found(), options.reserve)
        if example_inputs is not None and (left := unmerged_adapters(model, selection)):
            more, why = probed(model, observe(model, example_inputs, left))
            maps, refused = {**more, **maps}, [*refused, *why]
            selection = select(found(), options.reserve)
    measured = None if options.cost == "counted" else IN_TORCH if options.cost == "measured" else options.cost
    plan = Plan(model, selection, measured, given, wrapper)
    if example_inputs is None or measured is None:
        return plan
    with process.same_chance():
        return plan.faster(example_inputs)


def _named(model: nn.Module, one: str | type[nn.Module]) -> list[str]:
    """The modules of that name, of names that match it, or of that type.

    Raises:
        BadInput: there are none.
    """
    if isinstance(one, type):
        found = [path for path, module in model.named_modules() if path and isinstance(module, one)]
        what = f"of type {one.__name__}"
    else:
        found, what = fnmatch.filter([path for path, _ in model.named_modules() if path], one), f"named {one!r}"
    if not found:
        raise BadInput(f"the model has no module {what}")
    return found


def explain(
    model: nn.Module, first: str, second: str, example_inputs: Example | None = None, *, rules: Rules = None
) -> Explanation:
    """Why two layers of a model, by their names, do not merge: what stands between them, which law forbids it and what
    would help, what each family's pattern wants that is not there.

    Examples:
        >>> print(structrep.explain(model, "layer1.0.conv1", "layer1.0.conv2"))

    Args:
        first, second: paths of two modules, as `model.named_modules()` has them.
        example_inputs, rules: as for `plan`.

    Raises:
        BadInput: the model has no module of that name.
        TrainingMode, Uninitialized, Sharded, UnknownRule: as for `plan`.
    """
    return plan(model, example_inputs, rules=rules).why(first, second)


def reparameterize(
    model: nn.Module,
    example_inputs: Example | None = None,
    *,
    rules: Rules = None,
    inexact_borders: Names = (),
    probe: Layers = (),
    reserve: Names = (),
    norms: Norms = "fold",
    cost: Cost = "counted",
    inplace: bool = False,
    verify: bool = True,
) -> nn.Module:
    """The equal model with every branch merged: the same class, methods and names, fewer layers.

    Example:
        >>> deploy = structrep.reparameterize(model.eval(), torch.randn(1, 3, 224, 224))

    Args:
        model, example_inputs, rules, inexact_borders, probe, reserve, norms, cost: as for `plan`.
        inplace: change the model itself instead of a copy.
        verify: prove every merge on its region in float64 and, with example inputs, the whole model against its
            float64 self; the latter not if a border is inexact because you allowed it.

    Warns:
        MergeDropped: a merge failed its proof, so it is not done; the rest is.
        NothingMerged: there is nothing to merge.

    Raises:
        Unmerged: a block of `structrep.expand` cannot be merged, with norms="keep"; the model is as it was.
        VerificationError: the deploy model is farther from the truth than rounding explains; with `inplace`, the
            model is then as it was.
        TrainingMode, Uninitialized, Sharded, UnknownRule, BadInput: as for `plan`.
    """
    options = Options.of(
        rules=rules, inexact_borders=inexact_borders, probe=probe, reserve=reserve, norms=norms, cost=cost
    )
    made = planned(model, example_inputs, options)
    return made.reparameterize(example_inputs, inplace=inplace, verify=verify)


def assert_merged(model: nn.Module, example_inputs: Example | None = None, *, rules: Rules = None) -> None:
    """Fail if there is anything left to merge in a model that is about to be exported: for a pipeline's own tests.

    Examples:
        >>> structrep.assert_merged(deploy)

    Args:
        model: in training mode too; it is not changed.
        example_inputs, rules: as for `plan`.

    Raises:
        Unmerged: there is, with the layers, and what they would be merged by.
        Uninitialized, Sharded, UnknownRule, BadInput: as for `plan`.
    """
    planned = plan(eval_copy(unwrapped(model)), example_inputs, rules=rules)
    if planned.merged:
        planned.prove()  # what is never done is not left to do
    if left := planned.merges:
        raise Unmerged(
            f"{type(unwrapped(model)).__name__} has {counted(len(left), 'merge')} left to do: "
            f"{listed(f'{merge.where} ({merge.before})' for merge in left)}. Export "
            f"structrep.reparameterize(model)"
        )
