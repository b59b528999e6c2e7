"""A written forward never answers for yesterday: what it was told as it was traced is asked again, or guarded.

Each program is converted, then changed like the model that it came from: it does what that does, or raises an error
that names what was changed. Silently other is never right.
"""

import collections
import copy
import datetime
import enum
import functools
import inspect
import io
import itertools
import os
import pickle
import random
import secrets
import sys
import time
import types
import uuid
from typing import Optional

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structrep
from tests.support.models import settled
from tests.support.truth import relative_error

X = torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SETTINGS = {"t": 0.5, "u": 2.0}
LOW = 0.25
HERE = sys.modules[__name__]


class Kind(enum.Enum):
    SOFT = 1
    HARD = 2


class Config:
    def __init__(self):
        self.eps, self.other, self.inner = 0.5, 1.0, types.SimpleNamespace(k=2.0)


def both(model, x):
    return model.n(model.a(x)) + model.b(x)


class Part(nn.Module):
    def forward(self, x, factor):
        return x.relu() * factor


class Two(nn.Module):
    """Two branches, a head, and settings of all kinds."""

    of_class = 0.5

    def __init__(self):
        super().__init__()
        self.a, self.b, self.h = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.n, self.idle = nn.BatchNorm2d(4), nn.Identity()
        self.low, self.other, self.factor, self.none, self.name = 0.0, 1.0, 0.5, None, "relu"
        self.part, self.zero_grad = Part(), 0.5
        self.flag, self.export, self.inplace = False, False, False
        self.cfg, self.sizes, self.config = {"t": 0.1, "u": 2.0, "deep": {"k": 1.5}}, [1.0, 2.0], Config()
        self.space, self.act, self.kind = types.SimpleNamespace(k=0.5), F.relu, Kind.SOFT
        self.plain, self.kept_dtype = torch.ones(1, dtype=torch.float64), torch.float64
        self.held = {"t": torch.ones(1, dtype=torch.float64), 3: [torch.ones(1, dtype=torch.float64)]}
        self.config.scale = torch.ones(1, dtype=torch.float64)
        self.drop, self.act_layer, self.tail = nn.Dropout(0.0), nn.Tanh(), nn.ModuleList([nn.Tanh(), nn.Tanh()])
        self.low_tensor = torch.tensor(1.0, dtype=torch.float64)
        self.register_buffer("on", torch.tensor(False))
        self.many, self.array, self.scalar = (
            torch.ones(40, dtype=torch.float64),
            numpy.array([1.0, 2.0]),
            numpy.float32(0.5),
        )
        self.idle.on, self.tail.k, self.named = False, 1.0, nn.ModuleDict({"y": nn.Tanh()})

    @property
    def of_property(self):
        return self.low + 1

    def limit(self):
        return LOW * self.other


def made(forward, base=Two):
    torch.manual_seed(0)
    return settled(type("Made", (base,), {"forward": forward, "__module__": __name__})())


def converted(forward, merges=1, base=Two):
    model = made(forward, base)
    plan = structrep.plan(model)
    assert len(plan.merges) == merges, plan.refusals
    deploy = plan.apply()
    assert relative_error(deploy(X), model(X)) < 1e-12
    return model, deploy


def written(deploy):
    return inspect.getsource(type(deploy).forward)


def differs(model, deploy, *inputs):
    """The error that a deploy model raises; it gives what its model gives, if it raises none."""
    truth = model(*inputs)
    try:
        found = deploy(*inputs)
    except (ValueError, AssertionError) as error:
        if "reparameterized for" not in str(error):
            raise
        return str(error)
    assert found.dtype == truth.dtype
    assert relative_error(found, truth) < (1e-12 if truth.dtype == torch.float64 else 2e-2)
    return None


# --- attributes, entries, names -------------------------------------------------------------------------------------

PROGRAMS = []


def program(change, named):
    """A forward; what is changed later; what an error has to name, None if the deploy model goes on like the model."""

    def add(forward):
        PROGRAMS.append(pytest.param(forward, change, named, id=forward.__name__))
        return forward

    return add


def sets(**values):
    return lambda model: [setattr(model, name, value) for name, value in values.items()]


@program(sets(low=1.0), None)
def clamp(self, x):
    return (self.n(self.a(x)) + self.b(x)).clamp(min=self.low)


@program(sets(low=1.0), None)
def bound_that_is_computed(self, x):
    return (self.n(self.a(x)) + self.b(x)).clamp(min=self.low + 0.5)


@program(sets(low=1.0), None)
def bound_that_is_asked_twice(self, x):
    return (self.n(self.a(x)) + self.b(x)).clamp(min=self.low) * (1 if self.low < 0.5 else 2)


@program(sets(other=3.0), None)
def operand(self, x):
    return self.h((self.n(self.a(x)) + self.b(x)).relu() ** self.other)


@program(sets(sizes=[3.0, 1.0]), None)
def list_as_an_argument(self, x):
    return F.pad(self.n(self.a(x)) + self.b(x), [1, 1], value=self.sizes[0])


@program(sets(other=3.0), None)
def factor_of_one(self, x):
    return (self.n(self.a(x)) + self.b(x)) * self.other


@program(sets(factor=3.0), "self.factor")
def factor_that_is_merged(self, x):
    return (self.n(self.a(x)) + self.b(x)) * self.factor


@program(sets(flag=True), None)
def flag(self, x):
    return (self.n(self.a(x)) + self.b(x)) if self.flag else (self.n(self.a(x)) + self.b(x)).softmax(1)


@program(sets(export=True), None)
def head_of_a_detector(self, x):
    y = self.n(self.a(x)) + self.b(x)
    return y if self.export else y.sigmoid()


@program(sets(other=5.0), None)
def only_the_untaken_path_reads_it(self, x):
    return (self.n(self.a(x)) + self.b(x)) * self.other if self.flag else (self.n(self.a(x)) + self.b(x)).relu()


@program(lambda m: m.cfg.update(t=1.0), None)
def entry(self, x):
    return (self.n(self.a(x)) + self.b(x)).clamp(min=self.cfg["t"])


@program(lambda m: m.cfg.update(u=1.0), None)
def another_entry(self, x):
    return (self.n(self.a(x)) + self.b(x)).clamp(min=self.cfg["t"])


@program(lambda m: m.cfg["deep"].update(k=1.0), "self.cfg['deep']['k']")
def nested_entry(self, x):
    return (self.n(self.a(x)) + self.b(x)) * self.cfg["deep"]["k"]


@program(lambda m: m.cfg.update(v=3.0), "self.cfg.get('v', 0.5)")
def entry_that_was_missing(self, x):
    return (self.n(self.a(x)) + self.b(x)) * self.cfg.get("v", 0.5)


@program(lambda m: m.cfg.update(t=1.0), None)
def dict_by_another_name(self, x):
    cfg = self.cfg
    return (self.n(self.a(x)) + self.b(x)).clamp(min=cfg["t"])


