"""Forwards that were traced, compiled, exported, or run under another mode or setting: as the model is."""

import copy
import io
import pickle
from typing import Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structrep
from tests.rewrite.asking import Config, X, both, converted, differs, made, written
from tests.support.models import settled
from tests.support.truth import EXACT, relative_error, says

# --- how it is run --------------------------------------------------------------------------------------------------


def test_traced_as_the_model_is():
    model, deploy = converted(
        lambda self, x: (
            (self.n(self.a(x)) + self.b(x)) if torch.jit.is_tracing() else (self.n(self.a(x)) + self.b(x)).softmax(1)
        )
    )
    truth, found = (torch.jit.trace(one, X, check_trace=False)(X) for one in (model, deploy))
    assert relative_error(found, truth) < EXACT
    assert relative_error(truth, model(X)) > 0.1


def test_compiled_as_the_model_is():
    def forward(self, x):
        y = self.n(self.a(x)) + self.b(x)
        return y * 2 if torch.compiler.is_compiling() else y.softmax(1)

    model, deploy = converted(forward)
    for run in (
        lambda one: torch.export.export(one, (X,)).module(),
        lambda one: torch.compile(one, backend="eager", fullgraph=True),
    ):
        truth, found = (run(one)(X) for one in (model, deploy))
        assert relative_error(found, truth) < EXACT
        assert relative_error(truth, 2 * (model.n(model.a(X)) + model.b(X))) < EXACT


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch.compiler has no is_exporting")
def test_exported_as_the_model_is():
    def forward(self, x):
        y = self.n(self.a(x)) + self.b(x)
        if torch.compiler.is_exporting():
            return y
        return y * 2 if torch.compiler.is_compiling() else y.softmax(1)

    model, deploy = converted(forward)
    truth, found = (torch.export.export(one, (X,)).module()(X) for one in (model, deploy))
    assert relative_error(found, truth) < EXACT
    truth, found = (torch.compile(one, backend="eager", fullgraph=True)(X) for one in (model, deploy))
    assert relative_error(found, truth) < EXACT
    assert relative_error(truth, 2 * (model.n(model.a(X)) + model.b(X))) < EXACT


def test_written_to_onnx_as_the_model_is():
    pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    model, deploy = converted(
        lambda self, x: (
            (self.n(self.a(x)) + self.b(x))
            if torch.onnx.is_in_onnx_export()
            else (self.n(self.a(x)) + self.b(x)).sigmoid()
        )
    )
    found = []
    for one in (model, deploy):
        file = io.BytesIO()
        torch.onnx.export(one.float(), (X.float(),), file, dynamo=False)
        runs = reference.ReferenceEvaluator(file.getvalue())
        found.append(torch.from_numpy(runs.run(None, {runs.input_names[0]: X.float().numpy()})[0]))
        one.double()
    assert relative_error(found[1], found[0]) < 1e-5
    assert relative_error(found[0], model(X)) > 0.1


@pytest.mark.parametrize(
    ("ask", "run"),
    [
        (torch.is_grad_enabled, torch.enable_grad),
        (torch.is_inference_mode_enabled, torch.inference_mode),
        (lambda: torch.is_grad_enabled() and torch.is_inference_mode_enabled(), torch.inference_mode),
    ],
)
def test_under_another_mode(ask, run):
    model, deploy = converted(
        lambda self, x: (self.n(self.a(x)) + self.b(x)) * 2 if ask() else (self.n(self.a(x)) + self.b(x)).softmax(1)
    )
    for around in (torch.no_grad, run):
        with around():
            assert differs(model, deploy, X) is None


@pytest.mark.parametrize(
    ("ask", "set_", "now", "before"),
    [
        (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True, False),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high", "highest"),
    ],
)
def test_under_another_setting_of_torch(ask, set_, now, before):
    model, deploy = converted(lambda self, x: both(self, x) * 2 if ask() == before else both(self, x).softmax(1))
    set_(now)
    try:
        error = differs(model, deploy, X)
    finally:
        set_(before)
    assert error is None or ask.__name__ in error


@pytest.mark.parametrize("ask", [lambda x: x.grad_fn, lambda x: x.grad])
def test_what_a_traced_value_cannot_say_keeps_the_forward(ask):
    model = made(lambda self, x: both(self, x) * (2 if ask(x) is None else 1))
    assert "of a value that depends on the input" in str(structrep.plan(model).refusals)
    assert differs(model, structrep.reparameterize(model), X) is None


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: torch.fx._symbolic_trace.is_fx_tracing(),
        lambda x: torch.overrides.has_torch_function((x, torch.ones(1))),
        lambda x: torch.overrides.has_torch_function_unary(x),
    ],
)
def test_a_trace_is_not_to_be_seen(ask):
    converted(lambda self, x: both(self, x) * (2 if ask(x) else 1))


