"""Models that are graphs already: exported programs, whose code calls ATen operators, and what torch.fx has traced."""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils import _pytree as pytree

import structrep
from structrep.registry import default
from structrep.trace.aten import in_torch
from tests.support.models import example_input, settled, small
from tests.support.truth import EXACT, SAME, relative_error

FAMILIES = [rule for rule in default if not rule.law]


def exported(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        return torch.export.export(model, (x,), strict=False, dynamic_shapes=shapes).module()  # torch 2.6 is strict


@pytest.mark.parametrize("rule", FAMILIES, ids=lambda rule: rule.name)
def test_an_exported_block_merges_as_it_did(rule):
    model = settled(nn.Sequential(rule.example()))
    x = example_input(rule, model)
    if rule.name == "repmlp":
        pytest.skip("its pieces are permuted by sizes that an exported program computes")
    graph = exported(model, x)
    plan = structrep.plan(graph, x)
    # of a computed kernel only the arithmetic is left, not the torch functions that tell its family
    assert [merge.rules for merge in plan.merges] in ([(rule.name,)], [("constant_kernel",)])
    assert relative_error(plan.reparameterize(x)(x), model(x)) < EXACT


@pytest.mark.parametrize("name", ["repvgg_a0", "fastvit_t8", "test_resnet", "test_vit"])
@pytest.mark.parametrize("how", ["exported", "traced"])
def test_graphs_stay_graphs(name, how):
    model = settled(small(name)).float()
    x = torch.randn(2, 3, 160, 160) if name == "test_vit" else torch.randn(2, 3, 64, 64)
    try:
        graph = exported(model, x) if how == "exported" else fx.symbolic_trace(model)
    except Exception:
        pytest.skip("torch itself makes no graph of it")
    plan = structrep.plan(graph, x)
    assert abs(len(plan.merges) - len(structrep.plan(model, x).merges)) <= 1
    deploy = plan.apply()
    with torch.no_grad():
        expected = model(x)
        assert relative_error(deploy(x), expected) < 1e-4
        assert relative_error(copy.deepcopy(deploy)(x), expected) < 1e-4
        assert isinstance(deploy, fx.GraphModule)
        assert relative_error(fx.Interpreter(deploy).run(x), expected) < 1e-4
        if how == "traced":  # torch pickles no exported module
            file = io.BytesIO()
            torch.save(deploy, file)
            file.seek(0)
            assert relative_error(torch.load(file, weights_only=False)(x), expected) < 1e-4
    assert not structrep.plan(deploy, x).merges


def moved(y):
    return y.to("cpu").cpu().to(memory_format=torch.channels_last).to("cpu", torch.float64, True, True)


def made(y):
    ones = torch.full((4, 1, 1), 2.0, dtype=y.dtype) + y.new_ones((4, 1, 1)) + torch.arange(0, 4, 1.0).view(4, 1, 1)
    return y * ones + torch.zeros_like(y[:, :1]) + torch.scalar_tensor(2.0, dtype=y.dtype)


def reduced(y):
    return y.mean((2, 3), keepdim=True, dtype=torch.float64) + y.sum((2, 3), True) + y.var((2, 3), keepdim=True)


def picked(y):
    return torch.cat([y[:, torch.tensor([1, 0])], *y.split([1, 3], 1)], 1)[:, :, 1:]


def resized(y):
    return F.interpolate(F.interpolate(y, scale_factor=2.0), size=(7, 5), mode="bilinear", antialias=True)


def normed(y):
    return F.group_norm(F.layer_norm(y, y.shape[1:]), 2).mT.clone(memory_format=torch.contiguous_format)


def sized(y):
    n = y.shape[0]
    return torch.reshape(y, [n, 2, -1]) * torch.arange(n, dtype=y.dtype).view(n, 1, 1) + torch.full([n, 1, 1], 2.0)


WRITTEN = [moved, made, reduced, picked, resized, normed, sized]


class Then(nn.Module):
    def __init__(self, then):
        super().__init__()
        self.conv, self.norm, self.then = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), then

    def forward(self, x):
        return self.then(self.norm(self.conv(x.to("cpu"))))