@program(lambda m: m.sizes.append(3.0), "self.sizes")
def loop_over_a_list(self, x):
    y = self.n(self.a(x)) + self.b(x)
    for size in self.sizes:
        y = y * size
    return y


@program(lambda m: setattr(m.config, "eps", 1.0), "self.config.eps")
def configuration(self, x):
    return (self.n(self.a(x)) + self.b(x)) + self.config.eps


@program(lambda m: setattr(m.config, "other", 2.0), None)
def another_setting_of_a_configuration(self, x):
    return (self.n(self.a(x)) + self.b(x)) + self.config.eps


def helper(y, config, model):
    return y * config.eps + getattr(model, "low")  # noqa: B009


@program(lambda m: setattr(m.config, "eps", 1.0), "self.config.eps")
def configuration_in_a_helper(self, x):
    return helper((self.n(self.a(x)) + self.b(x)), self.config, self)


@program(sets(low=1.0), "self.low")
def attribute_in_a_helper(self, x):
    return helper((self.n(self.a(x)) + self.b(x)), self.config, self)


@program(lambda m: setattr(m.config.inner, "k", 1.0), "self.config.inner.k")
def configuration_inside_another(self, x):
    return (self.n(self.a(x)) + self.b(x)) * self.config.inner.k


@program(lambda m: setattr(m.space, "k", 1.0), "self.space.k")
def simple_namespace(self, x):
    return (self.n(self.a(x)) + self.b(x)) * self.space.k


@program(sets(low=1.0), "self.low")
def property_of_an_attribute(self, x):
    return (self.n(self.a(x)) + self.b(x)) * self.of_property


@program(sets(of_class=1.0), "self.of_class")
def class_attribute(self, x):
    return (self.n(self.a(x)) + self.b(x)) * self.of_class


@program(sets(gone=True), None)
def attribute_that_was_missing(self, x):
    return (self.n(self.a(x)) + self.b(x)) * (2 if getattr(self, "gone", False) else 1)


@program(sets(none=1.0), None)
def attribute_that_was_none(self, x):
    y = self.n(self.a(x)) + self.b(x)
    return y if self.none is None else y * self.none


@program(sets(act=F.silu), None)
def function_as_an_attribute(self, x):
    return self.act(self.n(self.a(x)) + self.b(x))


@program(sets(kind=Kind.HARD), None)
def member_of_an_enumeration(self, x):
    return (self.n(self.a(x)) + self.b(x)) if self.kind is Kind.HARD else (self.n(self.a(x)) + self.b(x)).relu()


@program(sets(name="silu"), None)
def function_by_name(self, x):
    return getattr(F, self.name)(self.n(self.a(x)) + self.b(x))


@program(sets(plain=torch.full((1,), 3.0, dtype=torch.float64)), None)
def plain_tensor_that_is_replaced(self, x):
    return (self.n(self.a(x)) + self.b(x)).relu() * self.plain


@program(sets(plain=torch.full((1,), 3.0, dtype=torch.float64)), "self.plain that was merged")
def plain_tensor_that_is_merged(self, x):
    return (self.n(self.a(x)) + self.b(x)) * self.plain


THREE = torch.full((1,), 3.0, dtype=torch.float64)


@program(lambda model: model.held.update(t=THREE), None)
def plain_tensor_in_a_dict_that_is_replaced(self, x):
    return (self.n(self.a(x)) + self.b(x)).relu() * self.held["t"]


@program(lambda model: model.held[3].__setitem__(0, THREE), None)
def plain_tensors_in_a_list_that_are_replaced(self, x):
    y = (self.n(self.a(x)) + self.b(x)).relu()
    for tensor in self.held[3]:
        y = y * tensor
    return y


@program(lambda model: setattr(model.config, "scale", THREE), None)
def plain_tensor_of_an_object_that_is_computed_with_and_replaced(self, x):
    return (self.n(self.a(x)) + self.b(x)).relu() * (self.config.scale + 1)


@program(lambda model: model.held.update(t=THREE), "self.held['t'] that was merged")
def plain_tensor_in_a_dict_that_is_merged(self, x):
    return (self.n(self.a(x)) + self.b(x)) * (2 * self.held["t"])


@program(lambda model: setattr(model.config, "scale", THREE), "self.config.scale that was merged")
def plain_tensor_of_an_object_that_is_merged(self, x):
    return (self.n(self.a(x)) + self.b(x)) * self.config.scale


@program(sets(other=3.0), None)
def argument_of_a_part(self, x):
    return self.part(self.n(self.a(x)) + self.b(x), self.other)


@program(sets(zero_grad=3.0), "self.zero_grad")
def attribute_with_the_name_of_a_method(self, x):
    return (self.n(self.a(x)) + self.b(x)) * self.zero_grad


# of parts that are torch's own


@program(lambda m: setattr(m.drop, "p", 0.5), None)
def setting_of_a_layer(self, x):
    return both(self, x) * (1 - self.drop.p)


@program(lambda m: setattr(m.drop, "p", 0.5), None)
def setting_that_is_handed_on(self, x):
    return both(self, x).clamp(max=self.drop.p)


@program(lambda m: setattr(m.idle, "on", True), None)
def flag_on_a_layer(self, x):
    return both(self, x).relu() if self.idle.on else both(self, x)


@program(sets(h=nn.Conv2d(4, 9, 1, dtype=torch.float64)), "self.h.out_channels")
def setting_of_a_layer_that_is_replaced(self, x):
    return both(self, x) * self.h.out_channels


@program(lambda m: setattr(m.h, "scale", 2.0), None)
def setting_that_a_layer_did_not_have(self, x):
    return both(self, x) * getattr(self.h, "scale", 1.0)


@program(lambda m: setattr(m.tail, "k", 3.0), None)
def setting_of_a_container(self, x):
    return both(self, x) * self.tail.k


@program(lambda m: m.tail.append(nn.Softmax(1)), None)
def loop_over_parts(self, x):
    y = both(self, x)
    for layer in self.tail:
        y = layer(y)
    return y


@program(lambda m: m.tail.append(nn.Softmax(1)), "len(self.tail)")
def how_many_parts_there_are(self, x):
    return both(self, x) * len(self.tail)


@program(lambda m: m.named.update({"z": nn.Tanh()}), None)
def whether_there_is_a_part_of_a_name(self, x):
    return both(self, x) * (2 if "z" in self.named else 1)


@program(lambda m: m.named.update({"z": nn.Tanh()}), None)
def loop_over_named_parts(self, x):
    y = both(self, x)
    for name, layer in self.named.items():
        y = layer(y) + len(name)
    return y


@program(sets(act_layer=nn.ReLU()), "isinstance(self.act_layer, 'torch.nn.modules.activation.Tanh')")
def class_of_a_part(self, x):
    return both(self, x) * (2 if isinstance(self.act_layer, (nn.Tanh, nn.Sigmoid)) else 1)