def test_asked_by_another_name():
    from torch import is_grad_enabled as grad
    from torch.jit import is_tracing as tracing

    model, deploy = converted(
        lambda self, x: (
            (self.n(self.a(x)) + self.b(x)) * 2 if tracing() or grad() else (self.n(self.a(x)) + self.b(x)).softmax(1)
        )
    )
    with torch.enable_grad():
        assert differs(model, deploy, X) is None
    with torch.no_grad():
        assert differs(model, deploy, X) is None
        truth, found = (torch.jit.trace(one, X, check_trace=False)(X) for one in (model, deploy))
    assert relative_error(found, truth) < EXACT


def test_a_question_that_changes_nothing_is_not_asked_again():
    def forward(self, x):
        exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6 has none
        if torch.jit.is_tracing() or exporting() or torch.is_grad_enabled():
            pass
        return (self.n(self.a(x)) + self.b(x)).relu()

    _, deploy = converted(forward)
    assert "raise" not in written(deploy)
    torch.export.export(deploy, (X,))


def test_what_is_asked_only_when_it_is_run_otherwise_is_guarded_there():
    model, deploy = converted(
        lambda self, x: (self.n(self.a(x)) + self.b(x)) * (3 if torch.is_grad_enabled() and self.flag else 1)
    )
    model.flag = deploy.flag = True
    with torch.no_grad():
        assert differs(model, deploy, X) is None
    with torch.enable_grad():
        assert "self.flag" in differs(model, deploy, X)


def test_what_is_merged_is_used_otherwise_when_it_is_run_otherwise():
    def forward(self, x):
        y = self.a(x)
        return y if torch.jit.is_tracing() else self.n(y)

    plan = structrep.plan(made(forward))
    assert not plan.merges
    assert "gives back a, which would be gone, where torch.jit.is_tracing() is True" in str(plan.refusals)


# --- all else goes on -------------------------------------------------------------------------------------------------


class Scriptable(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.h = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.n, self.low, self.flag, self.config = nn.BatchNorm2d(4), 0.0, False, Config()


class Flagged(Scriptable):
    def forward(self, x, pre: bool = False, mask: Optional[Tensor] = None):  # noqa: UP045
        y = (self.n(self.a(x)) + self.b(x)).clamp(min=self.low, max=self.low + 9.0)
        if self.flag:
            y = y * 2
        if mask is not None:
            y = y * mask
        return y if pre else F.relu(y)


class Configured(Scriptable):
    def forward(self, x):
        y = (self.n(self.a(x)) + self.b(x)).clamp(min=self.low, max=self.low + 9.0)
        if not torch.jit.is_scripting():
            y = y * self.config.eps * 2
        return y.to(self.h.weight.dtype)


@pytest.mark.parametrize("cls", [Flagged, Configured])
def test_a_deploy_model_goes_everywhere(cls):
    torch.manual_seed(0)
    model = settled(cls())
    deploy = structrep.reparameterize(model, X)
    truth = model(X)
    assert hasattr(type(deploy), "__structrep_methods__")
    ways = {
        "scripted": torch.jit.script(deploy),
        "traced": torch.jit.trace(deploy, X),
        "exported": torch.export.export(deploy, (X,)).module(),
        "compiled": torch.compile(deploy, backend="eager", fullgraph=True),
        "copied": copy.deepcopy(deploy),
        "pickled": pickle.loads(pickle.dumps(deploy)),
        "converted twice": structrep.reparameterize(deploy, X),
    }
    for way, one in ways.items():
        assert relative_error(one(X), truth) < EXACT, way
    model.low = 1.0
    for one in (ways["scripted"], ways["copied"], ways["pickled"], ways["converted twice"], deploy):
        one.low = 1.0
        assert relative_error(one(X), model(X)) < EXACT


def test_flags_among_arguments_script():
    torch.manual_seed(0)
    model = settled(Flagged())
    scripted = torch.jit.script(says(structrep.plan(model, X), 1).reparameterize(X))
    mask = torch.rand(1, 4, 1, 1)
    for more in ((True,), (False, mask), (True, mask)):
        assert relative_error(scripted(X, *more), model(X, *more)) < EXACT
