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
EXACT = 1e-11  # of the largest value on the way


def ran(model, inputs):
    """All outputs, and the inputs as they are afterwards; None if the model takes no such inputs."""
    given_ = [x.clone() for x in inputs]
    try:
        with torch.no_grad():
            found = model(*given_)
    except (RuntimeError, ValueError):
        return None
    return [*pytree.tree_leaves(found), *given_]


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
            assert after is not None, "the deploy model takes less than the original"
            peak = max([program.peak, *(float(t.abs().max()) for t in before if t.numel())])
            for one, two in zip(before, after, strict=True):
                assert one.shape == two.shape
                gap = float((one - two).abs().max()) if one.numel() else 0.0
                assert gap <= EXACT * peak, f"off by {gap:.1e}, values are up to {peak:.1e}; {plan}"
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)
    return merges


@settings(
    max_examples=COUNT or 120,
    derandomize=not COUNT,
    database=None,
    suppress_health_check=list(HealthCheck),
    deadline=None,
)
@given(programs())
def test_the_deploy_model_equals_the_original_or_nothing_was_changed(program: Program):
    note(repr(program))
    check(program)