@program(sets(act_layer=nn.ReLU()), "type(self.act_layer)")
def type_of_a_part(self, x):
    return both(self, x) * (2 if type(self.act_layer) is nn.Tanh else 1)


@program(sets(act_layer=nn.Sigmoid()), None)
def part_that_is_replaced(self, x):
    return self.act_layer(both(self, x))


@program(sets(act_layer=None), None)
def part_that_may_be_none(self, x):
    y = both(self, x)
    if self.act_layer is not None:
        y = self.act_layer(y)
    return y


@program(sets(act_layer=None), None)
def part_by_another_name(self, x):
    act, y = self.act_layer, both(self, x)
    return act(y) if act is not None else y


@program(sets(low=1.0), None)
def entry_of_all_attributes(self, x):
    return both(self, x) * (2 if self.__dict__["low"] else 1)


@program(sets(low=1.0), "self.__dict__['low']")
def entry_of_vars(self, x):
    return both(self, x) * (2 if vars(self)["low"] else 1)


# numbers, shapes and dtypes of tensors

LOW_TENSOR = sets(low_tensor=torch.tensor(0.1, dtype=torch.float64))
LESS = -torch.ones(40, dtype=torch.float64)


@program(lambda m: m.load_state_dict({**m.state_dict(), "on": torch.tensor(True)}, strict=False), None)
def buffer_as_a_flag(self, x):
    return both(self, x).relu() if self.on else both(self, x)


@program(LOW_TENSOR, None)
def number_of_a_tensor(self, x):
    return both(self, x).clamp(max=float(self.low_tensor))


@program(LOW_TENSOR, None)
def item_of_a_tensor(self, x):
    return both(self, x).clamp(max=self.low_tensor.item())


@program(LOW_TENSOR, None)
def number_of_a_tensor_that_is_computed_with(self, x):
    return both(self, x).clamp(max=float(self.low_tensor) * 2)


@program(LOW_TENSOR, None)
def tensor_as_a_count(self, x):
    return both(self, x).relu() * (int(self.low_tensor) + 1)


@program(LOW_TENSOR, None)
def list_of_a_tensor(self, x):
    return both(self, x).clamp(max=self.low_tensor.tolist() + 1)


@program(LOW_TENSOR, None)
def number_computed_of_a_tensor(self, x):
    return both(self, x).clamp(max=float(self.low_tensor * 2) + 1)


@program(LOW_TENSOR, None)
def tensor_as_an_array(self, x):
    return both(self, x).clamp(max=float(self.low_tensor.numpy()) + 1)


@program(sets(many=LESS), "many")
def condition_on_many_numbers(self, x):
    return both(self, x) * (2 if (self.many > 0).any() else 1)


@program(sets(many=LESS), "many")
def many_numbers_compared(self, x):
    return both(self, x) * (2 if torch.equal(self.many, self.many.abs()) else 1)


@program(lambda m: m.held.update(t=THREE), "self.held['t']")
def number_of_a_tensor_in_a_dict(self, x):
    return both(self, x) * (float(self.held["t"]) + 1)


@program(lambda m: m.array.__setitem__(0, 3.0), None)
def number_of_an_array(self, x):
    return both(self, x) * float(self.array[0])


@program(sets(scalar=numpy.float32(3.0)), "self.scalar")
def scalar_of_numpy(self, x):
    return both(self, x) * float(self.scalar)


@program(sets(h=nn.Conv2d(4, 9, 1, dtype=torch.float64)), "h.weight.shape")
def shape_of_a_kernel(self, x):
    return both(self, x) * self.h.weight.shape[0]


@program(sets(h=nn.Conv2d(4, 9, 1, dtype=torch.float64)), "h.bias.shape")
def how_many_numbers_there_are(self, x):
    return both(self, x) * (self.h.bias.numel() + len(self.h.bias) + self.h.bias.size(0))


@program(lambda m: None, None)
def shape_and_numbers_of_what_is_merged(self, x):
    return both(self, x) * (self.n.bias.numel() + self.a.weight.shape[1] + float(self.a.bias.abs().max()))


@program(sets(gone=1.0), None)
def whether_all_attributes_have_one(self, x):
    return both(self, x) * (2 if "gone" in self.__dict__ else 1)


@program(lambda m: m.h.half(), "h.weight.element_size()")
def size_of_a_number(self, x):
    return both(self, x) * self.h.weight.element_size()


@program(lambda m: m.h.half(), "h.weight.type()")
def name_of_a_dtype(self, x):
    return both(self, x) * (2 if self.h.weight.type() == "torch.DoubleTensor" else 1)


@program(lambda m: m.h.float(), None)
def cast_to_the_name_of_a_dtype(self, x):
    return both(self, x).type(self.h.weight.type())


@pytest.mark.parametrize(("forward", "change", "named"), PROGRAMS)
def test_what_a_forward_was_told(forward, change, named):
    for inplace in (False, True):
        model = made(forward)
        deploy = structrep.reparameterize(copy.deepcopy(model), inplace=inplace)
        assert len(structrep.plan(model).merges) == 1
        assert differs(model, deploy, X) is None
        change(model)
        change(deploy)
        error = differs(model, deploy, X)
        assert (error is None) if named is None else (error is not None and named in error), error


def of_type(self, x):
    return both(self, x) * type(self).of_class


def of_own_class(self, x):
    return both(self, x) * self.__class__.of_class


@pytest.mark.parametrize("forward", [of_type, of_own_class])
def test_an_attribute_of_the_class_itself(forward, monkeypatch):
    model, deploy = converted(forward)
    monkeypatch.setattr(Two, "of_class", 3.0)
    assert "type(self).of_class" in differs(model, deploy, X)


