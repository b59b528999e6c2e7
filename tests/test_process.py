"""Conversions in several threads, and threads that do something else meanwhile: right results, a process as it was."""

import contextlib
import ctypes
import gc
import importlib
import threading
import time
from types import FunctionType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import structrep
from structrep import process
from structrep.deployed.methods import _CLASSES
from tests.support.models import settled
from tests.support.truth import EXACT, relative_error

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def sized_pad(x):
    """Is kept whole: it asks for a number."""
    return F.pad(x, (0, int(x.shape[-1]) % 2, 0, 0), mode="constant", value=float(x.shape[0]) * 0)


def scaled(x, *, by=2.0):
    """A keyword of its own, while its code is exchanged."""
    return x * by if int(x.shape[0]) else x


class Block(nn.Module):
    """A sum, for which a graph is written anew."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.a(x) + self.b(x)


HELPERS = [sized_pad, scaled]


class Net(nn.Module):
    """A written sum, a helper that is kept whole, a size for a factory, a question about types."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.c, self.m = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        if not isinstance(x, Tensor):
            raise TypeError("a tensor, please")
        y = torch.relu(self.n(self.a(x) + self.b(x)))
        y = scaled(sized_pad(y), by=3.0)
        return self.m(self.c(y)) + torch.zeros(x.shape[0], 4, 1, 1, dtype=torch.float64)


def tracing():
    """Whether torch.fx traces, as torch asks itself: torch 2.6 has one name for it, later ones warn of that."""
    space = torch.fx._symbolic_trace
    return getattr(space, "is_fx_symbolic_tracing", space.is_fx_tracing)()


def state():
    """All that a conversion changes for a process, as it is now."""
    spaces = [torch, Tensor, torch._C.TensorBase, nn.Module, F, torch.fx._symbolic_trace, fx.Tracer, fx.Proxy]
    found = {(str(space), name): id(value) for space in spaces for name, value in vars(space).items()}
    found |= {(helper.__name__, "code"): (helper.__code__, str(helper.__kwdefaults__)) for helper in HELPERS}
    found["flags"] = (
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), tracing(),
        "isinstance" in globals(), len(process._undo), process._depth,
    )  # fmt: skip
    return {key: value for key, value in found.items() if "cache" not in str(key) and "_dict_" not in str(key)}


@contextlib.contextmanager
def unchanged():
    structrep.reparameterize(settled(Net()).double(), X)  # what is loaded at first use
    before = state()
    yield
    after = state()
    assert {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} == set()


def in_threads(*functions):
    """Run functions side by side, changing threads often; raises what the first that fails has raised."""
    errors = []
    gate = threading.Barrier(len(functions))

    def guarded(function):
        gate.wait()
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture
def often():
    import sys

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def test_eight_threads_convert_five_models_each(often):
    models = [[settled(Net()).double() for _ in range(5)] for _ in range(8)]
    merges = len(structrep.plan(models[0][0]).merges)

    def convert(mine):
        for model in mine:
            plan = structrep.plan(model)
            assert len(plan.merges) == merges == 2
            assert relative_error(plan.reparameterize()(X), model(X)) < EXACT

    with unchanged():
        drawn = torch.get_rng_state()
        in_threads(*(lambda mine=mine: convert(mine) for mine in models))
        assert torch.equal(drawn, torch.get_rng_state())


def test_one_class_for_one_text(often):
    models = [settled(Net()).double() for _ in range(8)]
    found = []
    _CLASSES.clear()
    in_threads(*(lambda model=model: found.append(type(structrep.reparameterize(model))) for model in models))
    assert len(set(found)) == 1


def test_one_plan_is_applied_in_several_threads(often):
    model = settled(Net()).double()
    plan, found = structrep.plan(model), []
    in_threads(*[lambda: found.append(plan.apply())] * 4)
    assert all(relative_error(one(X), model(X)) < EXACT for one in found)


def busy(done, function):
    def run():
        while not done.is_set():
            function()

    return run


OTHERS = {}


def other(function):
    OTHERS[function.__name__] = function
    return function


@other
def infers():
    model = settled(Net()).double()
    truth = model(X)
    return lambda: assert_equal(model(X), truth)


@other
def trains():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2)).double()

    def step():
        loss = model(X).sum()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        model.zero_grad()

    return step


@other
def loads():
    def step():
        assert torch.zeros(3, 4).shape == (3, 4)
        assert torch.arange(6).view(2, 3).expand(4, 2, 3).reshape(-1).numel() == 24
        assert torch.is_tensor(X)
        assert not torch.is_tensor(3)
        assert isinstance(X, Tensor)

    return step


