"""Values that are overwritten, which a merged layer would read before or after they are."""

from __future__ import annotations

from torch import fx

from structrep.errors import Mutated
from structrep.graph.aliases import aliases, writers
from structrep.graph.facts import INDEX


class Writes:
    """What looks at the memory of the values of a graph, and what writes to it."""

    def __init__(self) -> None:
        self.known: dict[fx.Node, tuple[set[fx.Node], set[fx.Node]]] = {}

    def check(self, base: fx.Node, root: fx.Node, inside: set[fx.Node]) -> None:
        """Raise if a merge that reads a value would change what others find there, or find something else itself.

        Args:
            base: the value.
            root: where the merged layer is run.
            inside: what it takes the place of.

        Raises:
            Mutated: something writes to the value.
        """
        same, writing = self._memory(base)
        for writer in writing:
            at = INDEX.of(writer)
            readers = (user for alias in same for user in alias.users)
            if writer in inside and any(INDEX.of(other) > at for other in readers if other not in inside):
                raise Mutated(f"{writer.name} overwrites the input of the merge, which is read again later")
            if writer in inside and any(alias.op == "placeholder" for alias in same):
                raise Mutated(f"{writer.name} writes to what the model is given, which its caller may look at again")
            if writer not in inside and at < INDEX.of(root) and any(INDEX.of(n) < at for n in inside):
                raise Mutated(f"{writer.name} overwrites the input of the merge before the merged layer would read it")

    def _memory(self, base: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
        """What looks at the memory of a value, and what writes to it; once for all branches that read it."""
        if base not in self.known:
            same = aliases(base)
            self.known[base] = same, writers(same)
        return self.known[base]
