"""Models as they come about outside of files, and longer than Python's stack is deep."""

import functools
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from structrep.errors import BadInput
from tests.support.models import noise, settled
from tests.support.truth import CLOSE, EXACT, check, relative_error

X = torch.randn(1, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

# --- source that is nowhere ------------------------------------------------------------------------

MOODY = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.point = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.dense(x) + self.point(x)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(x)
"""


def executed(**namespace):
    found = {"nn": nn, **namespace}
    exec(MOODY, found)
    return settled(found["Model"]())


def test_a_note_says_whose_source_is_nowhere(tmp_path):
    plan = structrep.plan(executed(__name__="typed"))
    assert len(plan.merges) == 1
    (note,) = plan.notes
    assert "no source of Model, Block" in note
    assert plan.record.notes == plan.notes
    assert note in plan.record.model_dump_json()
    assert "no source of Model" in " ".join(str(plan).split())
    plan.report(tmp_path / "page.html")
    assert note in (tmp_path / "page.html").read_text()


def test_no_note_where_there_is_source():
    assert not structrep.plan(settled(nn.Sequential(nn.Conv2d(3, 4, 3), Plain()))).notes
    assert not structrep.plan(torch.fx.symbolic_trace(settled(Plain(4)))).notes
    assert not structrep.plan(structrep.reparameterize(settled(Plain()))).notes


def test_classes_that_are_in_no_module():
    namespace = {"nn": nn, "forward": Plain.forward, "start": start}
    exec("Bare = type('Bare', (nn.Module,), {'forward': forward, '__init__': start})", namespace)
    exec("def scaled(x):\n    return x * 2.0", namespace)  # whose module is None
    namespace["Bare"].forward = lambda self, x: namespace["scaled"](Plain.forward(self, x)).relu()
    model = settled(nn.Sequential(namespace["Bare"](), nn.Conv2d(4, 4, 1)))
    assert "__module__" not in vars(type(model[0]))
    deploy = structrep.reparameterize(model, X)
    assert len(structrep.plan(model).merges) == 2
    assert relative_error(deploy(X), model(X)) < EXACT


def start(self):
    nn.Module.__init__(self)
    self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    self.norm, self.last, self.between = nn.BatchNorm2d(4), nn.BatchNorm2d(4), torch.relu


# --- long graphs -----------------------------------------------------------------------------------


class Plain(nn.Module):
    """Two layers with norms, and something in between."""

    def __init__(self, channels=3, between=lambda y: y):
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.between = between

    def forward(self, x):
        return self.last(self.second(self.between(self.norm(self.first(x)))))


def repeated(step, count):
    def between(y):
        for _ in range(count):
            y = step(y)
        return y

    return between


def counted(y):
    size = y.shape[0]
    for _ in range(100):
        size = size + 1
    return y.relu().reshape(size - 100, 4, *y.shape[2:]) if isinstance(size, int) else y


def asked(y):
    for _ in range(150):
        y = y.sin()
    return y.relu() if isinstance(y, torch.Tensor) else y


class Computed(Plain):
    """A kernel at the end of a long computation."""

    def forward(self, x):
        weight = self.first.weight
        for _ in range(150):
            weight = weight * 1.001
        return self.norm(F.conv2d(x, weight, padding=1))


class Added(Plain):
    """A sum of many addends, all of one input."""

    def forward(self, x):
        y = self.first(x)
        for _ in range(80):
            y = y + self.first(x)
        return self.norm(y)


class Fed(Plain):
    """Sums inside each other, each of which adds the input."""

    def forward(self, x):
        x = self.first(x)
        y = x
        for _ in range(60):
            y = x + self.second(y)
        return y


LONG = {
    "functions": (lambda: Plain(between=repeated(torch.sin, 300)), 2),
    "questions at the end": (lambda: Plain(between=asked), 2),
    "scales": (lambda: Plain(between=repeated(lambda y: y * 0.999 + 0.001, 60)), 2),
    "permutes": (lambda: Plain(between=repeated(lambda y: y.permute(0, 2, 3, 1).permute(0, 3, 1, 2), 60)), 2),
    "residuals": (lambda: Plain(between=repeated(lambda y: 0.5 * (y + torch.relu(y)), 60)), 2),
    "dense": (lambda: Plain(between=repeated(lambda y: torch.cat([y.relu(), y], 1)[:, 2:6], 60)), 2),
    "nothing": (lambda: nn.Sequential(*[nn.Identity() for _ in range(150)], Plain()), 2),
    "a kernel": (Computed, 1),
    "sizes": (lambda: Plain(between=counted), 2),
    "addends": (Added, None),
    "sums in sums": (Fed, None),
    "layers": (
        lambda: nn.Sequential(*[one for _ in range(60) for one in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())]),
        60,
    ),
}


def depth():
    frame, count = sys._getframe(), 0
    while frame is not None:
        frame, count = frame.f_back, count + 1
    return count


@pytest.mark.parametrize("kind", LONG)
def test_long_graphs_need_no_deep_stack(kind):
    make, merges = LONG[kind]
    model = settled(make())
    structrep.plan(model)  # what is loaded at first use needs more
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(depth() + 220)
    try:
        plan = structrep.plan(model)
        deploy = plan.reparameterize()
        plan.drawing(deploy)
        plan.why(*[name for name, _ in model.named_modules() if name][:2])
    finally:
        sys.setrecursionlimit(before)
    assert not [refusal for refusal in plan.refusals if "recursion" in refusal.reason]
    assert merges is None or len(plan.merges) == merges
    assert relative_error(deploy(X), model(X)) < EXACT


# --- odd and ordinary ------------------------------------------------------------------------------


def with_partial():
    model = Plain()
    model.forward = functools.partial(model.forward)
    return model


def with_method():
    model = Plain()
    plain = type(model).forward
    model.forward = (lambda self, x: plain(self, x)).__get__(model)
    return model


class Finds(Plain):
    """What is not found here is looked for in its first layer, as wrappers do."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("first"), name)


class Calls(Plain):
    def __call__(self, x):
        return super().__call__(x) * 2


class Nested(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


SET_UPS = {
    "a partial as forward": with_partial,
    "a method as forward": with_method,
    "__getattr__": Finds,
    "__call__ of the model": Calls,
    "__call__ of a part": lambda: Nested(Calls()),
    "a wrapper of all arguments": lambda: Nested(Plain()),
    "DataParallel inside": lambda: Nested(nn.DataParallel(Plain())),
    "compiled in DataParallel": lambda: nn.DataParallel(torch.compile(Plain(), backend="eager")),
    "DataParallel, compiled": lambda: torch.compile(nn.DataParallel(Plain()), backend="eager"),
    "frozen": lambda: Plain().requires_grad_(False),
}


@pytest.mark.parametrize("kind", SET_UPS)
def test_set_ups(kind):
    for inputs in (None, X):
        torch.compiler.reset()
        model = SET_UPS[kind]()
        settled(model)
        deploy = structrep.reparameterize(model, inputs)
        assert len(structrep.plan(model, inputs).merges) == 2
        assert relative_error(deploy(X), model(X)) < EXACT


def test_what_cannot_be_copied_is_said():
    model = settled(Plain())
    model.lock = threading.Lock()
    with pytest.raises(BadInput, match=r"cannot be copied: TypeError: cannot pickle '_thread\.lock'"):
        structrep.plan(model)


class Unhashable(Plain):
    def __eq__(self, other):
        return self is other

    __hash__ = None


class Untrue(Plain):
    def __bool__(self):
        raise TypeError("no truth value")


def test_classes_with_an_equality_or_a_truth_of_their_own():
    with pytest.raises(BadInput, match="needs a __hash__ too"):
        structrep.plan(Unhashable().eval())
    model = settled(Untrue())
    assert relative_error(structrep.reparameterize(model, X)(X), model(X)) < EXACT


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = settled(Plain())
    deploy = structrep.reparameterize(model, X)
    assert len(structrep.plan(model).merges) == 2
    with torch.no_grad():
        assert relative_error(deploy(X), model(X)) < EXACT


# --- names ------------------------------------------------------------------------------------------------------


conv = {"a": {}}  # a name that forwards use for something else


class LocalName(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))

    def forward(self, x):
        for conv in self.layers:
            x = conv(x)
        return x


def test_a_local_name_that_is_a_dict_outside():
    check(LocalName(), noise(1, 4, 3, 3), merges=1, within=CLOSE)


ASKING = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.n(self.c(x))
        if x.mean() > 0:
            y = y + 1
        return y * 2
"""


def test_a_question_without_source_has_a_place():
    found = {"nn": nn, "__name__": "typed"}
    exec(ASKING, found)
    plan = structrep.plan(settled(found["Model"]()), torch.rand(1, 3, 6, 6, dtype=torch.float64))
    reasons = [one.reason for one in plan.refusals if "which holds for the example alone" in one.reason]
    assert reasons
    assert all("asks for something (<string>:9)" in one for one in reasons)
