"""What a trace follows, and what it keeps whole."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from types import FunctionType

import torch
from torch import fx, nn

from structrep.graph.structures import is_torch
from structrep.modules import parametrized
from structrep.read.modules import generated, knows


@dataclass(frozen=True)
class Policy:
    """How far a trace goes into what is called.

    Args:
        root: the module that is traced.
        opaque: types of modules that are kept whole.
        whole: functions that are.
        followed: functions that cannot be.
        assumed: types of modules that are followed where conditions do not hold of which nothing tells whether they do.
    """

    root: nn.Module
    opaque: Set[type[nn.Module]] = frozenset()
    whole: Set[FunctionType] = frozenset()
    followed: Set[FunctionType] = frozenset()
    assumed: Set[type] = frozenset()
    hooked: Set[nn.Module] = field(init=False)  # parts with hooks, which are kept whole

    def __post_init__(self) -> None:
        parts = (m for m in self.root.modules() if m is not self.root)
        object.__setattr__(self, "hooked", {m for m in parts if parametrized.hooks(m)})

    def keeps(self, m: nn.Module) -> bool:
        """Whether the call of a module is one node."""
        library = is_torch(parametrized.own_class(m))
        return (
            type(m) in self.opaque
            or isinstance(m, torch.jit.ScriptModule)
            or m in self.hooked
            or knows(m)
            or (library and not isinstance(m, nn.Sequential) and not generated(m))
        )

    def hides(self, node: fx.Node, m: nn.Module | None) -> bool:
        """Whether a node, made in a call of a module, is code that was kept whole, and not a layer."""
        if node.target in self.whole or isinstance(node.target, torch.jit.ScriptFunction):
            return True
        if node.op != "call_module" or m is None:
            return False
        return m in self.hooked or isinstance(m, torch.jit.ScriptModule) or (type(m) in self.opaque and not knows(m))
