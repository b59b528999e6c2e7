"""Forwards that stock torch.fx cannot follow, or follows wrongly: each merges and stays right, or is left as it is."""

import builtins
import inspect
import math
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import as_tensor, fx, nn, zeros

import structrep
from structrep.graph.facts import SHAPE
from structrep.graph.run import infer_shapes
from tests.support.models import settled
from tests.support.truth import CLOSE, EXACT, SAME, check, relative_error, says


def same_padding(x, conv):
    """Control flow on sizes; the layer is asked for its settings only."""
    height, width = x.shape[-2:]
    pads = [max((math.ceil(n / s) - 1) * s + k - n, 0)
            for n, s, k in zip((height, width), conv.stride, conv.kernel_size, strict=False)]  # fmt: skip
    return F.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))


class SamePadded(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(same_padding(x, self.conv))).relu()


def run_it(x, layer):
    return layer(x) if x.shape[0] > 1 else layer(x) + 0


class RunByFunction(nn.Module):
    """The norm is also run by a function that cannot be followed."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x)) + run_it(x, self.norm)


class ByType(nn.Module):
    """Answers of no to `isinstance` and `is_tensor` give another result."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        y = self.norm(y) if isinstance(y, torch.Tensor) else y * 0
        if torch.is_tensor(y) and isinstance(y, (list, torch.Tensor)) and not isinstance(y, (tuple, int)):
            y = y + 1
        size = x.shape[-1]
        return y * 2 if isinstance(size, int) and not isinstance(size, torch.Tensor) else y


class Token(nn.Module):
    """A parameter is given the batch size."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.conv = nn.Conv2d(3, 4, 2, 2)
        self.norm = nn.BatchNorm2d(4)
        self.mix = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.norm(self.conv(x))
        y = (y + self.mix(y)).flatten(2).transpose(1, 2)
        zeros = torch.zeros(x.shape[0], 1, 4, dtype=x.dtype)
        return torch.cat([self.token.expand(x.shape[0], -1, -1), zeros, y], dim=1)


@pytest.mark.parametrize("build", [SamePadded, ByType, Token])
def test_it_merges(build):
    model = settled(build())
    deploy = structrep.reparameterize(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deploy.modules())
    for shape in ((2, 3, 8, 8), (1, 3, 7, 9) if build is SamePadded else (1, 3, 6, 4)):
        x = torch.randn(shape, dtype=torch.float64)
        assert relative_error(deploy(x), model(x)) < EXACT
    assert "isinstance" not in globals()
    assert isinstance is builtins.isinstance
    assert "expand" not in vars(torch.Tensor)
    assert same_padding.__code__.co_name == "same_padding"


def test_a_function_that_was_kept_whole_is_named():
    plan = says(structrep.plan(settled(SamePadded())), 1, "Untraceable")
    assert [(r.what, r.kind) for r in plan.refusals] == [("same_padding() as it is", "Untraceable")]


def test_a_layer_that_a_function_may_run_stays():
    model = settled(RunByFunction())
    deploy = structrep.reparameterize(model)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert relative_error(deploy(x), model(x)) < EXACT


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) * random.random()


def test_numbers_that_python_draws_are_drawn_at_every_call():
    model = settled(Dropped())
    deploy = structrep.reparameterize(model)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    for seed in range(3):
        random.seed(seed)
        truth = model(x)
        random.seed(seed)
        assert relative_error(deploy(x), truth) < EXACT


class Remembers(nn.Module):
    """State in a list, and in a dict in a dict."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.seen = []
        self.state = {"last": {}}

    def forward(self, x):
        y = self.a(x) + self.b(x)
        if self.how == "list":
            self.seen.append(y)
        else:
            self.state["last"]["y"] = y
        return y