@pytest.mark.parametrize("how", ["strict", "dynamic", "decomposed"])
@pytest.mark.parametrize("then", WRITTEN, ids=lambda then: then.__name__)
def test_programs_are_taken_whole_and_run_as_they_did(then, how):
    model, x = settled(Then(then)), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    shapes = ({0: torch.export.Dim.DYNAMIC},) if how == "dynamic" else None
    program = torch.export.export(model, (x,), strict=how == "strict", dynamic_shapes=shapes)
    program = program.run_decompositions({}) if how == "decomposed" else program
    plan = structrep.plan(program)
    assert len(plan.merges) == 1
    for deploy in (plan.reparameterize(), structrep.reparameterize(program, inplace=True)):
        assert isinstance(deploy, fx.GraphModule)
        assert relative_error(deploy(x), model(x)) < EXACT
    assert relative_error(program.module()(x), model(x)) < SAME  # a program is never changed
    structrep.assert_merged(deploy)


X = torch.randn(2, 4, 5, 6, dtype=torch.float64)
ATEN = torch.ops.aten
CALLS = [
    (ATEN.to.dtype_layout, (X,), {"dtype": torch.float32, "layout": torch.strided, "device": torch.device("cpu")}),
    (ATEN.to.dtype_layout, (X,), {"memory_format": torch.channels_last}),
    (ATEN.to.dtype, (X, torch.float32, False, True, torch.channels_last), {}),
    (ATEN.to.device, (X, torch.device("cpu"), torch.float32, True, True, torch.contiguous_format), {}),
    (ATEN.to.other, (X, X.float(), False, True), {}),
    (ATEN._to_copy.default, (X,), {"dtype": torch.float16}),
    (ATEN._to_copy.default, (X,), {"memory_format": torch.preserve_format}),
    (ATEN.index.Tensor, (X, [None, torch.tensor([2, 0])]), {}),
    (ATEN.index.Tensor, (X, [torch.tensor([1, 0]), None, torch.tensor([2, 0])]), {}),
    (ATEN.mT.default, (X,), {}),
    (ATEN.l1_loss.default, (X, 2 * X), {}),
    (ATEN.mse_loss.default, (X, 2 * X), {}),
    (ATEN.unique_consecutive.default, (X,), {}),
    (ATEN.convolution.default, (X, X[:, :, :3, :3], None, [1, 2], [1, 0], [1, 1], False, [0, 0], 1), {}),
    (
        ATEN.convolution.default,
        (X, X.mT[:1, :, :3, :3].repeat(4, 1, 1, 1), None, [2, 2], [1, 0], [1, 1], True, [1, 0], 1),
        {},
    ),
    (ATEN.convolution.default, (X[0], X[0, :2, :, :3], None, [1], [1], [1], False, [0], 1), {}),
    (ATEN.arange.start_step, (0, 9, 2), {"dtype": torch.float64}),
    (ATEN.full.default, ([2, 3], 1.5), {"dtype": torch.float32, "pin_memory": False}),
    (ATEN.new_full.default, (X, [2, 3], 1.5), {"pin_memory": False}),
    (ATEN.clone.default, (X,), {"memory_format": torch.channels_last}),
    (ATEN.mean.dim, (X, [2, 3], True), {"dtype": torch.float32}),
    (ATEN.sum.dim_IntList, (X, [1]), {"dtype": torch.float32}),
    (ATEN.split_with_sizes.default, (X, [1, 3], 1), {}),
    (ATEN._unsafe_view.default, (X, [2, -1]), {}),
    (ATEN.upsample_nearest2d.vec, (X, None, [2.0, 2.0]), {}),
    (ATEN.add.Scalar, (X, 2, 3), {}),
    (ATEN.rsub.Scalar, (X, 2, 3), {}),
    (ATEN.scalar_tensor.default, (1.5,), {"dtype": torch.float64}),
]


@pytest.mark.parametrize(("operator", "args", "kwargs"), CALLS, ids=lambda one: str(one) if callable(one) else "")
def test_operators_do_as_functions_what_they_do(operator, args, kwargs):
    kind, function, given, named = in_torch(operator, args, kwargs)
    found = function(*given, **named) if kind == "call_function" else getattr(given[0], function)(*given[1:], **named)
    truth = operator(*args, **kwargs)
    assert type(found) is type(truth) or isinstance(found, (tuple, list))
    for one, right in zip(pytree.tree_leaves(found), pytree.tree_leaves(truth), strict=True):
        assert (one.dtype, one.layout, one.shape) == (right.dtype, right.layout, right.shape)
        assert one.layout != torch.strided or one.stride() == right.stride()
        assert torch.equal(one.to_dense(), right.to_dense())


def test_another_layout_is_left_to_the_operator():
    for operator in (ATEN.to.dtype_layout, ATEN._to_copy.default):
        assert in_torch(operator, (X,), {"layout": torch.sparse_coo})[1] is operator
        assert in_torch(operator, (X,), {"layout": torch.strided, "dtype": torch.float32})[1] == "to"
