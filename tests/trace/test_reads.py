"""What code asks of classes, functions, objects that are called, context variables and torch: guarded like the rest."""

import contextvars

import pytest
import torch
from torch import nn

import structrep
from tests.support.models import made
from tests.support.truth import EXACT, relative_error

X = torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
VARIABLE = contextvars.ContextVar("variable", default=False)


class Settings:
    low, scale = False, 2.0


class Called:
    def __init__(self):
        self.on = True

    def __call__(self, y):
        return y * 2 if self.on else y


post = Called()


def helper(y):
    return y * helper.scale


def switch():
    return None


def with_default(y, scale=[2.0]):  # noqa: B006
    return y * scale[0]


class Model(nn.Module):
    low = False

    def __init__(self):
        super().__init__()
        self.c, self.n, self.cfg = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), Settings

    @classmethod
    def is_low(cls):
        return cls.low


def of_class_method(self, x):
    y = self.c(x)
    return y if self.is_low() else self.n(y)


def of_settings(self, x):
    return self.n(self.c(x)) * self.cfg.scale


def path_of_settings(self, x):
    y = self.c(x)
    return y if self.cfg.low else self.n(y)


def of_function(self, x):
    return helper(self.n(self.c(x)))


def path_of_function(self, x):
    y = self.c(x)
    return y if switch.low else self.n(y)


def of_default(self, x):
    return with_default(self.n(self.c(x)))


def of_object(self, x):
    return post(self.n(self.c(x)))


def of_variable(self, x):
    y = self.c(x)
    return y if VARIABLE.get() else self.n(y)


def of_backend(self, x):
    y = self.c(x)
    return self.n(y) if torch.backends.mkldnn.enabled else y


def reset():
    Model.low = Settings.low = switch.low = False
    Settings.scale, helper.scale, post.on = 2.0, 2.0, True
    with_default.__defaults__[0][0] = 2.0
    VARIABLE.set(False)


CHANGES = {
    of_class_method: (lambda: setattr(Model, "low", True), "low"),
    of_settings: (lambda: setattr(Settings, "scale", 4.0), "self.cfg.scale"),
    path_of_settings: (lambda: setattr(Settings, "low", True), "self.cfg.low"),
    of_function: (lambda: setattr(helper, "scale", 4.0), "helper.scale"),
    path_of_function: (lambda: setattr(switch, "low", True), "switch.low"),
    of_default: (lambda: with_default.__defaults__[0].__setitem__(0, 4.0), "with_default.__defaults__"),
    of_object: (lambda: setattr(post, "on", False), "post.on"),
    of_variable: (lambda: VARIABLE.set(True), "VARIABLE.get()"),
}


@pytest.mark.parametrize(("forward", "asked"), CHANGES.items(), ids=[one.__name__ for one in CHANGES])
def test_what_is_asked_elsewhere(forward, asked):
    for inputs in ((), (X,)):
        reset()
        model = made(forward, Model)
        deploy = structrep.reparameterize(model, *inputs)
        assert isinstance(deploy.n, nn.Identity)
        assert relative_error(deploy(X), model(X)) < EXACT
        change, named = asked
        change()
        try:
            found = deploy(X)  # where the user's text stays, it asks again
            assert relative_error(found, model(X)) < EXACT
        except ValueError as error:
            assert named in str(error)  # noqa: PT017
        finally:
            reset()


def test_a_setting_of_a_backend():
    model = made(of_backend, Model)
    deploy = structrep.reparameterize(model)
    before = torch.backends.mkldnn.enabled
    with torch.backends.mkldnn.flags(enabled=not before), pytest.raises(ValueError, match=r"torch\.backends\.mkldnn"):
        deploy(X)
    assert relative_error(deploy(X), model(X)) < EXACT


def test_the_state_of_tracing():
    def forward(self, x):
        y = self.c(x)
        return y if torch._C._get_tracing_state() is not None else self.n(y)

    model = made(forward, Model)
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(X), model(X)) < EXACT
    truth = torch.jit.trace(model, X, check_trace=False)(X)
    try:
        found = torch.jit.trace(deploy, X, check_trace=False)(X)
    except ValueError as error:
        found = truth if "_get_tracing_state" in str(error) else None
    assert relative_error(found, truth) < EXACT