@pytest.mark.parametrize("how", ["list", "dict"])
def test_a_forward_that_remembers_goes_on_remembering(how):
    model = settled(Remembers(how))
    deploy = says(structrep.plan(model), 1).apply()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert relative_error(deploy(x), model(x)) < EXACT
    for one in (model, deploy):
        held = one.seen[-1] if how == "list" else one.state["last"]["y"]
        assert torch.is_tensor(held)


def scaled_in_place(x):
    return x.mul_(2) if x.shape[0] else x


class WrittenByFunction(nn.Module):
    """A function that cannot be followed writes to what a convolution has read."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.scale = nn.Parameter(torch.randn(3, 1, 1))

    def forward(self, x):
        x = x.relu()
        y = self.conv(x)
        scaled_in_place(x)
        return y * self.scale + x


def test_a_function_that_writes_to_its_argument():
    model = settled(WrittenByFunction())
    deploy = says(structrep.plan(model), 0, "Mutated Untraceable").apply()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert relative_error(deploy(x), model(x)) < EXACT


class Checks(nn.Module):
    """Conditions that only raise, loops over pieces, sizes unpacked into a call."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.branches = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.skips = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(2))

    def forward(self, x):
        if x.shape[1] != 3 or not x.ndim == 4:
            raise ValueError("three channels, please")
        if x.ndim == 4 and not (x.shape[2] < 2):
            y = self.norm(self.first(x))
        else:
            raise ValueError("larger, please")
        parts = list(y.chunk(2, 1))
        if len(parts) != 2 or len(y.shape) != 4:
            raise ValueError("two parts, please")
        parts.extend(f(parts[-1]) + g(parts[-1]) for f, g in zip(self.branches, self.skips, strict=True))
        y = torch.cat(parts, 1)
        return y.reshape(*y.shape[:2], -1)


def test_conditions_that_only_raise():
    model = settled(Checks())
    deploy = structrep.reparameterize(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deploy.modules())
    assert isinstance(deploy, Checks)
    assert deploy.skips is None
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    assert relative_error(deploy(x), model(x)) < EXACT
    for shape in ((2, 4, 5, 4), (2, 3, 1, 4)):
        with pytest.raises((AssertionError, RuntimeError)):
            deploy(torch.randn(shape, dtype=torch.float64))


class Decides(nn.Module):
    """Both ways of the condition go on: neither is taken for granted."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        if x.shape[0] > 1:
            x = x * 2
        return self.a(x) + self.b(x)


def test_a_condition_that_decides_is_left():
    model = settled(Decides())
    deploy = says(structrep.plan(model), 1, "Untraceable").reparameterize()
    for batch in (1, 2):
        x = torch.randn(batch, 3, 5, 4, dtype=torch.float64)
        assert relative_error(deploy(x), model(x)) < EXACT


def test_chunks_that_do_not_divide():
    """Five channels in four chunks are three pieces."""

    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.five = nn.Conv2d(3, 5, 1)

        def forward(self, x):
            y = self.five((self.a(x) + self.b(x)).relu())
            return sum((index + 1) * part.sum(1) for index, part in enumerate(y.chunk(4, 1)))

    model = settled(Uneven())
    deploy = structrep.reparameterize(model)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    assert deploy.b is None
    assert relative_error(deploy(x), model(x)) < EXACT


class AllOptional(nn.Module):
    """As in transformers: the input has a default, and None raises."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.head = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))

    def forward(self, pixel_values=None, mask=None, with_head=False):
        if pixel_values is None:
            raise ValueError("pixel_values, please")
        y = self.a(pixel_values) + self.b(pixel_values)
        if mask is not None:
            y = y * mask
        return self.head(y) if with_head else y


def test_the_first_optional_argument_is_the_input():
    model = settled(AllOptional())
    deploy = structrep.reparameterize(model)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    assert relative_error(deploy(pixel_values=x), model(x)) < EXACT
    assert deploy.b is None
    mask = torch.rand(2, 3, 5, 4, dtype=torch.float64)
    assert relative_error(deploy(x, mask=mask), model(x, mask=mask)) < EXACT
    with pytest.raises(ValueError, match="pixel_values, please"):
        deploy()


