"""Values that look at the same memory, and are written to: through every kind of view, before and after what a merge
reads. What merges and what is refused is said of each."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import structrep
from tests.support.models import settled
from tests.support.truth import EXACT, relative_error

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Written(nn.Module):
    """A batch norm and a 1x1 convolution, which would merge; `between` runs after the norm, on its input."""

    def __init__(self, between, after=None):
        super().__init__()
        self.a, self.n, self.b, self.act = (
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1),
            nn.ReLU(inplace=True),
        )
        self.register_buffer("scale", torch.rand(4, 1, 1) + 0.5)
        self.between, self.after = between, after

    def forward(self, x):
        x = torch.tanh(self.a(x))
        y = self.n(x)
        self.between(self, x)
        y = self.b(y)
        if self.after is not None:
            self.after(self, x)
        return y


def converts(model, merges, x=X, example=False):
    """Convert; the deploy model is the model, and merges what is said."""
    model = settled(model).double()
    plan = structrep.plan(model, x if example else None)
    found = sum(len(merge.rules) for merge in plan.merges)
    deploy = plan.reparameterize()
    for _ in range(2):  # a forward may write to what it finds at the next call
        ours, truth = x.clone(), x.clone()
        with torch.no_grad():
            assert relative_error(deploy(ours), model(truth)) < EXACT
        assert torch.equal(ours, truth)
    assert found == merges, plan
    return plan


@fx.wrap
def library_function(x):
    return x


ALIASES = {
    "itself": lambda m, x: x,
    "positive": lambda m, x: x.positive(),
    "+x": lambda m, x: +x,
    "torch.positive": lambda m, x: torch.positive(x),
    "mT": lambda m, x: x.mT,
    "real": lambda m, x: x.real,
    "data": lambda m, x: x.data,
    "detach": lambda m, x: x.detach(),
    "view": lambda m, x: x.view(2, 4, 36),
    "as_strided": lambda m, x: x.as_strided((2, 2), (2, 1)),
    "transpose": lambda m, x: torch.transpose(x, 1, 2),
    "swapdims": lambda m, x: x.swapdims(1, 2),
    "movedim": lambda m, x: torch.movedim(x, 1, 2),
    "unflatten": lambda m, x: x.unflatten(1, (2, 2)),
    "flatten": lambda m, x: x.flatten(1),
    "ravel": lambda m, x: x.ravel(),
    "narrow": lambda m, x: x.narrow(1, 0, 2),
    "select": lambda m, x: x.select(1, 0),
    "diagonal": lambda m, x: torch.diagonal(x),
    "linalg.diagonal": lambda m, x: torch.linalg.diagonal(x),
    "unfold": lambda m, x: x.unfold(2, 2, 1),
    "expand_as": lambda m, x: x.expand_as(x),
    "view_as": lambda m, x: x.view_as(x),
    "squeeze": lambda m, x: torch.squeeze(x),
    "index": lambda m, x: x[:, 1:],
    "chunk": lambda m, x: x.chunk(2, 1)[1],
    "split": lambda m, x: torch.split(x, 2, 1)[0],
    "split_with_sizes": lambda m, x: torch.split_with_sizes(x, (1, 3), 1)[0],
    "hsplit": lambda m, x: x.hsplit(2)[0],
    "tensor_split": lambda m, x: x.tensor_split(2, 1)[0],
    "unbind": lambda m, x: x.unbind(1)[0],
    "of two tuples": lambda m, x: (x.chunk(2, 1) + x.chunk(2, 1))[1],
    "contiguous": lambda m, x: x.contiguous(),
    "to": lambda m, x: x.to(x.dtype),
    "type_as": lambda m, x: x.type_as(x),
    "double": lambda m, x: x.double(),
    "atleast_2d": lambda m, x: torch.atleast_2d(x),
    "broadcast_tensors": lambda m, x: torch.broadcast_tensors(x, x)[1],
    "as_tensor": lambda m, x: torch.as_tensor(x),
    "asarray": lambda m, x: torch.asarray(x),
    "dropout": lambda m, x: F.dropout(x, 0.5, False),
    "torch.dropout": lambda m, x: torch.dropout(x, 0.5, False),
    "feature_alpha_dropout": lambda m, x: F.feature_alpha_dropout(x, 0.5, False),
    "einsum": lambda m, x: torch.einsum("nchw->ncwh", x),
    "chain": lambda m, x: x.positive().mT.detach()[:, 3:],
    "F.relu in place": lambda m, x: F.relu(x, inplace=True),
    "by name": lambda m, x: F.relu(input=x, inplace=True),
    "a module by name": lambda m, x: m.act(input=x),
    "operator": lambda m, x: torch.ops.aten.alias(x),
    "unsafe": lambda m, x: torch.ops.aten._unsafe_view(x, (2, 4, 36)),
    "of somebody's": lambda m, x: library_function(x),
}  # fmt: skip

COPIES = {
    "clone": lambda m, x: x.clone(),
    "arithmetic": lambda m, x: x * 1.0,
    "zeros_like": lambda m, x: torch.zeros_like(x),
    "cat": lambda m, x: torch.cat([x]),
    "a convolution": lambda m, x: F.conv2d(x, torch.ones(1, 4, 1, 1, dtype=torch.float64)),
    "softmax": lambda m, x: torch.softmax(x, 1),
    "interpolate": lambda m, x: F.interpolate(x, scale_factor=2),
    "avg_pool": lambda m, x: F.avg_pool2d(x, 2),
    "repeat": lambda m, x: x.repeat(1, 1, 1, 1),
    "index_select": lambda m, x: x.index_select(1, torch.tensor([0, 1])),
    "a comparison": lambda m, x: ((x > 0) & (x < 1)).to(x.dtype),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIASES)
def test_what_is_written_through_an_alias(name):
    alias = ALIASES[name]
    # in `between` the norm has read its input, and a layer for both would not have
    converts(Written(lambda m, x: alias(m, x).mul_(2)), 0)
    converts(Written(lambda m, x: None, after=lambda m, x: alias(m, x).mul_(2)), 1)


@pytest.mark.parametrize("name", COPIES)
def test_what_is_written_to_a_copy(name):
    copied = COPIES[name]
    converts(Written(lambda m, x: copied(m, x).mul_(2)), 1)


# --- code that is not followed -----------------------------------------------------------------------------


def second(x, y):
    """Cannot be followed, and gives back either of what it is given."""
    return y if float(x.sum()) > 1e9 or y.ndim else x


def doubles(x):
    if float(x.sum()) < 1e9:
        x.mul_(2)
    return 1


def test_a_function_that_is_kept_whole_gives_back_its_second_argument():
    def between(m, x):
        second(torch.zeros_like(x), x).mul_(2)

    converts(Written(between), 0)


class BaseOfAView(nn.Module):
    """The value that a merge reads is an alias of the second argument of what made it."""

    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = torch.tanh(self.a(x))
        z = second(torch.zeros_like(x), x)
        y = self.n(z)
        x.mul_(2)
        return self.b(y)


def test_what_a_value_may_be_an_alias_of_is_written_to():
    converts(BaseOfAView(), 0)


def test_a_function_that_is_kept_whole_may_write():
    converts(Written(lambda m, x: doubles(x)), 0)


@pytest.mark.parametrize("kind", ["writes before", "writes after", "gives back"])
def test_hooks_may_write_to_what_they_see(kind):
    def between(m, x):
        y = m.act2(x)
        if kind == "gives back":
            y.mul_(2)

    model = Written(between)
    model.act2 = nn.Tanh()
    if kind == "writes before":
        model.act2.register_forward_pre_hook(lambda m, args: args[0].mul_(2))
    elif kind == "writes after":
        model.act2.register_forward_hook(lambda m, args, out: args[0].mul_(2))
    else:
        model.act2.register_forward_hook(lambda m, args, out: args[0])
    converts(model, 0)


# --- shapes and memory that change in place ----------------------------------------------------------------


class Transposed(nn.Module):
    def __init__(self, write, back):
        super().__init__()
        self.n, self.b = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.write, self.back = write, back

    def forward(self, x):
        x = torch.tanh(x)
        self.write(x)
        y = self.b(self.n(x))
        return F.adaptive_avg_pool2d(self.back(y) if self.back else y, (2, 3))


SHAPES = {
    "transpose_": (lambda x: x.transpose_(2, 3), 1),
    "unsqueeze_ and squeeze_": (lambda x: (x.unsqueeze_(1), x.squeeze_(1)), 1),
    "torch.swapaxes_": (lambda x: x.swapaxes_(-1, -2), 1),
    "resize_": (lambda x: x.resize_(1, 4, 6, 6), 0),
    "set_": (lambda x: x.set_(torch.ones_like(x)), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_change_in_place(name):
    for example in (False, True):
        write, merges = SHAPES[name]
        converts(Transposed(write, None), merges, torch.randn(2, 4, 6, 4, dtype=torch.float64), example)


class Assigns(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.n, self.b, self.name = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), name

    def forward(self, x):
        x = torch.tanh(x)
        setattr(x, self.name, x * 2)
        return self.b(self.n(x))


@pytest.mark.parametrize(("name", "merges"), [("data", 0), ("own", 1)])
def test_attributes_that_are_set_on_a_value(name, merges):
    converts(Assigns(name), merges)


# --- what the model holds, and writes to -------------------------------------------------------------------


class WritesBuffer(nn.Module):
    """A scale that is another at every call."""

    def __init__(self, write, scale):
        super().__init__()
        self.c = nn.Conv2d(4, 4, 1)
        self.register_buffer("scale", torch.rand(4, 1, 1, dtype=torch.float64) + 0.5)
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("var", torch.ones(4, dtype=torch.float64))
        self.write, self.scaled = write, scale

    def forward(self, x):
        y = self.c(x)
        self.write(self, x)
        return self.scaled(self, y)


BUFFERS = {
    "by a value": (lambda m, x: m.scale.mul_(x.mean()), lambda m, y: y * m.scale),
    "by a view of a value": (lambda m, x: m.scale.view(-1).copy_(x.mean((0, 2, 3))), lambda m, y: y * m.scale),
    "by out": (lambda m, x: torch.mul(m.scale, x.mean(), out=m.scale), lambda m, y: y * m.scale),
    "by itself": (lambda m, x: m.scale.mul_(1.1), lambda m, y: y * m.scale),
    "by a slice": (lambda m, x: m.scale.__setitem__(0, m.scale[0] + 1), lambda m, y: y * m.scale),
    "augmented": (lambda m, x: m.scale.add_(1), lambda m, y: y * (m.scale * 2 + 1)),
    "read as what was made of it": (lambda m, x: m.scale.mul_(x.mean()), lambda m, y: y * torch.exp(m.scale)),
    "statistics of a batch": (
        lambda m, x: F.batch_norm(x, m.mean, m.var, training=True), lambda m, y: F.batch_norm(y, m.mean, m.var)),
    "statistics of instances": (
        lambda m, x: F.instance_norm(x, m.mean, m.var), lambda m, y: F.batch_norm(y, m.mean, m.var)),
}  # fmt: skip


@pytest.mark.parametrize("name", BUFFERS)
def test_a_buffer_that_a_forward_writes_to_is_no_constant(name):
    converts(WritesBuffer(*BUFFERS[name]), 0)


class SetsBuffer(WritesBuffer):
    def forward(self, x):
        self.scale = self.write(self, x)
        return self.scaled(self, self.c(x))


class WithinABlock(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x).relu()


@pytest.mark.parametrize("set_to", [lambda m, x: -m.scale, lambda m, x: m.scale * 2, lambda m, x: m.scale + m.var[0]])
def test_a_buffer_that_a_forward_sets_to_what_it_makes_of_it_is_no_constant(set_to):
    for around in (lambda block: block, WithinABlock):
        for example in (False, True):
            converts(around(SetsBuffer(set_to, lambda m, y: y * m.scale)), 0, example=example)


def test_a_buffer_that_a_forward_only_reads_is_one():
    converts(
        WritesBuffer(lambda m, x: m.mean.add_(1), lambda m, y: y * m.scale), 0
    )  # what writes cannot be written anew
    converts(WritesBuffer(lambda m, x: m.scale.mul(2), lambda m, y: y * m.scale), 1)
    converts(
        WritesBuffer(lambda m, x: F.batch_norm(x, m.mean, m.var), lambda m, y: F.batch_norm(y, m.mean, m.var)), 2
    )  # nobody reads one


# --- chance ------------------------------------------------------------------------------------------------


class Draws(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.c, self.draw, self.generator = nn.Conv2d(4, 4, 1), draw, torch.Generator()

    def forward(self, x):
        return self.c(x) * self.draw(self)


DRAWS = {
    "uniform_": lambda m: torch.empty(4, 1, 1, dtype=torch.float64).uniform_(generator=m.generator),
    "normal_": lambda m: torch.zeros(4, 1, 1, dtype=torch.float64).normal_(generator=m.generator),
    "exponential_": lambda m: torch.zeros(4, 1, 1, dtype=torch.float64).exponential_(generator=m.generator),
    "poisson": lambda m: torch.poisson(torch.full((4, 1, 1), 5.0, dtype=torch.float64), generator=m.generator),
    "random_": lambda m: torch.zeros(4, 1, 1, dtype=torch.float64).random_(1, 9, generator=m.generator),
    "init": lambda m: nn.init.trunc_normal_(torch.zeros(4, 1, 1, dtype=torch.float64), generator=m.generator),
    "dropout": lambda m: F.dropout(torch.ones(4, 6, 6, dtype=torch.float64)),  # so many are never equal by luck
    "numpy": lambda m: float(np.random.rand()),
}


@pytest.mark.parametrize("name", DRAWS)
def test_what_is_drawn_at_every_call_is_no_constant(name):
    model = Draws(DRAWS[name]).double().eval()
    deploy = structrep.reparameterize(model)
    for _ in range(2):
        results = []
        for one in (model, deploy):
            torch.manual_seed(3), one.generator.manual_seed(5), np.random.seed(7)
            with torch.no_grad():
                results.append((one(X), one(X)))
        assert all(map(torch.equal, *results))
    assert not torch.equal(*results[0])


@pytest.mark.parametrize(
    "quiet",
    [
        lambda m: F.dropout(torch.ones(4, 1, 1, dtype=torch.float64), 0.5, False),
        lambda m: torch.dropout(torch.ones(4, 1, 1, dtype=torch.float64), 0.5, False),
        lambda m: F.rrelu(torch.ones(4, 1, 1, dtype=torch.float64)),
    ],
)
def test_what_could_draw_and_does_not_is_a_constant(quiet):
    converts(Draws(quiet), 1)


# --- questions ---------------------------------------------------------------------------------------------


class Asks(nn.Module):
    def __init__(self, ask):
        super().__init__()
        self.c, self.d, self.ask = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), ask

    def forward(self, x):
        y = self.c(x) + self.d(x)
        return self.ask(torch.relu(y))


QUESTIONS = {
    "several from linalg": lambda y: y * (2 if isinstance(torch.linalg.qr(y), tuple) else 3),
    "several from a pool": lambda y: y * (2 if isinstance(F.max_pool2d(y, 2, return_indices=True), tuple) else 3),
    "several from a topk": lambda y: y * (2 if isinstance(torch.topk(y, 2), tuple) else 3),
    "several from frexp": lambda y: y * (2 if isinstance(torch.frexp(y), (list, tuple)) else 3),
    "several from slogdet": lambda y: y * (2 if isinstance(torch.linalg.slogdet(y), torch.Tensor) else 3),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_what_is_asked_of_a_value(name):
    for example in (False, True):
        converts(Asks(QUESTIONS[name]), 1, example=example)
