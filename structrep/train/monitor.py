"""What the blocks of a model in training are to become: what each branch is worth, and how the merged kernels fare in
eight bits.

logger.log(structrep.monitor(model).scalars())
"""

from __future__ import annotations

from torch import nn

from structrep.convert.calls import plan
from structrep.convert.options import Rules
from structrep.modules.arguments import Example
from structrep.modules.copies import eval_copy
from structrep.modules.wrappers import unwrapped
from structrep.records.kernels import MonitorRecord
from structrep.report.kernels import DEAD, kernel


def monitor(
    model: nn.Module, example_inputs: Example | None = None, *, rules: Rules = None, dead: float = DEAD
) -> MonitorRecord:
    """Each merged kernel that the model would have now, and what its branches do for it. The model may be in training
    mode, and is not changed; norms count with their running statistics.

    Args:
        example_inputs, rules: as for `structrep.plan`.
        dead: a branch is dead if the norm of its kernel is less than that, relative to the merged kernel's.

    Raises:
        Uninitialized, Sharded, UnknownRule, BadInput: as for `structrep.plan`.
    """
    found = plan(eval_copy(unwrapped(model)), example_inputs, rules=rules)
    return MonitorRecord(
        model=type(unwrapped(model)).__name__,
        kernels=tuple(kernel(where, merge, dead) for where, merge in found.merged.items()),
    )