def test_a_module_that_the_trace_never_calls_is_merged_apart():
    model = settled(AllOptional())
    deploy = structrep.reparameterize(model)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    assert isinstance(deploy.head[1], nn.Identity)
    assert relative_error(deploy.head(x), model.head(x)) < EXACT


class PadsItself(nn.Conv2d):
    """As timm's Conv2dSame: a convolution whose forward pads by the size of its input."""

    def forward(self, x):
        return F.conv2d(same_padding(x, self), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_that_pads_itself_keeps_its_place(bias):
    for inplace in (False, True):
        model = settled(nn.Sequential(PadsItself(3, 4, 3, 2, bias=bias), nn.BatchNorm2d(4), nn.ReLU()))
        x = torch.randn(2, 3, 8, 7, dtype=torch.float64)
        truth = model(x)
        deploy = structrep.reparameterize(model, inplace=inplace)
        assert relative_error(deploy(x), truth) < EXACT
        assert isinstance(deploy[0], PadsItself)
        assert list(deploy.state_dict()) == ["0.weight", "0.bias"]
        assert not list(deploy[0].children())
        assert repr(deploy[0]) == "PadsItself(3, 4, kernel_size=(3, 3), stride=(2, 2))"


def test_a_convolution_that_pads_itself_and_is_called_twice_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = PadsItself(3, 3, 3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.conv(self.norm(self.conv(x)).relu())

    model, x = settled(Twice()), torch.randn(2, 3, 8, 7, dtype=torch.float64)
    assert relative_error(structrep.reparameterize(model)(x), model(x)) < EXACT


class Reshapes(nn.Module):
    """Parameters in a dict; one is reshaped by a method that the trace watches."""

    def __init__(self):
        super().__init__()
        self.p = nn.ParameterDict({"w": torch.randn(3, 3, 3, 3), "v": torch.randn(3, 3, 1, 1), "b": torch.randn(3)})

    def forward(self, x):
        y = F.conv2d(x, self.p["w"], self.p["b"], padding=1) + F.conv2d(x, self.p["v"])
        return torch.maximum(y, self.p["b"].abs().view(-1, 1, 1).expand(3, 1, 1))


def test_what_is_computed_from_parameters_is_written_as_it_was():
    model = settled(Reshapes())
    deploy = pickle.loads(pickle.dumps(says(structrep.plan(model), 1).apply()))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert relative_error(deploy(x), model(x)) < EXACT
    assert ".view(-1, 1, 1)" in inspect.getsource(type(deploy).forward)
    exported = torch.export.export(deploy, (x,)).module()
    assert relative_error(exported(x), model(x)) < EXACT


class Retried(nn.Module):
    """Writes to itself before something stops the trace: the second attempt must not see what the first one wrote."""

    def __init__(self):
        super().__init__()
        self.mean = torch.randn(1, 3, 1, 1)
        self.a, self.b = nn.Conv2d(3, 3, 1), SamePadded()
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        self.mean = self.mean.type_as(x)
        return self.last(self.b(self.a((x - self.mean) * 2.0))) / 2.0 + self.mean


def test_an_attempt_leaves_nothing_to_the_next():
    model = settled(Retried())
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    deploy = says(structrep.plan(model), 3, "Untraceable").reparameterize()
    truth = model(x)
    assert relative_error(deploy(x), truth) < EXACT
    assert torch.is_tensor(deploy.mean)


class Products(nn.Module):
    """Layers written as products of matrices, with a Linear or a convolution behind."""

    def __init__(self, dims, write):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.behind = (nn.Linear, nn.Conv1d, nn.Conv2d)[dims](5, 4, *[1] * bool(dims))
        self.write = write

    def forward(self, x):
        return self.behind(self.write(x, self.weight))


PRODUCTS = {
    "x @ w.T": (0, lambda x, w: x @ w.t()),
    "matmul": (0, lambda x, w: torch.matmul(x, w.T)),
    "x.matmul": (0, lambda x, w: x.matmul(w.transpose(0, 1))),
    "...c,oc": (0, lambda x, w: torch.einsum("...c,oc->...o", x, w)),
    "oc,bc": (0, lambda x, w: torch.einsum("oc, bc -> bo", w, x)),
    "bcl,oc": (1, lambda x, w: torch.einsum("bcl,oc->bol", x, w)),
    "co,bchw": (2, lambda x, w: torch.einsum("co,bchw->bohw", w.t(), x)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_matrices_are_layers(name):
    dims, write = PRODUCTS[name]
    model = Products(dims, write).double().eval()
    x = torch.randn(2, 4, *(7, 6)[:dims], dtype=torch.float64)
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(x), model(x)) < SAME
    assert sum(p.numel() for p in deploy.parameters()) == 4 * 4 + 4


@pytest.mark.parametrize(
    ("equation", "value", "weight"),
    [
        ("bcc,oc->bo", (2, 4, 4), (5, 4)),  # a diagonal
        ("bchw,oh->bcow", (2, 4, 5, 5), (3, 5)),  # on rows
        ("bchw,oc->bhwo", (2, 4, 3, 3), (5, 4)),  # channels moved
        ("bc,bc->bc", (2, 4), (2, 4)),  # one by one
    ],
)
def test_other_products_are_left(equation, value, weight):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(weight))

        def forward(self, x):
            return torch.einsum(equation, x, self.weight) * 2

    model = Net().double().eval()
    x = torch.randn(value, dtype=torch.float64)
    plan = structrep.plan(model)
    assert not plan.merges
    assert torch.equal(plan.apply()(x), model(x))


def test_inferring_shapes_leaves_no_fake_tensors_behind():
    class Caches(nn.Module):
        def __init__(self):
            super().__init__()
            self.b, self.i, self.cache, self.linear = nn.Parameter(torch.randn(4)), torch.arange(4), {}, nn.Linear(4, 4)

        def forward(self, x):
            if "k" not in self.cache:
                self.cache["k"] = self.b[self.i]
            if x.sum() > 1e9:  # so that it is kept whole
                x = x + 1
            return self.linear(x) + self.cache["k"]

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Caches(), nn.Linear(4, 4), nn.Linear(4, 4)).double().eval()
    x = torch.randn(2, 4, dtype=torch.float64)
    deploy = says(structrep.plan(model, x), 2, "ExampleOnly Unreadable").reparameterize(x)
    assert torch.allclose(deploy(x), model(x))


def test_a_scripted_child_is_left_as_it_is():
    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
            self.last = torch.jit.script(nn.Conv2d(4, 4, 3))

        def forward(self, x):
            return self.last(torch.relu(self.a(x) + self.b(x)))

    model = Scripted().double().eval()
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    deploy = structrep.reparameterize(model, x)
    assert relative_error(deploy(x), model(x)) < CLOSE
    assert len([module for module in deploy.modules() if isinstance(module, nn.Conv2d)]) == 1


@pytest.mark.parametrize("holder", [lambda part: [part], lambda part: {0: part}], ids=["list", "dict"])
def test_the_text_stays_around_a_scripted_module_that_is_no_part(holder):
    for inputs in ((), (torch.ones(1, 4, 6, 6, dtype=torch.float64),)):

        class Holds(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.n, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
                self.held = holder(torch.jit.script(nn.ReLU()))

            def forward(self, x):
                return self.held[0](self.n(self.a(x)) + self.b(x))

        model = settled(Holds())
        x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
        plan = structrep.plan(model, *inputs)
        assert [(merge.rules, merge.edit) for merge in plan.merges] == [(("repvgg",), "edit")]
        assert relative_error(plan.apply()(x), model(x)) < CLOSE


def test_what_lends_memory_is_not_run_where_there_is_none():
    ran = []

    def from_dlpack(x):
        ran.append(x)
        return x * 2

    kept = torch.ones(2, 4, dtype=torch.float64)

    def real(x):
        ran.append(x)
        return kept

    for function in (from_dlpack, real):
        graph = fx.Graph()
        found = graph.call_function(function, (graph.placeholder("x"),))
        after = graph.call_method("add_", (found, 1))
        infer_shapes(graph, [kept])
        assert not SHAPE.known(found)
        assert not SHAPE.known(after)
    assert len(ran) == 1
    assert torch.equal(kept, torch.ones_like(kept))


class Activated(nn.Module):
    """Blocks often share one activation, as ultralytics' do."""

    shared = nn.SiLU()

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), self.shared

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


def test_a_head_that_is_never_called_merges_also_where_its_activation_is_called_elsewhere():
    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = Activated(), nn.Sequential(Activated(), nn.Conv2d(4, 2, 1))

        def forward(self, x):
            y = self.body(x)
            return (y, self.head(y)) if self.training else y

    model = settled(Trained())
    plan = structrep.plan(model)
    assert [merge.where for merge in plan.merges] == ["body.conv", "head.0.conv"]
    assert not plan.refusals
    x, deploy = torch.randn(2, 4, 6, 6, dtype=torch.float64), plan.apply()
    assert relative_error(deploy(x), model(x)) < SAME
    assert relative_error(deploy.head(x), model.head(x)) < SAME


class Worded(nn.Module):
    """Makes texts of values, for itself or for who reads them."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), how

    def forward(self, x):
        if self.how == "message":
            print(f"{x.shape}", end="")
            if x.shape[1] != 4:
                raise ValueError(f"{x.shape[1]} channels")
            assert x.ndim == 4, f"{x.ndim} dims"
            return self.norm(self.conv(x))
        text = f"{x.shape[1]}" if self.how == "size" else f"{x.shape}" if self.how == "shape" else f"{x.dtype}"
        return self.norm(self.conv(x)) * len(text)


@pytest.mark.parametrize(("how", "merges"), [("message", 1), ("size", 0), ("shape", 0)])
def test_texts_of_values(how, merges, capsys):
    model, x = settled(Worded(how)), torch.randn(2, 4, 6, 5, dtype=torch.float64)
    plan = structrep.plan(model, x)
    assert len(plan.merges) == merges
    assert relative_error(plan.apply()(x), model(x)) < EXACT


class Tried(nn.Module):
    """Gives every part an argument that most do not take: speechbrain's x-vectors."""

    def __init__(self):
        super().__init__()
        norm, conv = nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3)
        self.parts = nn.ModuleList([Lengths(nn.Conv1d(4, 4, 3)), nn.LeakyReLU(), norm, nn.ReflectionPad1d(1), conv])

    def forward(self, x, lengths=None):
        for part in self.parts:
            try:
                x = part(x, lengths=lengths)
            except TypeError:
                x = part(x)
        return x


class Lengths(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, lengths=None):
        return self.inner(x)


def test_a_layer_that_is_given_what_it_does_not_take():
    for example in (False, True):
        model, x = settled(Tried()), torch.randn(2, 4, 9, dtype=torch.float64)
        plan = structrep.plan(model, x if example else None)
        assert len(plan.merges) == 1, plan
        assert relative_error(plan.apply()(x), model(x)) < EXACT


class NamedFactories(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) + zeros(x.shape[0], 1, 1, 1) + as_tensor(x)[:, :1, :7, :7]


def test_torch_s_factories_by_names_of_their_own():
    check(NamedFactories(), torch.randn(2, 3, 9, 9, dtype=torch.float64), merges=1, norm=0)
    assert zeros is torch.zeros
    assert as_tensor is torch.as_tensor