class Delegating(Two):
    """Looks for what it has not in its configuration, then among its parts."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("h"), name) if name == "out_channels" else getattr(self.config, name)


def attribute_of_another(self, x):
    return both(self, x) * self.eps


def attribute_of_a_part(self, x):
    return both(self, x) * self.out_channels


def attribute_that_nobody_has(self, x):
    return both(self, x) * getattr(self, "gain", 0.5)


@pytest.mark.parametrize(
    ("forward", "change", "named"),
    [
        (attribute_of_another, lambda m: setattr(m.config, "eps", 3.0), "self.config.eps"),
        (attribute_of_a_part, lambda m: setattr(m.h, "out_channels", 3), "self.h.out_channels"),
        (attribute_that_nobody_has, lambda m: setattr(m, "gain", 3.0), "self.gain"),
        (attribute_that_nobody_has, lambda m: setattr(m.config, "gain", 3.0), "self.gain"),
    ],
)
def test_a_class_that_looks_for_attributes_itself(forward, change, named):
    model, deploy = converted(forward, base=Delegating)
    change(model)
    change(deploy)
    assert named in differs(model, deploy, X)


def test_all_attributes_at_once_keep_the_forward():
    def forward(self, x):
        held = vars(self)
        return both(self, x) * held["factor"]

    plan = structrep.plan(made(forward))
    assert all(merge.rules == ("fold_norm",) for merge in plan.merges)
    assert "looks at all attributes of the model at once" in str(plan.refusals)


class Scale(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.t = torch.full((1,), number, dtype=torch.float64)


class Scaled(Two):
    """Plain tensors that are alike by their names."""

    def __init__(self):
        super().__init__()
        self.p, self.q = Scale(2.0), Scale(3.0)
        self.held = {"t_u": self.p.t.clone(), "t": {"u": self.q.t.clone()}}


@pytest.mark.parametrize(
    ("forward", "change"),
    [
        (lambda m, x: both(m, x) * m.p.t * m.q.t, lambda m: setattr(m.p, "t", THREE)),
        (lambda m, x: both(m, x) * m.p.t * m.q.t, lambda m: setattr(m.q, "t", THREE + 1)),
        (lambda m, x: both(m, x) * m.held["t_u"] * m.held["t"]["u"], lambda m: m.held.update(t_u=THREE)),
        (lambda m, x: both(m, x) * m.held["t_u"] * m.held["t"]["u"], lambda m: m.held["t"].update(u=THREE + 1)),
    ],
)
def test_plain_tensors_of_one_name_that_are_merged(forward, change):
    model, deploy = converted(forward, base=Scaled)
    assert relative_error(deploy(X), model(X)) < 1e-12
    assert not structrep.plan(deploy).merges
    change(model), change(deploy)
    assert "that was merged" in differs(model, deploy, X)


def test_a_part_whose_class_is_in_no_module():
    space = {"nn": nn}
    exec("Bare = type('Bare', (nn.Identity,), {})", space)

    def forward(self, x):
        y = both(self, x)
        return y.relu() if isinstance(self.idle, nn.ReLU) else y

    model = made(forward)
    model.idle = space["Bare"]()
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(X), model(X)) < 1e-12
    model.idle = deploy.idle = nn.ReLU()
    assert differs(model, deploy, X) is None


def test_an_error_says_what_was_found_and_what_to_do():
    _, deploy = converted(factor_that_is_merged)
    deploy.factor = 1.5
    said = (
        r"Made.forward was reparameterized for self.factor=0.5, and self.factor is 1.5 now: convert the model again "
        r"after setting it"
    )
    with pytest.raises(ValueError, match=said):
        deploy(X)


def test_set_before_it_is_converted():
    model = made(clamp)
    model.low = 0.75
    deploy = structrep.reparameterize(model)
    assert differs(model, deploy, X) is None


def test_set_between_plan_and_apply():
    model = made(factor_that_is_merged)
    plan = structrep.plan(model)
    model.factor = 1.0
    with pytest.raises(structrep.StructrepError, match=r"self.factor of the model was 0.5 when this plan was made"):
        plan.apply()
    model = made(bound_that_is_computed)  # which is asked for again
    plan = structrep.plan(model)
    model.low = 1.0
    assert differs(model, plan.apply(), X) is None


ALIAS = F.relu


@pytest.mark.parametrize(
    ("forward", "name", "value", "named"),
    [
        (
            lambda self, x: (self.n(self.a(x)) + self.b(x)).clamp(min=SETTINGS["t"]),
            "SETTINGS",
            {"t": 1.0, "u": 2.0},
            "SETTINGS['t']",
        ),
        (
            lambda self, x: (self.n(self.a(x)) + self.b(x)).clamp(min=SETTINGS["t"]),
            "SETTINGS",
            {"t": 0.5, "u": 9.0},
            None,
        ),
        (lambda self, x: (self.n(self.a(x)) + self.b(x)).clamp(min=LOW), "LOW", 1.0, "LOW"),
        (lambda self, x: (self.n(self.a(x)) + self.b(x)) * self.limit(), "LOW", 1.0, "LOW"),
        (lambda self, x: (self.n(self.a(x)) + self.b(x)) * HERE.LOW, "LOW", 1.0, "HERE.LOW"),
        (lambda self, x: ALIAS(self.n(self.a(x)) + self.b(x)), "ALIAS", F.silu, "ALIAS"),
    ],
)
def test_names_of_a_module(forward, name, value, named, monkeypatch):
    model, deploy = converted(forward)
    monkeypatch.setattr(HERE, name, value)
    error = differs(model, deploy, X)
    assert (error is None) if named is None else (error is not None and named in error)


def test_cells_of_a_closure():
    bounds, low = [0.1, 0.2], 0.0

    def scaled(factor):
        def decorate(function):
            @functools.wraps(function)
            def wrapped(self, x):
                return function(self, x) * factor[0]

            return wrapped

        return decorate

    factor = [2.0]

    def forward(self, x):
        return (self.n(self.a(x)) + self.b(x)).clamp(min=low, max=bounds[1])

    model, deploy = converted(forward)
    bounds[0] = 5.0
    assert differs(model, deploy, X) is None
    bounds[1] = 0.3
    assert differs(model, deploy, X) is None
    bounds[1] = 0.2
    assert differs(model, deploy, X) is None
    low = 0.15
    assert differs(model, deploy, X) is None
    model, deploy = converted(scaled(factor)(lambda self, x: (self.n(self.a(x)) + self.b(x)).relu()))
    factor[0] = 3.0
    assert "factor[0]" in differs(model, deploy, X)


def test_a_forward_of_an_instance():
    low = [0.0]
    model = made(clamp)
    model.forward = types.MethodType(lambda self, x: (self.n(self.a(x)) + self.b(x)).clamp(min=low[0]), model)
    deploy = structrep.reparameterize(model)
    assert differs(model, deploy, X) is None
    low[0] = 1.0
    assert "low[0]" in differs(model, deploy, X)


def test_code_without_source():
    """What was asked for is noted as the code runs, so no source is needed to guard it."""
    space = {"torch": torch, "LIMIT": [0.25]}
    exec(
        "def forward(self, x):\n    y = self.n(self.a(x)) + self.b(x)\n"
        "    return y.clamp(min=LIMIT[0]) * self.cfg['t']",
        space,
    )
    model, deploy = converted(space["forward"])
    for at in (copy.deepcopy(deploy), deploy):
        space["LIMIT"][0] = 1.0
        assert "LIMIT[0]" in differs(model, at, X)
        space["LIMIT"][0] = 0.25
    model.cfg["t"] = deploy.cfg["t"] = 3.0
    assert "self.cfg['t']" in differs(model, deploy, X)


def test_the_environment(monkeypatch):
    monkeypatch.delenv("STRUCTREP_TEST", raising=False)
    model, deploy = converted(
        lambda self, x: (self.n(self.a(x)) + self.b(x)) * (2 if os.environ.get("STRUCTREP_TEST") else 1)
    )
    monkeypatch.setenv("STRUCTREP_TEST", "1")
    assert "os.environ.get('STRUCTREP_TEST')" in differs(model, deploy, X)


@pytest.mark.parametrize(("ask", "rules"), [(time.time, [("fold_norm",)]), (time.monotonic, [("fold_norm",)]),
                                            (random.random, [])])  # fmt: skip
def test_what_is_another_at_every_call_keeps_the_forward(ask, rules):
    model = made(lambda self, x: (self.n(self.a(x)) + self.b(x)) * ask())
    plan = structrep.plan(model)
    assert [merge.rules for merge in plan.merges] == rules  # of modules alone; one that draws numbers is not followed


class Counter:
    def __init__(self):
        self.n = 0

    def draw(self):
        self.n += 1
        return self.n


COUNTER, NUMBERS = Counter(), random.Random(0)


def counted(model, x):
    model.held.n += 1
    return model.held.n


@pytest.mark.parametrize(("held", "ask"), [
    (lambda: numpy.random.default_rng(0), lambda m, x: m.held.random()),
    (lambda: numpy.random.RandomState(0), lambda m, x: m.held.rand()),
    (lambda: random.Random(0), lambda m, x: m.held.random()),
    (lambda: {"of": [random.Random(0)]}, lambda m, x: m.held["of"][0].random()),
    (lambda: iter([0.5, 1.5, 2.5, 3.5, 4.5, 5.5]), lambda m, x: next(m.held)),
    (lambda: types.SimpleNamespace(n=0), counted),
    (Counter, lambda m, x: m.held.draw()),
    (collections.deque, lambda m, x: m.held.append(1) or len(m.held)),
], ids=["numpy", "old numpy", "random", "in a dict", "iterator", "namespace", "object", "deque"])  # fmt: skip
@pytest.mark.parametrize("inputs", [(), (X,)], ids=["alone", "inputs"])
def test_what_an_object_gives_that_it_changes_is_no_constant(held, ask, inputs):
    model = made(lambda self, x: (self.n(self.a(x)) + self.b(x)) * ask(self, x))
    model.held = held()
    deploy = structrep.reparameterize(model, *inputs)
    assert isinstance(deploy.n, nn.Identity)
    for _ in range(3):
        assert relative_error(deploy(X), model(X)) < 1e-12


@pytest.mark.parametrize("ask", [
    COUNTER.draw, lambda: COUNTER.draw(), lambda: NUMBERS.random(), lambda: os.urandom(1)[0], lambda: uuid.uuid4().int,
    lambda: random.SystemRandom().random(), lambda: secrets.randbelow(9), time.monotonic_ns, time.process_time,
    lambda: datetime.datetime.now().microsecond, lambda: datetime.date.today().day,
])  # fmt: skip
def test_what_the_process_gives_otherwise_at_every_call_keeps_the_forward(ask):
    plan = structrep.plan(made(lambda self, x: (self.n(self.a(x)) + self.b(x)) * ask()))
    assert [merge.rules for merge in plan.merges] == [("fold_norm",)]
    assert any(
        "at every call" in one.reason or "changes its arguments or itself" in one.reason for one in plan.refusals
    )


def test_only_the_forward_that_changes_an_object_is_kept():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.numbers = random.Random(0)

        def forward(self, x):
            return x * self.numbers.random()

    def forward(self, x):
        return self.part(self.n(self.a(x)) + self.b(x))

    model = made(forward)
    model.part = Draws()
    deploy = structrep.reparameterize(model)
    assert "reparam_conv" in written(deploy)
    for _ in range(3):
        assert relative_error(deploy(X), model(X)) < 1e-12


# --- how it is run --------------------------------------------------------------------------------------------------


def test_traced_as_the_model_is():
    model, deploy = converted(
        lambda self, x: (
            (self.n(self.a(x)) + self.b(x)) if torch.jit.is_tracing() else (self.n(self.a(x)) + self.b(x)).softmax(1)
        )
    )
    truth, found = (torch.jit.trace(one, X, check_trace=False)(X) for one in (model, deploy))
    assert relative_error(found, truth) < 1e-12
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
        assert relative_error(found, truth) < 1e-12
        assert relative_error(truth, 2 * (model.n(model.a(X)) + model.b(X))) < 1e-12


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch.compiler has no is_exporting")
def test_exported_as_the_model_is():
    def forward(self, x):
        y = self.n(self.a(x)) + self.b(x)
        if torch.compiler.is_exporting():
            return y
        return y * 2 if torch.compiler.is_compiling() else y.softmax(1)

    model, deploy = converted(forward)
    truth, found = (torch.export.export(one, (X,)).module()(X) for one in (model, deploy))
    assert relative_error(found, truth) < 1e-12
    truth, found = (torch.compile(one, backend="eager", fullgraph=True)(X) for one in (model, deploy))
    assert relative_error(found, truth) < 1e-12
    assert relative_error(truth, 2 * (model.n(model.a(X)) + model.b(X))) < 1e-12


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


def test_numbers_of_a_tensor_go_everywhere():
    """What is exported holds for the numbers that it was exported with; all else looks again."""
    model, deploy = converted(number_computed_of_a_tensor)
    assert relative_error(torch.export.export(deploy, (X,)).module()(X), model(X)) < 1e-12
    assert relative_error(torch.compile(deploy, backend="eager")(X), model(X)) < 1e-12
    again = structrep.reparameterize(copy.deepcopy(deploy), X)
    LOW_TENSOR(model)
    LOW_TENSOR(again)
    assert differs(model, again, X) is None


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
    assert relative_error(found, truth) < 1e-12


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


# --- dtypes and devices ---------------------------------------------------------------------------------------------

CASTS = {
    "parameter": lambda self, x: self.h((self.n(self.a(x)) + self.b(x)).relu().to(self.h.weight.dtype)),
    "merged": lambda self, x: self.h((self.n(self.a(x)) + self.b(x)).relu().to(self.a.weight.dtype)),
    "norm": lambda self, x: self.h((self.n(self.a(x)) + self.b(x)).relu().to(self.n.running_mean.dtype)),
    "next": lambda self, x: self.h((self.n(self.a(x)) + self.b(x)).relu().to(dtype=next(self.h.parameters()).dtype)),
    "by a name": lambda self, x: (lambda dtype: self.h((self.n(self.a(x)) + self.b(x)).relu().to(dtype)))(
        self.h.weight.dtype
    ),
    "kernel": lambda self, x: self.h(
        (self.n(self.a(x)) + self.b(x)) * torch.ones(4, 1, 1, dtype=self.h.weight.dtype, device=self.h.weight.device)
    ),
    "computed": lambda self, x: self.h((self.n(self.a(x)) + self.b(x)).relu().to(self.h.weight.flatten(1).t().dtype)),
    "arange": lambda self, x: self.h(
        (self.n(self.a(x)) + self.b(x)) * torch.arange(4, dtype=self.h.bias.dtype).view(4, 1, 1)
    ),
    "and back": lambda self, x: self.h(
        (self.n(self.a(x)) + self.b(x)).relu().to(torch.float32).to(self.h.weight.dtype)
    ),
    "device": lambda self, x: self.h((self.n(self.a(x)) + self.b(x)).relu().to(self.h.weight.device)),
    "both": lambda self, x: self.h(
        (self.n(self.a(x)) + self.b(x)).relu().to(device=self.h.weight.device, dtype=self.h.weight.dtype)
    ),
    "zeros": lambda self, x: self.h(
        (self.n(self.a(x)) + self.b(x)) + torch.zeros(x.shape[0], 4, 1, 1, dtype=self.h.weight.dtype)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("forward", CASTS.values(), ids=CASTS)
def test_cast_after_it_was_converted(forward, dtype):
    model, deploy = converted(forward)
    assert differs(model.to(dtype), deploy.to(dtype), X.to(dtype)) is None
    assert deploy(X.to(dtype)).dtype == dtype


@pytest.mark.parametrize("forward", [CASTS[name] for name in ("parameter", "merged", "kernel", "device", "both")])
def test_moved_after_it_was_converted(forward):
    _, deploy = converted(forward)
    assert deploy.to("meta")(X.to("meta")).device.type == "meta"


def test_an_attribute_that_is_a_dtype():
    model, deploy = converted(
        lambda self, x: self.h((self.n(self.a(x)) + self.b(x)).relu().to(self.kept_dtype).double())
    )
    model.kept_dtype = deploy.kept_dtype = torch.float16
    truth, found = model(X), deploy(X)
    assert relative_error(found, truth) < 5e-3
    assert relative_error(truth, made(CASTS["device"])(X)) > 1e-6


def test_a_condition_on_a_dtype():
    model, deploy = converted(
        lambda self, x: (self.n(self.a(x)) + self.b(x)) * (2 if self.h.weight.dtype == torch.bfloat16 else 1)
    )
    assert differs(model.float(), deploy.float(), X.float()) is not None  # told of one dtype, for which alone it holds
    forward = lambda self, x: (self.n(self.a(x)) + self.b(x)) * (2 if x.dtype == torch.float16 else 1)  # noqa: E731
    model, deploy = converted(forward)
    assert differs(model, deploy, X) is None
    assert differs(model.half(), deploy.half(), X.half()) is None

    def inner(self, x):
        y = self.n(self.a(x)) + self.b(x)
        return y * (2 if y.dtype == torch.float16 else 1)

    model, deploy = converted(inner)
    assert differs(model.half(), deploy.half(), X.half()) is None


OTHERS = {
    "mask": lambda x: x > 0,
    "part of a mask": lambda x: ((x > 0) & (x < 1)).split(1, 1)[0],
    "place": lambda x: x.argmax(1),
    "place beside a value": lambda x: x.max(1)[1],
    "cast": lambda x: x.long(),
    "bits": lambda x: x.view(torch.int64),
    "places": lambda x: torch.arange(x.shape[1], device=x.device),
    "mask in general": lambda x: torch.ones(x.shape[0], dtype=torch.bool),
    "count": lambda x: (x > 0).sum(),
    "of another": lambda x: torch.zeros_like(x, dtype=torch.int32),
}
OWN = {
    "input": lambda x: x,
    "masked": lambda x: x * (x > 0),
    "mean": lambda x: x.pow(2).mean(1, keepdim=True).rsqrt(),
    "largest": lambda x: x.max(1)[0],
    "product": lambda x: x @ x.transpose(2, 3),
    "part": lambda x: x.chunk(2, 1)[1],
    "new": lambda x: x.new_zeros(3),
}


@pytest.mark.parametrize("cast", [lambda y, m: y.to(m.dtype), lambda y, m: y.type_as(m)])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_cast_to_what_is_not_of_the_dtype_of_the_model(other, cast):
    """A value that is cut off to whole numbers is merged across nowhere."""
    model = made(lambda self, x: self.n(cast(self.a(x), other(x)).to(self.h.weight.dtype)))
    assert not structrep.plan(model).merges
    assert torch.equal(structrep.reparameterize(model)(X), model(X))


@pytest.mark.parametrize("cast", [lambda y, m: y.to(m.dtype), lambda y, m: y.type_as(m)])
@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_a_cast_to_what_is_of_the_dtype_of_the_model(own, cast):
    converted(lambda self, x: self.n(cast(self.a(x), own(x))))


def test_a_condition_on_the_dtype_of_a_mask():
    forward = lambda self, x: both(self, x) * (2 if (x > 0).dtype == torch.bool else 1)  # noqa: E731
    model, deploy = converted(forward)
    assert differs(model, deploy, X) is None


def test_the_default_dtype():
    forward = lambda self, x: both(self, x) * torch.ones(4, 1, 1, dtype=torch.get_default_dtype())  # noqa: E731
    model, deploy = converted(forward)
    try:
        torch.set_default_dtype(torch.float64)
        assert differs(model, deploy, X) is None
    finally:
        torch.set_default_dtype(torch.float32)


def test_in_place_or_not_is_no_matter():
    model, deploy = converted(lambda self, x: F.relu(self.n(self.a(x)) + self.b(x), inplace=self.inplace))
    model.inplace = deploy.inplace = True
    assert differs(model, deploy, X) is None

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.g, self.inplace = nn.Parameter(torch.rand(4, 1, 1)), False

        def forward(self, x):
            return x.mul_(self.g) if self.inplace else x * self.g

    model = settled(nn.Sequential(nn.Conv2d(4, 4, 1), Scale()))
    plan = structrep.plan(model)
    assert len(plan.merges) == 1
    deploy = plan.apply()
    model[1].inplace = deploy[1].inplace = True
    assert relative_error(deploy(X), model(X)) < 1e-12


# --- other paths ----------------------------------------------------------------------------------------------------


class Row(nn.Module):
    """A convolution and a norm, which some forward calls one after the other."""

    def __init__(self):
        super().__init__()
        self.c, self.n = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.low, self.flag, self.none, self.kept = False, True, None, []
        self.net = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)])


def given_back(self, x):
    y = self.c(x)
    if self.low:
        return y
    return F.relu(self.n(y))


def changed_between(self, x):
    x = self.c(x)
    if self.low:
        x = x * 2
    return self.n(x)


def norm_left_out(self, x):
    x = self.c(x)
    if not self.low:
        x = self.n(x)
    return x


def convolution_left_out(self, x):
    if not self.low:
        x = self.c(x)
    return self.n(x)


def either(self, x):
    y = self.c(x)
    return y if self.low else self.n(y)


def in_a_function(self, x):
    y = self.c(x)

    def again():
        return y

    return again() if self.low else self.n(y)


def by_locals(self, x):
    y = self.c(x)
    return locals()["y"] if self.low else self.n(y)


def in_a_dict(self, x):
    found = {"y": self.c(x)}
    return found["y"] if self.low else self.n(found["y"])


def caught(self, x):
    y = self.c(x)
    try:
        if self.low:
            raise KeyError
        return self.n(y)
    except KeyError:
        return y


def in_a_loop(self, x):
    for layer in self.net:
        x = layer(x)
        if self.low:
            return x
    return x


def left_early(self, x):
    for place, layer in enumerate(self.net):
        if self.low and place == 1:
            break
        x = layer(x)
    return x


def apart(y, row):
    return y if row.low else row.n(y)


def in_a_helper(self, x):
    return apart(self.c(x), self)


def by_a_method(self, x):
    return self.behind(self.c(x))


class Behind(Row):
    def behind(self, y):
        if self.low:
            return y
        return self.n(y)


@pytest.mark.parametrize(
    "forward",
    [given_back, changed_between, norm_left_out, convolution_left_out, either, in_a_function, by_locals, in_a_dict,
     caught, in_a_loop, left_early, in_a_helper, by_a_method],
    ids=lambda forward: forward.__name__,
)  # fmt: skip
def test_a_value_that_another_path_gives_away(forward):
    model = made(forward, Behind)
    plan = structrep.plan(model)
    assert len(plan.merges) == 1
    deploy = plan.apply()
    assert differs(model, deploy, X) is None
    model.low = deploy.low = True
    error = differs(model, deploy, X)
    assert error is not None
    assert "self.low" in error


def test_rounds_that_an_attribute_counts():
    def sliced(self, x):
        for layer in self.net[: self.low or 4]:
            x = layer(x)
        return x

    def counted(self, x):
        for i in range(self.low or 4):
            x = self.net[i](x)
        return x

    def picked(self, x):
        y = self.c(x)
        return [self.n(y), y][self.low]

    def counted_by_a_name(self, x):
        rounds = self.low or 4
        for i in range(rounds):
            x = self.net[i](x)
        return x

    def picked_by_a_name(self, x):
        which, y = self.low, self.c(x)
        return [self.n(y), y][which]

    for forward in (sliced, counted, picked, counted_by_a_name, picked_by_a_name):
        model, deploy = converted(forward, base=Row)
        model.low = deploy.low = 1
        assert "self.low" in differs(model, deploy, X)


def test_a_value_that_another_path_keeps():
    def forward(self, x):
        y = self.c(x)
        if self.low:
            self.seen = y
        return self.n(y)

    _, deploy = converted(forward, base=Row)
    deploy.low = True
    with pytest.raises(ValueError, match=r"self\.low"):
        deploy(X)


def straight(self, x):
    x = self.c(x)
    x = self.n(x)
    return F.relu(x)


def behind(self, x):
    x = self.n(self.c(x))
    if self.low:
        x = x * 2
    return x


def before(self, x):
    if self.low:
        x = x * 2
    x = self.c(x)
    return self.n(x)


def between_but_not_of_it(self, x):
    x = self.c(x)
    scale = 1
    if self.low:
        scale = 2
    x = self.n(x)
    return x * scale


def which_parts_there_are(self, x):
    x = self.c(x)
    if self.n is not None:
        x = self.n(x)
    return x


def one_after_another(self, x):
    for layer in self.net:
        x = layer(x)
    return x * 2 if self.low else x


@pytest.mark.parametrize(
    "forward",
    [straight, behind, before, between_but_not_of_it, which_parts_there_are, one_after_another],
    ids=lambda forward: forward.__name__,
)
def test_ordinary_code_stays_as_it_is(forward):
    """Only modules are swapped, and what is set later goes on working."""
    model, deploy = converted(forward, base=Row)
    assert not hasattr(type(deploy), "__structrep_methods__")
    model.low = deploy.low = True
    assert differs(model, deploy, X) is None


def test_an_argument_that_a_child_uses_on_another_path():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.n, self.low = nn.BatchNorm2d(4), False

        def forward(self, y):
            if self.low:
                y = y * 2
            return self.n(y)

    model = settled(nn.Sequential(nn.Conv2d(4, 4, 1), Head()))
    plan = structrep.plan(model)
    assert len(plan.merges) == 1
    deploy = plan.apply()
    assert relative_error(deploy(X), model(X)) < 1e-12
    model[1].low = deploy[1].low = True
    assert "self.low" in differs(model, deploy, X)


class Sometimes(nn.Module):
    """Hands on what it is given, or something else."""

    def __init__(self):
        super().__init__()
        self.low = False

    def forward(self, y):
        return y * 2 if self.low else y

    def again(self, y):
        return y * 2 if self.low else y


def by_a_function(y, module):
    return y * 2 if module.low else y


@pytest.mark.parametrize(
    "between",
    [Sometimes.__call__, Sometimes.again, Sometimes.forward, lambda sub, y: by_a_function(y, sub)],
    ids=["call", "method", "forward", "function"],
)
def test_a_value_that_a_child_hands_on_by_another_path(between):
    class Between(Row):
        def __init__(self):
            super().__init__()
            self.sub = Sometimes()

        def forward(self, x):
            return self.n(between(self.sub, self.c(x)))

    model = settled(Between())
    plan = structrep.plan(model)
    assert len(plan.merges) == 1
    deploy = plan.apply()
    assert relative_error(deploy(X), model(X)) < 1e-12
    model.sub.low = deploy.sub.low = True
    assert ".low" in differs(model, deploy, X)


# --- which parts are run --------------------------------------------------------------------------------------------


class Several(nn.Module):
    """A convolution and norms, of which some forward takes one, or none."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.n, self.m = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.norms, self.by_name = nn.ModuleList([self.n, self.m]), nn.ModuleDict({"n": self.n, "m": self.m})
        self.net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.low, self.which, self.cfg, self.run = 0, "n", {"which": "n"}, self.run_whole

    @property
    def norm(self):
        return self.m if self.low else self.n

    def picked(self):
        if self.low:
            return self.m
        return self.n

    def run_whole(self, x):
        return self.n(self.a(x))

    def run_half(self, x):
        return self.a(x)


