"""What stands beside a norm that stays, and why that does not take it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set

from torch import fx, nn

from structrep.errors import Unreadable
from structrep.graph.constants import constant
from structrep.graph.facts import CALL, STORED, UNFOLLOWED, VALUE
from structrep.graph.names import layer_of
from structrep.graph.operations import does, module_does, rearranges
from structrep.graph.queries import only_asserted
from structrep.graph.table import Is
from structrep.match.absorption import readers_of
from structrep.match.channels import permutes
from structrep.modules.parametrized import hooks
from structrep.read.nodes import called
from structrep.terms.layer import Identity, Layer, Readings

_SEEN_THROUGH = (Is.MOVES, Is.AVERAGES, Is.CAST)


def isolated(readings: Readings, covered: Set[fx.Node], told: Set[str]) -> Iterator[tuple[fx.Node, str]]:
    """The norms that stay, and what each stands between.

    Args:
        covered: nodes that are part of a merge.
        told: paths of layers of which it is said already why they stay.
    """
    for node, reading in readings.items():
        if not isinstance(reading, Layer) or reading.kind != "norm" or node in covered or layer_of(node) in told:
            continue
        assert reading.source is not None
        yield node, _isolation(node, reading.source, readings)


def _isolation(node: fx.Node, source: fx.Node, readings: Readings) -> str:
    """Why a norm of what `source` gives stays: what it stands between, and what the layers beside it are."""
    ours, everyone = (readers_of(one, readings) for one in (node, source))
    others = [user for user in everyone if user is not node and not only_asserted(user)]
    also = f", which {listed(others)} {'reads' if len(others) == 1 else 'read'} too," if others else ""
    read = f" for {listed(ours)}" if ours else " and nothing reads what it gives"
    before = _before(source, others, readings)
    behind = _behind(ours, readings)
    found = [one for one in (before, *behind) if one]
    reason = "; ".join(dict.fromkeys(found)) or "there is no convolution or Linear beside it"
    return f"it scales what {named(source)} gives{also}{read}: {reason}"


def _before(node: fx.Node, others: list[fx.Node], readings: Readings) -> str:
    """What layer stands before a norm that is given a value, and why it does not take the norm; "" if none does."""
    between: list[fx.Node] = []
    while (reason := _layer(node, readings)) is None:
        reading = readings.get(node)
        inputs = [one for one in node.all_input_nodes if not VALUE.known(one)]
        if isinstance(reading, Identity):
            node = reading.source
        elif _moves(node, readings) and inputs:
            between.append(node)
            node = inputs[0]
        else:
            return ""
    if not reason and (len(readers_of(node, readings)) > 1 if between else others):
        reason = "gives its values to more than the norm"
    if not reason and STORED.get(node):
        reason = "gives its values to something that outlives the forward"
    return _told(node, "before", reason, between)


def _behind(ours: list[fx.Node], readings: Readings) -> Iterator[str]:
    """What layers stand behind a norm, and why they do not take it."""
    pending: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(user, ()) for user in ours]  # and what stands between
    seen = set(ours)
    while pending:
        user, between = pending.pop(0)
        reason = _layer(user, readings)
        if reason is not None:
            alone = len(ours) == 1 or all(_layer(one, readings) is not None for one in ours)
            yield _told(user, "behind", reason or ("" if alone else "is not all that reads the norm"), between)
        elif _moves(user, readings):
            users = [one for one in readers_of(user, readings) if one not in seen]
            seen.update(users)
            pending += [(one, (*between, user)) for one in users]


def _layer(node: fx.Node, readings: Readings) -> str | None:
    """Why a convolution or Linear is not read as one, "" if it is; None for what is none."""
    if node.op == "call_module":
        module = CALL.of(node).module
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            return None
        if node in readings:
            return ""
        if hooks(module):
            return "has a hook"
        if UNFOLLOWED.of(node):
            return "is not followed"
        try:
            called(node)
        except Unreadable:
            return "computes its weights, and they are no constants"
        given = [*(["more than its input"] if len(node.args) > 1 else []), *(f"{name}=" for name in node.kwargs)]
        return f"is called with {' and '.join(given)}" if given else "is not read as one map"
    if not does(node, Is.KERNEL):
        return None
    fixed = all(constant(one) is not None or one is None for one in node.args[1:3] if isinstance(one, fx.Node))
    return "" if node in readings else "is not read as one map" if fixed else "has a kernel that depends on the input"


def _moves(node: fx.Node, readings: Readings) -> bool:
    """Whether a node moves, pads, averages or casts numbers and does nothing else to them."""
    reading = readings.get(node)
    if isinstance(reading, Layer):
        return reading.moves or reading.kind == "pool"
    if node.op == "call_module":
        return any(module_does(CALL.of(node).module, what) for what in _SEEN_THROUGH)
    return permutes(node) or rearranges(node) or any(does(node, what) for what in _SEEN_THROUGH)


def _told(layer: fx.Node, where: str, reason: str, between: Iterable[fx.Node]) -> str:
    names = list(dict.fromkeys(map(kind_of, between)))
    if names:
        standing = f"{' and '.join(names)} stand{'s' * (len(names) == 1)} between"
        return f"{named(layer)} is {where} it, but {standing}{f', and it {reason}' * bool(reason)}"
    return f"{named(layer)}, {where} it, {reason or 'is in no merge with it'}"


def kind_of(node: fx.Node) -> str:
    """What a node is, and where: a module by its type and name."""
    return f"{named(node)} ({type(CALL.of(node).module).__name__})" if node.op == "call_module" else named(node)


def named(node: fx.Node) -> str:
    """What a node is called in the user's code."""
    if node.op == "call_module":
        return str(node.target)
    if node.op == "placeholder":
        return "the input"
    if node.target is getattr:
        return str(node.args[1])
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))


def listed(nodes: list[fx.Node]) -> str:
    """The names of some nodes, in a sentence."""
    names = sorted({named(node) for node in nodes if node.op != "output"}) or ["the output"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
