"""One property: the deploy model equals the original in float64, or nothing was changed.

`make test` runs a few programs, the same ones each time; `make fuzz N=20000` runs others.
"""

from __future__ import annotations

import copy
import os

import torch
import torch.utils._pytree as pytree
from hypothesis import HealthCheck, given, note, settings

import structrep
from tests.law.fuzz.programs import Program, programs

COUNT = int(os.environ.get("N", "0"))
TOLD = object()
EXACT = 1e-11  # of the largest value on the way


def ran(model, inputs, method="forward", **flags):
    """All outputs, and the inputs as they are afterwards; None if the model takes no such inputs, or says that it was
    not made for what it is set to, or given."""
    given_ = [x.clone() for x in inputs]
    try:
        with torch.no_grad():
            found = (model if method == "forward" else getattr(model, method))(*given_, **flags)
    except ValueError as error:
        return TOLD if "reparameterized for" in str(error) else None
    except RuntimeError:
        return None
    return [*pytree.tree_leaves(found), *given_]


def changed(model, kind, name, later):
    """A copy in which modules of a class have another setting."""
    copied = copy.deepcopy(model)
    for part in copied.modules():
        if any(cls.__name__ == kind for cls in type(part).__mro__):
            setattr(part, name, later)
    return copied


def compare(program, plan, before, after):
    """Raise unless outputs are the same but for rounding."""
    peak = max([program.peak, *(float(t.abs().max()) for t in before if t.numel())])
    assert len(before) == len(after)
    for one, two in zip(before, after, strict=True):
        assert one.shape == two.shape
        gap = float((one - two).abs().max()) if one.numel() else 0.0
        assert gap <= EXACT * peak, f"off by {gap:.1e}, values are up to {peak:.1e}; {plan}"


def check(program: Program) -> int:
    """Convert, compare, and say how many merges there were."""
    model = program.make()
    state = copy.deepcopy(model.state_dict())
    inputs = program.inputs()
    truth = ran(copy.deepcopy(model), inputs)
    if truth is None:
        return 0  # its steps could be taken one by one, but torch writes to no value that overlaps with another
    merges = 0
    for example in (None, tuple(inputs)):
        plan = structrep.plan(model, example)
        deploy = plan.apply()
        merges += len(plan.merges)
        for more in (0, 1, 2):
            before, after = (ran(copy.deepcopy(one), program.inputs(more)) for one in (model, deploy))
            if before is None:
                continue
            if after is None and more and any(merge.sizes for merge in plan.merges):
                continue  # it says that it does not hold for these sizes
            assert after not in (None, TOLD), "the deploy model takes less than the original"
            compare(program, plan, before, after)
        for kind, name, later in program.settings:
            both = [changed(one, kind, name, later) for one in (model, deploy)]
            before, after = (ran(one, inputs) for one in both)
            if before is not None and after is not TOLD:
                assert after is not None, f"{name} = {later}: the deploy model takes less than the original"
                compare(program, plan, before, after)
        for flag in program.flags:
            before, after = (ran(copy.deepcopy(one), inputs, **{flag: True}) for one in (model, deploy))
            if before is not None and after is not TOLD:
                assert after is not None, f"{flag}=True: the deploy model takes less than the original"
                compare(program, plan, before, after)
        for method in program.others:
            before, after = (ran(copy.deepcopy(one), inputs, method) for one in (model, deploy))
            if before is not None and after is not TOLD:
                assert after is not None, f"{method}: the deploy model takes less than the original"
                compare(program, plan, before, after)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)
    return merges


@settings(
    max_examples=COUNT or 60,
    derandomize=not COUNT,
    database=None,
    suppress_health_check=list(HealthCheck),
    deadline=None,
)
@given(programs())
def test_the_deploy_model_equals_the_original_or_nothing_was_changed(program: Program):
    note(repr(program))
    check(program)
