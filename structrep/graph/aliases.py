"""What looks at the same memory in a graph, and what writes to it."""

from __future__ import annotations

from torch import fx

from structrep.graph.facts import VALUE
from structrep.graph.operations import shares, writes


def aliases(node: fx.Node) -> set[fx.Node]:
    """A node and all values that may look at the same memory: those made of it, and those of what it was made of. What
    a method is given may be one tensor under several names."""
    found, pending = {node}, [node]
    while pending:  # what it may look at
        sources = {one for one in shares(pending.pop()) if not VALUE.known(one)} - found
        found |= sources
        pending += sources
    if any(one.op == "placeholder" for one in found):
        found |= {*node.graph.find_nodes(op="placeholder")}
    pending = list(found)
    while pending:
        one = pending.pop()
        views = {user for user in one.users if one in shares(user)} - found
        found |= views
        pending += views
    return found


def writers(same: set[fx.Node]) -> set[fx.Node]:
    """What overwrites one of some values, or may."""
    users = {user for alias in same for user in alias.users}
    return {user for user in users if not writes(user).isdisjoint(same)}
