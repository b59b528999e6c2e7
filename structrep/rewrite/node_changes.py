"""What changes in forwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import fx

from structrep.errors import Unreadable
from structrep.graph.calls import Call
from structrep.match.sum_order import Reordered


@dataclass
class NodeChanges:
    """What becomes of the nodes of the flat graph in the forwards that are written."""

    dead: set[fx.Node] = field(default_factory=set)
    replaced: dict[fx.Node, tuple[fx.Node, str]] = field(default_factory=dict)  # root -> base and path of the new layer
    bypassed: dict[fx.Node, fx.Node] = field(default_factory=dict)  # root -> base
    units: dict[fx.Node, tuple[Call, tuple[fx.Node, ...]]] = field(
        default_factory=dict
    )  # root of either -> in whose forward,
    # and all that vanishes with it
    refilled: dict[fx.Node, tuple[fx.Node, str]] = field(default_factory=dict)  # a functional call in a convolution's
    # own forward -> base and path of that convolution, which keeps its place and holds `weight` and `bias`
    ended: set[fx.Node] = field(default_factory=set)  # functional norms that give up their weight and bias
    reordered: set[Reordered] = field(default_factory=set)  # sums that are written in the order that they have now
    owners: dict[Call, set[Call]] = field(default_factory=dict)  # whose forward changes -> calls to write out inside it
    vanishing: set[fx.Node] = field(default_factory=set)  # values that will be others, or none
    turned: set[fx.Node] = field(default_factory=set)  # those of them with channels in an order of their own
    layers: set[str] = field(default_factory=set)  # paths of layers that are merged
    homes: dict[str, str] = field(default_factory=dict)  # path of a tensor that is merged -> of the layer that has it

    @property
    def changed(self) -> set[fx.Node]:
        """The nodes that are not written as they are."""
        return {*self.dead, *self.replaced, *self.bypassed, *self.refilled, *self.ended, *self.vanishing}

    def carried(self, same: Mapping[fx.Node, fx.Node]) -> NodeChanges:
        """These changes in one forward that was followed again.

        Args:
            same: what does there what these nodes do.
        """
        return replace(
            self,
            dead={same[n] for n in self.dead if n in same},
            replaced={same[n]: (same[b], path) for n, (b, path) in self.replaced.items() if n in same and b in same},
            bypassed={same[n]: same[b] for n, b in self.bypassed.items() if n in same and b in same},
            refilled={same[n]: (same[b], path) for n, (b, path) in self.refilled.items() if n in same and b in same},
            ended={same[n] for n in self.ended if n in same},
            owners={},
            vanishing={same[n] for n in self.vanishing if n in same},
            turned={same[n] for n in self.turned if n in same},
        )

    def new_weight(self, call: Call) -> str:
        """As code, the weight of a merged layer that is new in the module of a call; "" if there is none."""
        around = f"{call.path}." if call.path else ""
        paths = (path.removeprefix(around) for _, path in self.replaced.values() if path.startswith(around))
        new = next((name for name in paths if "." not in name), None)
        return f"self.{new}.weight" if new is not None else ""

    def first_left(self, call: Call) -> str:
        """As code, the first of the parameters that the module of a call is left with.

        Raises:
            Unreadable: it is left with none.
        """
        around = f"{call.path}." if call.path else ""
        held = (f"{around}{name}" for name, _ in call.module.named_parameters())
        if not any(self.homes.get(name, name).startswith(around) for name in held):
            raise Unreadable(f"{call.path or 'the model'} asks for its first parameter, and would be left without any")
        return "next(self.parameters())"