def by_match(self, x):
    match self.low:
        case 0:
            norm = self.n
        case _:
            norm = self.m
    return norm(self.a(x))


def by_an_early_return(self, x):
    if self.low:
        return self.a(x).relu()
    return self.n(self.a(x)).relu()


def by_chained_lists(self, x):
    for layer in itertools.chain([self.a], [] if self.low else [self.n]):
        x = layer(x)
    return x


def by_a_function_inside(self, x):
    def half(y):
        return self.a(y).relu()

    return half(x) if self.low else self.n(self.a(x)).relu()


def one_of_the_norms(model, x):
    return (model.n, model.m)[model.low](model.a(x))


def inside_of_a_part(self, x):
    return self.net[0](x) if self.low else self.net(x)


def some_of_a_part(self, x):
    return self.net[:1](x) if self.low else self.net(x)


PICKS = {
    "conditional": lambda self, x: (self.m if self.low else self.n)(self.a(x)),
    "without": lambda self, x: self.a(x).relu() if self.low else self.n(self.a(x)).relu(),
    "getattr": lambda self, x: getattr(self, self.which)(self.a(x)),
    "list": lambda self, x: self.norms[self.low](self.a(x)),
    "dict": lambda self, x: self.by_name[self.cfg["which"]](self.a(x)),
    "dict that is written out": lambda self, x: {0: self.n, 1: self.m}[self.low](self.a(x)),
    "_modules": lambda self, x: self._modules[self.which](self.a(x)),
    "get_submodule": lambda self, x: self.get_submodule(self.which)(self.a(x)),
    "or": lambda self, x: ((self.low and self.m) or self.n)(self.a(x)),
    "property": lambda self, x: self.norm(self.a(x)),
    "method that picks": lambda self, x: self.picked()(self.a(x)),
    "method": lambda self, x: self.run_half(x) if self.low else self.run_whole(x),
    "method by a name": lambda self, x: getattr(self, "run_" + ("half" if self.low else "whole"))(x),
    "method as an attribute": lambda self, x: self.run(x),
    "convolution": lambda self, x: self.n((self.b if self.low else self.a)(x)),
    "norm of another": lambda self, x: self.n(self.b(x)) if self.low else self.n(self.a(x)),
    "function": lambda self, x: one_of_the_norms(self, x),
    **{one.__name__: one for one in (by_match, by_an_early_return, by_chained_lists, by_a_function_inside,
                                     inside_of_a_part, some_of_a_part)},
}  # fmt: skip


