"""What torch's operations are, and do with memory and chance: against schemas, and what they are seen to do."""

import contextlib
import itertools
import warnings
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structrep.graph import operations
from structrep.graph.table import Is, facts

with mock.patch("torch.backends.disable_global_flags"):  # for good, and for all other tests of the process
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

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


class Given:
    """Stands for an argument."""


def test_what_a_schema_says_the_table_says():
    looked = 0
    for name in NAMES:
        for target in reachable(name):
            for one in operations._overloads(target):
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
    assert looked > 5000


def storages(value):
    found = [one for one in pytree.tree_leaves(value) if isinstance(one, Tensor) and one.layout is torch.strided]
    return {one.untyped_storage()._cdata for one in found}


def misshapen(target, given, result, kwargs):
    """What the table says of shapes and dtypes and is not so."""
    known, found = facts(operations.name_of(target)), [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
    if not found:
        return
    first, most = given[0], max(x.ndim for x in given)
    same = Is.SHAPE in known or (operations._is_elementwise(target) and len(given) == 1)
    if same and found[0].shape != first.shape:
        yield "gives another shape"
    if Is.LIKE in known and found[0].shape != given[-1].shape:
        yield "gives another shape than the last"
    if Is.RANK in known and first.ndim == most and any(x.ndim != first.ndim for x in found):
        yield "gives another rank"
    floats = {x.dtype for x in given if x.is_floating_point()}
    told = any(isinstance(x, torch.dtype) for x in kwargs.values())
    if Is.DTYPE in known and len(floats) == 1 and not told and found[0].dtype not in floats:
        yield "gives another dtype"
    if Is.MOVES in known and not set(found[0].flatten().tolist()) <= {n for x in given for n in x.flatten().tolist()}:
        yield "gives other numbers"


def unseen(target, call, args, kwargs):
    """What a call does that the table does not know of."""
    leaves = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    before, drawn = [one._version for one in leaves], torch.get_rng_state()
    result = call(*args, **kwargs)
    shared = storages(operations.shared(target, args, kwargs))
    written = {id(one) for one in operations.written(target, args, kwargs)}
    if storages(result) & storages(leaves) - shared:
        yield "shares"
    if any(v != one._version and id(one) not in written for one, v in zip(leaves, before, strict=True)):
        yield "writes"
    draws = not torch.equal(drawn, torch.get_rng_state())
    if draws and operations.has_schema(target) and not operations.draws(target, args, kwargs):
        yield "draws"
    kinds = {"tensor": Tensor, "several": (tuple, list), "number": (bool, int, float, complex, torch.dtype, tuple)}
    if isinstance(args[0], Tensor):
        yield from misshapen(target, leaves, result, kwargs)
    told = operations.gives(target, args, kwargs)
    if told and result is not None and not isinstance(result, kinds[told]):
        yield f"gives {told}"


def forms(info):
    """The ways to call an operator; of those in Python that torch has in the same place."""
    for form in (info.op, info.method_variant, info.inplace_variant, info.operator_variant):
        if form is not None and getattr(form, "__name__", "") != "<lambda>":
            yield form, form
            if getattr(Tensor, getattr(form, "__name__", ""), None) is form:
                yield form.__name__, form


def test_what_operators_are_seen_to_do_the_table_says():
    """Every operator that torch has sample inputs for, called by each of its names."""
    run, wrong = set(), set()
    with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        for info in op_db:
            dtypes = [d for d in (torch.float32, torch.int64, torch.complex64, torch.bool) if d in info.dtypes]
            samples = []
            with contextlib.suppress(Exception):  # what it needs is not here: a GPU, scipy
                made = info.sample_inputs_func(info, "cpu", dtypes[0], requires_grad=False)
                samples = list(itertools.islice(made, 5))
            for (target, call), sample in itertools.product(forms(info), samples):
                args, kwargs = (sample.input, *sample.args), dict(sample.kwargs)
                args = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)
                with contextlib.suppress(Exception):  # not on a CPU
                    wrong |= {(info.name, str(target), what) for what in unseen(target, call, args, kwargs)}
                    run.add(info.name)
    assert not wrong
    assert len(run) > 0.8 * len(op_db)


def test_what_modules_are_seen_to_do_the_table_says():
    """Every module that torch has sample inputs for, in both modes."""
    run = set()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for info, training in itertools.product(module_db, (False, True)):
            options = {"device": "cpu", "dtype": torch.float32, "requires_grad": False, "training": training}
            for sample in info.module_inputs_func(info, **options)[:10]:
                made, given = sample.constructor_input, sample.forward_input
                if given is None:
                    continue
                module = info.module_cls(*made.args, **made.kwargs).train(training)
                leaves = [x for x in pytree.tree_leaves((given.args, given.kwargs)) if isinstance(x, Tensor)]
                before = [one._version for one in leaves]
                with contextlib.suppress(RuntimeError, TypeError, ValueError, NotImplementedError):
                    result = module(*given.args, **given.kwargs)
                    run.add(info.name)
                    shares = storages(result) & storages(leaves)
                    in_place = getattr(module, "inplace", False)
                    assert not shares or not operations._makes(module) or in_place, module
                    assert before == [one._version for one in leaves] or in_place, module
    assert len(run) > 100


def test_modules_of_others_may_do_anything():
    class Mine(nn.ReLU):
        def forward(self, x):
            return x

    assert operations._makes(nn.ReLU())
    assert operations._makes(nn.Conv2d(1, 1, 1))
    assert not operations._makes(Mine())
    assert not operations._makes(nn.Flatten())