@other
def calls_what_is_kept_whole():
    def step():
        assert scaled(X, by=4.0) is not X
        assert torch.equal(scaled(X), X * 2)
        assert torch.equal(sized_pad(X), X)

    return step


@other
def asks_for_tracing():
    importlib.import_module("torch._dynamo")  # which wraps what traces

    def step():
        assert not tracing()

    return step


def assert_equal(value, truth):
    assert type(value) is Tensor
    assert torch.equal(value, truth)


@pytest.mark.parametrize("name", OTHERS)
def test_other_threads_see_what_they_always_see(name, often):
    done = threading.Event()
    graph = fx.symbolic_trace(settled(Block()))

    def convert():
        try:
            for _ in range(3):
                model = settled(Net()).double()
                assert relative_error(structrep.reparameterize(model, X)(X), model(X)) < EXACT
                structrep.reparameterize(graph)
        finally:
            done.set()

    with unchanged():
        in_threads(convert, busy(done, OTHERS[name]()), busy(done, OTHERS[name]()))


class Pauses(nn.Module):
    """Stops in the middle of being traced, until another thread has looked."""

    def __init__(self, reached, go):
        super().__init__()
        self.a, self.n = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.__dict__["gates"] = (reached, go)

    def forward(self, x):
        y = self.n(self.a(x))
        reached, go = self.gates
        reached.set()
        go.wait(20)
        return y

    def __deepcopy__(self, memo):
        twin = Pauses(*self.gates).double().eval()
        twin.load_state_dict(self.state_dict())
        return twin


@pytest.mark.parametrize("name", OTHERS)
def test_another_thread_in_the_middle_of_a_trace(name):
    reached, go = threading.Event(), threading.Event()
    model = settled(Pauses(reached, go)).double()
    step, found = OTHERS[name](), []

    def look():
        try:
            assert reached.wait(20)
            assert torch.zeros(1).shape == (1,)
            step()
        finally:
            go.set()

    with unchanged():
        in_threads(lambda: found.append(structrep.plan(model)), look)
    assert len(found[0].merges) == 1


# --- it is put back, whatever happens ----------------------------------------------------------------------


class Raises(Net):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        super().forward(x)
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_forward_that_is_interrupted(error):
    with unchanged(), pytest.raises(error):
        structrep.plan(settled(Raises(error)).double())


class Converts(Net):
    """Converts another model as it runs."""

    def forward(self, x):
        other = structrep.reparameterize(self.other)
        return super().forward(x) + float(other(X).sum()) * 0

    def __init__(self):
        super().__init__()
        self.__dict__["other"] = settled(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).double()


def test_a_forward_that_converts():
    model = settled(Converts()).double()
    with unchanged():
        plan = structrep.plan(model)
        deploy = plan.reparameterize()
    assert relative_error(deploy(X), model(X)) < EXACT


class Patches(Net):
    """Exchanges what we exchange, as it runs, and puts it back."""

    def forward(self, x):
        before = torch.zeros
        torch.zeros = lambda *args, **kwargs: before(*args, **kwargs)
        try:
            return super().forward(x)
        finally:
            torch.zeros = before


def test_a_forward_that_patches():
    model = settled(Patches()).double()
    with unchanged():
        deploy = structrep.reparameterize(model)
    assert relative_error(deploy(X), model(X)) < EXACT


def test_interrupts_at_any_time(often):
    """Ctrl-C, sent to a thread that converts, after more and more time: wherever it comes, all is put back."""
    model = settled(Net()).double()
    start = time.perf_counter()
    with unchanged():
        structrep.plan(model)
        took = time.perf_counter() - start
        hit = 0
        for index in range(25):
            done = []

            def convert(done=done):
                with contextlib.suppress(KeyboardInterrupt):
                    structrep.plan(model)
                    done.append(True)

            thread = threading.Thread(target=convert)
            thread.start()
            time.sleep(took * index / 25)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt)
            )
            thread.join()
            hit += not done
        gc.collect()
        assert hit
        assert len(structrep.plan(model).merges) == 2


@pytest.mark.parametrize("at", range(12))
def test_an_interrupt_while_it_is_put_back(at):
    """An interrupt as one thing after another is put back: the others are put back all the same."""

    class Owner:
        first, second, third = 1, 2, 3

    steps = []

    def interrupt():
        steps.append(1)
        if len(steps) == at // 4 + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) if at // 4 < 1 else contextlib.nullcontext(), process.alone():
        process.change(Owner, "first", 10)
        process.afterwards(interrupt)
        process.change(Owner, "second", 20)
    assert (Owner.first, Owner.second, process._undo) == (1, 2, [])


def test_functions_have_their_code_again():
    assert all(isinstance(helper, FunctionType) and helper.__code__.co_name == helper.__name__ for helper in HELPERS)