@pytest.mark.parametrize("forward", PICKS.values(), ids=PICKS)
def test_parts_that_another_path_runs(forward):
    torch.manual_seed(0)
    model = made(forward, Several)
    plan = structrep.plan(model)
    assert len(plan.merges) == 1 + (forward not in (inside_of_a_part, some_of_a_part)) or not plan.merges, plan.refusals
    deploy = plan.apply()
    assert relative_error(deploy(X), model(X)) < 1e-12
    for one in (model, deploy):
        one.low, one.which, one.cfg["which"], one.run = 1, "m", "m", one.run_half
    error = differs(model, deploy, X)
    assert error is not None
    assert any(f"self.{name}" in error for name in ("low", "which", "cfg", "run"))


def test_parts_that_a_way_to_run_it_picks():
    """Forwards are followed without gradients, as a program that is compiled or traced is not."""
    for ask in (torch.is_grad_enabled, torch.jit.is_tracing, torch.compiler.is_compiling):
        model = made(lambda self, x, ask=ask: (self.n if ask() else self.m)(self.a(x)), Several)
        deploy = structrep.plan(model).apply()
        assert relative_error(deploy(X), model(X)) < 1e-12
        assert (
            relative_error(
                torch.jit.trace(deploy, X, check_trace=False)(X), torch.jit.trace(model, X, check_trace=False)(X)
            )
            < 1e-12
        )
        compiled = [torch.compile(one, backend="eager") for one in (deploy, model)]
        assert relative_error(compiled[0](X), compiled[1](X)) < 1e-12


