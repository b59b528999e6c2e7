"""One node of a graph as a reading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from structrep.algebra import ConvMap, Ints
from structrep.errors import Refusal, Unreadable
from structrep.graph.facts import ASSIGNED, CALL, COMPUTED, DTYPE, FORMULA, VALUE
from structrep.graph.shapes import rank, spatial_size
from structrep.modules.parametrized import hooks, plain
from structrep.read.arguments import CALLS, Arguments, NotConstant
from structrep.read.modules import IDENTITIES, POOLS, knows, read_module, settings
from structrep.terms.layer import Blend, Computed, Formula, Identity, Layer, Reading
from structrep.terms.layers import adaptive_pool_layer, numbers_in, pool_layer


def read_node(node: fx.Node) -> Reading | None:
    """One node of a traced graph; None where it is no linear operation of its inputs.

    Raises:
        Unreadable: a known layer, but without fixed coefficients.
    """
    if node.op == "call_module":
        return _read_call(node)
    if node.op not in ("call_function", "call_method"):
        return None
    reader = CALLS.get(node.target.strip("_") if isinstance(node.target, str) else node.target)
    if reader is None:
        return None
    if node.kwargs.get("out") is not None:
        return None
    try:
        reading = reader(Arguments(node, read_node))
    except (NotConstant, TypeError):  # a size that depends on the input
        return None
    if isinstance(reading, Blend):
        return _blended(reading, node)
    if not isinstance(reading, Layer):
        return reading
    source = reading.source or node.all_input_nodes[0]
    if reading.kind == "table":
        return _placed(reading, node)
    if DTYPE.known(source) and not (DTYPE.of(source).is_floating_point or DTYPE.of(source).is_complex):
        return None  # what turns integers into floats; a layer that it was merged into would take none
    if reading.kind == "affine" and not reading.through:
        scale = _of_as_many_dims(reading, source, node)
        return None if scale is None else _placed(scale, node)
    return _placed(reading, node)


def _blended(blend: Blend, node: fx.Node) -> Blend | None:
    parts = [(source, _of_as_many_dims(scale, source, node)) for source, scale in blend.parts]
    kept = tuple((source, scale) for source, scale in parts if scale is not None)
    return Blend(kept) if len(kept) == len(parts) else None


def _of_as_many_dims(scale: Layer, source: fx.Node, node: fx.Node) -> Layer | None:
    """A scale by the constants of a node; None if these add dims to what is scaled."""
    held = [VALUE.of(n).ndim for n in node.all_input_nodes if isinstance(VALUE.get(n), Tensor)]
    known, most = rank(source), max(held, default=0)
    if known is None:
        return _within(scale, most)
    return None if most > known else scale


def hands_on(node: fx.Node) -> fx.Node | None:
    """What a node gives back as it is; None if it does something."""
    try:
        reading = read_node(node)
    except Refusal:  # a norm of each batch
        return None
    return reading.source if isinstance(reading, Identity) else None


def _within(scale: Layer, most: int) -> Layer:
    """A scale by constants of that many dims, of values that must have as many."""

    def load(c: int, d: int) -> ConvMap:
        if most > d + 2:
            raise Unreadable(f"a constant of {most} dims would add dims to a value with {d} spatial ones")
        return scale.load(c, d)

    return replace(scale, load=load)


def _placed(layer: Layer, node: fx.Node) -> Layer | None:
    """The layer at its place in a graph: one input, and constants (a view may be shown another value's shape)."""
    if layer.source is not None:  # by way of other nodes
        return replace(layer, node=node) if not VALUE.known(layer.source) else None
    inputs = [n for n in node.all_input_nodes if not VALUE.known(n)]
    if len(inputs) != 1 and layer.kind != "view":
        return None
    formulas = [FORMULA.of(n) for n in node.all_input_nodes if FORMULA.get(n)]
    if layer.weight is None or not formulas:
        return replace(layer, source=inputs[0], node=node)
    if not any(VALUE.get(n) is layer.weight and FORMULA.get(n) for n in node.all_input_nodes):
        formulas.append(Formula(frozenset(), (layer.weight,)))  # it is the bias that is computed
    plain = [VALUE.of(n) for n in node.all_input_nodes if n.op == "get_attr" and not FORMULA.get(n)]
    learned = [p for formula in formulas for p in formula.parameters]
    stored = {id(p): p.numel() for p in (*learned, *(t for t in plain if isinstance(t, Tensor)))}
    return replace(layer, source=inputs[0], node=node, formula=Formula.of(formulas), parameters=sum(stored.values()))


def _read_call(node: fx.Node) -> Reading | None:
    module = CALL.of(node).module
    if CALL.of(node).settings != settings(module):
        return None  # changed while the forward ran
    resized = is_resized(node)
    alone = resized or (len(node.args) == 1 and not node.kwargs)
    if hooks(module) or not knows(module) or not alone or not isinstance(node.args[0], fx.Node):
        return None
    if isinstance(module, IDENTITIES):
        inert = isinstance(module, nn.Identity) or not module.training or getattr(module, "p", 1) == 0
        return Identity(node.args[0]) if inert else None
    layer = _read_pool(module, spatial_size(node.args[0])) or read_module(called(node, exactly=False))
    if layer and (numbers := COMPUTED.of(node)):
        layer = replace(
            layer,
            load=lambda c, d: _map_of(called(node), c, d),
            formula=Formula.of((*(one.formula for one in numbers.values()), *_stored(module, numbers))),
            parameters=sum(p.numel() for p in module.parameters()),
        )
    if layer and (formula := ASSIGNED.of(node)):
        layer = replace(layer, formula=formula, parameters=numbers_in(*formula.parameters))
    if layer and resized:
        shape = layer.shape(layer.in_channels or 1, layer.dims or 0)
        layer = replace(layer, source=node.args[0], resized=True) if shape.transposed else None
    return _placed(layer, node) if layer else None


def is_resized(node: fx.Node) -> bool:
    """Whether a node calls a transposed convolution with the size that its output is to have."""
    module = CALL.of(node).module if node.op == "call_module" else None
    told = len(node.args) - 1 + len(node.kwargs)
    named = all(name == "output_size" for name in node.kwargs)
    return isinstance(module, nn.modules.conv._ConvTransposeNd) and bool(node.args) and told == 1 and named


def called(node: fx.Node, *, exactly: bool = True) -> nn.Module:
    """The layer that a node calls, plain: what it computes before every call stands in it as numbers.

    Args:
        exactly: with numbers in float64, as all that is computed of weights is; or as the layer has them.

    Raises:
        Unreadable: what it computes is not the same at every call.
    """
    module: nn.Module = CALL.of(node).module
    numbers = COMPUTED.get(node)
    if isinstance(numbers, Unreadable):
        raise numbers
    return (
        plain(module, {name: one.exact() if exactly else one.value for name, one in numbers.items()})
        if numbers
        else module
    )


def _stored(module: nn.Module, numbers: Mapping[str, Computed]) -> Iterator[Formula]:
    """The kernel of a layer that computes another tensor, as a formula that computes nothing."""
    if "weight" not in numbers and (weight := module._parameters.get("weight")) is not None:
        yield Formula(frozenset(), (weight,))


def _map_of(module: nn.Module, c: int, d: int) -> ConvMap:
    layer = read_module(module)
    assert layer is not None
    return layer.load(c, d)


def _read_pool(pool: Any, size: Ints | None) -> Layer | None:
    dims = next((POOLS[base] for base in type(pool).__mro__ if base in POOLS), None)
    if dims is None:
        return None
    if isinstance(pool, nn.modules.pooling._AdaptiveAvgPoolNd):
        return adaptive_pool_layer(dims, pool.output_size, size)
    return pool_layer(
        dims, pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad,
        getattr(pool, "divisor_override", None), size,
    )  # fmt: skip
