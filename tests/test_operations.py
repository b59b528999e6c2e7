"""What torch's operations do with memory and chance: the table against schemas, and what they are seen to do."""

import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

from structrep import operations

NAMES = sorted({s.name.removeprefix("aten::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::")})


def reachable(name):
    """All that a forward can call an ATen operator by."""
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return
    yield packet
    yield from (getattr(packet, one) for one in packet.overloads())
    if hasattr(Tensor, name):
        yield name
        yield getattr(Tensor, name)
    for space in (torch, F, torch._C._nn, torch._C._linalg, torch._C._special, torch._C._fft):
        if callable(getattr(space, name, None)):
            yield getattr(space, name)


def overloads(target):
    found = operations._overloads(target)
    return [one for one in found if not isinstance(one, str)]


class Given:
    """Stands for an argument."""


@pytest.mark.parametrize("letter", sorted({name[0] for name in NAMES}))
def test_what_a_schema_says_the_table_says(letter):
    looked = 0
    for name in (name for name in NAMES if name[0] == letter):
        for target in reachable(name):
            for one in overloads(target):
                args = [Given() for _ in one._schema.arguments if not _.kwarg_only]
                kwargs = {a.name: Given() for a in one._schema.arguments if a.kwarg_only}
                given = [*args, *kwargs.values()]
                results = [r.alias_info for r in one._schema.returns if r.alias_info]
                for argument, value in zip(one._schema.arguments, given, strict=True):
                    if argument.alias_info is None:
                        continue
                    if argument.alias_info.is_write:
                        looked += 1
                        assert value in operations.written(target, args, kwargs), (target, one._schema)
                    if any(not r.before_set or r.before_set & argument.alias_info.before_set for r in results):
                        assert value in operations.shared(target, args, kwargs), (target, one._schema)
    assert looked or letter in "jkoy"


def storages(value):
    found = [one for one in pytree.tree_leaves(value) if isinstance(one, Tensor) and one.layout is torch.strided]
    return {one.untyped_storage()._cdata for one in found}


def seen(target, call, args, kwargs):
    """What a call gives back of its arguments' memory, and what it writes to, that the table does not know of."""
    leaves = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    before = [one._version for one in leaves]
    result = call(*args, **kwargs)
    shared = storages(operations.shared(target, args, kwargs))
    written = {id(one) for one in operations.written(target, args, kwargs)}
    given = storages(result) & storages(leaves) - shared
    wrote = [
        one for one, version in zip(leaves, before, strict=True) if one._version != version and id(one) not in written
    ]
    return given, wrote


def called(target, args):
    return args[0].__getattribute__(target) if isinstance(target, str) else target


def test_what_operators_are_seen_to_do_the_table_says():
    """Every operator that torch has sample inputs for, called by each of its names."""
    run, wrong = set(), []
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for info in op_db:
            dtype = next(
                (d for d in (torch.float32, torch.int64, torch.complex64, torch.bool) if d in info.dtypes), None
            )
            if dtype is None:
                continue
            try:
                samples = list(info.sample_inputs("cpu", dtype))
            except Exception:
                continue
            forms = [info.op, info.method_variant, info.inplace_variant, info.operator_variant]
            for form in (one for one in forms if one is not None):
                if getattr(form, "__name__", "") == "<lambda>" or inspect.ismodule(form):
                    continue
                for sample in samples[:25]:
                    args, kwargs = (sample.input, *sample.args), dict(sample.kwargs)
                    args = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)
                    try:
                        given, wrote = seen(form, form, args, kwargs)
                    except Exception:
                        continue
                    run.add(info.name)
                    if given or wrote:
                        wrong.append((info.name, getattr(form, "__name__", form), bool(given), len(wrote)))
    assert not wrong, sorted(set(wrong), key=str)
    assert len(run) > 400