def test_parts_that_are_picked_by_what_cannot_be_guarded():
    class Wrapped(Several):
        def forward(self, x):
            return (self.n if self.which_of(0) else self.m)(self.a(x))

        which_of = staticmethod(lambda place, seen=[True]: seen[place])

    plan = structrep.plan(settled(Wrapped()))
    assert "test_asked_again.py may use what is merged otherwise" in str(plan.refusals)
    assert not any("conv 3x3" in merge.before for merge in plan.merges)


def by_loops(self, x):
    for c, n in zip((self.a, self.b), (self.n, self.m), strict=True):
        x = n(c(x)) if n is not None else x
    return x * 2 if self.low else x


def by_index(self, x):
    for i in range(2):
        x = getattr(self, "nm"[i])(getattr(self, "ab"[i])(x))
    return x * 2 if self.low else x


def in_training(self, x):
    if self.training:
        return self.a(x)
    return self.n(self.a(x)) * (2 if self.low else 1)


def by_a_method_of_its_own(self, x):
    return self.run_whole(x) * (2 if self.low else 1)


def as_a_whole(self, x):
    return self.net(x) * 2 if self.low else self.net(x)


@pytest.mark.parametrize(
    "forward",
    [by_loops, by_index, in_training, by_a_method_of_its_own, as_a_whole],
    ids=lambda forward: forward.__name__,
)
def test_parts_that_every_path_runs_alike(forward):
    """Only modules are swapped, and what is set later goes on working."""
    model = made(forward, Several)
    plan = structrep.plan(model)
    assert plan.merges
    deploy = plan.apply()
    assert not hasattr(type(deploy), "__structrep_methods__")
    model.low = deploy.low = True
    assert differs(model, deploy, X) is None


