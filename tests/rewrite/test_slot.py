"""Blocks whose own text asks for the merged layer. Putting it there is enough only if nothing else hangs on the text
that is no more run; otherwise the forward is changed, and does what it did."""

import contextlib

import pytest
import torch
import torch._dynamo
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import EXACT, relative_error

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LOW = False


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.n, self.act, self.low = nn.BatchNorm2d(4), nn.ReLU(), False
        self.reparam_conv = None

    def branches(self, x):
        return self.n(self.a(x)) + self.b(x)

    def forward(self, x):
        if self.reparam_conv is not None:
            return self.act(self.reparam_conv(x))
        return self.act(self.n(self.a(x)) + self.b(x))


class AsksForGrad(Block):
    def forward(self, x):
        if self.reparam_conv is not None:
            return self.act(self.reparam_conv(x))
        y = self.n(self.a(x)) + self.b(x)
        if torch.is_grad_enabled():
            return y
        return self.act(y)


class AsksForTracing(Block):
    def forward(self, x):
        if self.reparam_conv is not None:
            return self.act(self.reparam_conv(x))
        y = self.n(self.a(x)) + self.b(x)
        return y if torch.jit.is_tracing() else self.act(y)


class AsksForDynamo(Block):
    def forward(self, x):
        if self.reparam_conv is not None:
            return self.act(self.reparam_conv(x))
        y = self.n(self.a(x)) + self.b(x)
        return y if torch._dynamo.is_compiling() else self.act(y)


class AsksForABackend(Block):
    def forward(self, x):
        if self.reparam_conv is not None:
            return self.act(self.reparam_conv(x))
        y = self.n(self.a(x)) + self.b(x)
        return y if torch.backends.cudnn.benchmark else self.act(y)


class AsksInAMethod(Block):
    def branches(self, x):
        y = self.n(self.a(x)) + self.b(x)
        return y * 2 if self.low else y

    def forward(self, x):
        if self.reparam_conv is not None:
            return self.act(self.reparam_conv(x))
        return self.act(self.branches(x))


class AsksForItsFile(Block):
    def forward(self, x):
        if self.reparam_conv is not None:
            return self.act(self.reparam_conv(x))
        y = self.n(self.a(x)) + self.b(x)
        return y if LOW else self.act(y)


class AsksOnTheOtherWay(Block):
    def forward(self, x):
        if self.reparam_conv is not None:
            y = self.reparam_conv(x)
            return y.sigmoid() if self.low else self.act(y)
        return self.act(self.n(self.a(x)) + self.b(x))


def converted(cls, inputs):
    torch.manual_seed(0)
    model = settled(cls())
    plan = structrep.plan(model, *inputs)
    assert len(plan.merges) == 1
    return model, plan.reparameterize(*inputs)


@pytest.fixture(params=[(), (X,)], ids=["without inputs", "with inputs"])
def inputs(request):
    return request.param


def test_a_block_is_left_as_it_is_where_its_text_asks_for_the_layer(inputs):
    model, deploy = converted(Block, inputs)
    assert type(deploy) is Block
    assert isinstance(deploy.reparam_conv, nn.Conv2d)
    assert deploy.n is None
    assert relative_error(deploy(X), model(X)) < EXACT


@contextlib.contextmanager
def benchmark():
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize(
    ("cls", "run"),
    [
        (AsksForGrad, lambda model: model(X)),
        (AsksForTracing, lambda model: torch.jit.trace(model, X, check_trace=False)(X)),
        (AsksForDynamo, lambda model: torch.export.export(model, (X,)).module()(X)),
    ],
)
def test_what_is_asked_of_the_process_is_asked_still(cls, run, inputs):
    model, deploy = converted(cls, inputs)
    with torch.no_grad():
        assert relative_error(deploy(X), model(X)) < EXACT
    assert relative_error(run(deploy), run(model)) < EXACT


def test_a_backends_setting_is_guarded(inputs):
    model, deploy = converted(AsksForABackend, inputs)
    assert relative_error(deploy(X), model(X)) < EXACT
    with benchmark(), pytest.raises(ValueError, match=r"cudnn\.benchmark is True now"):
        deploy(X)


@pytest.mark.parametrize("cls", [AsksInAMethod, AsksOnTheOtherWay])
def test_what_a_module_is_set_to_is_asked_as_before(cls, inputs):
    model, deploy = converted(cls, inputs)
    assert relative_error(deploy(X), model(X)) < EXACT
    model.low = deploy.low = True
    assert relative_error(deploy(X), model(X)) < EXACT


def test_what_a_file_is_set_to_is_guarded(inputs, monkeypatch):
    _, deploy = converted(AsksForItsFile, inputs)
    monkeypatch.setitem(globals(), "LOW", True)
    with pytest.raises(ValueError, match="LOW is True now"):
        deploy(X)


class Published(nn.Module):
    """As RepVGG's own block is written, with its converter."""

    def __init__(self):
        super().__init__()
        self.dense, self.point = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.dense(x) + self.point(x))

    def _kernel(self, branch):
        return (0, 0) if branch is None else (branch.weight, branch.bias)

    def get_equivalent_kernel_bias(self):
        dense, point = self._kernel(self.dense), self._kernel(self.point)
        return dense[0] + point[0], dense[1] + point[1]


def test_a_converter_says_that_there_is_nothing_left_to_convert():
    _, deploy = converted(Published, ())
    with pytest.raises(RuntimeError, match="structrep has merged dense, point already"):
        deploy.get_equivalent_kernel_bias()