NOTHING = {
    "mul": lambda self, x: self.n(self.a(x) * self.one),
    "add": lambda self, x: self.n(self.a(x) + self.zero),
    "sub": lambda self, x: self.n(self.a(x) - self.zero),
    "entry": lambda self, x: self.n(self.a(x) * self.cfg["one"]),
    "keyword": lambda self, x: self.n(torch.mul(self.a(x), other=self.one)),
    "activation": lambda self, x: self.n(F.leaky_relu(self.a(x), self.one)),
    "behind the norm": lambda self, x: self.h(self.n(self.a(x)) * self.one),
}


class Neutral(Two):
    def __init__(self):
        super().__init__()
        self.one, self.zero, self.cfg = 1.0, 0.0, {"one": 1.0}


@pytest.mark.parametrize("forward", NOTHING.values(), ids=NOTHING)
def test_a_number_that_did_nothing(forward):
    model, deploy = converted(forward, base=Neutral)
    for one in (model, deploy):
        one.one, one.zero, one.cfg["one"] = 2.0, 0.5, 2.0
    assert "reparameterized for self." in str(differs(model, deploy, X))


@pytest.mark.parametrize(
    "forward", [lambda self, x: self.n(self.a(x)) * self.one, lambda self, x: self.n(self.a(x) * 1) * self.one]
)
def test_a_number_behind_what_is_merged_may_change(forward):
    model, deploy = converted(forward, base=Neutral)
    assert not hasattr(type(deploy), "__structrep_methods__")
    model.one = deploy.one = 2.0
    assert differs(model, deploy, X) is None


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
        assert relative_error(one(X), truth) < 1e-12, way
    model.low = 1.0
    for one in (ways["scripted"], ways["copied"], ways["pickled"], ways["converted twice"], deploy):
        one.low = 1.0
        assert relative_error(one(X), model(X)) < 1e-12


def test_flags_among_arguments_script():
    torch.manual_seed(0)
    model = settled(Flagged())
    scripted = torch.jit.script(structrep.reparameterize(model, X))
    mask = torch.rand(1, 4, 1, 1)
    for more in ((True,), (False, mask), (True, mask)):
        assert relative_error(scripted(X, *more), model(X, *more)) < 1e-12
