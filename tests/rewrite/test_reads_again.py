"""A written forward never answers for yesterday: what it was told as it was traced is asked again, or guarded.

Each program is converted, then changed like the model that it came from: it does what that does, or raises an error
that names what was changed. Silently other is never right.
"""

import copy

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.rewrite.asking import Asked, Kind, X, both, converted, differs, made
from tests.support.truth import EXACT, relative_error, says

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


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_a_plain_tensor_that_is_merged_and_written_to_in_a_copy(copied):
    model = made(plain_tensor_that_is_merged)
    deploy = copied(structrep.reparameterize(model))
    with torch.no_grad():
        deploy.plain.mul_(1.0)  # which changes nothing
        assert differs(model, deploy, X) is None
        again = copied(deploy)
        again.plain.fill_(3.0)
    assert "self.plain that was merged" in differs(model, again, X)


def of_type(self, x):
    return both(self, x) * type(self).of_class


def of_own_class(self, x):
    return both(self, x) * self.__class__.of_class


@pytest.mark.parametrize("forward", [of_type, of_own_class])
def test_an_attribute_of_the_class_itself(forward, monkeypatch):
    model, deploy = converted(forward)
    monkeypatch.setattr(Asked, "of_class", 3.0)
    assert "type(self).of_class" in differs(model, deploy, X)


class Delegating(Asked):
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
        (attribute_that_nobody_has, lambda m: setattr(m.config, "gain", 3.0), "self.config.gain"),
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


class Scaled(Asked):
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
    assert relative_error(deploy(X), model(X)) < EXACT
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
    deploy = says(structrep.plan(model), 1).reparameterize()
    assert relative_error(deploy(X), model(X)) < EXACT
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
    deploy = says(structrep.plan(model), 1).reparameterize()
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


def test_numbers_of_a_tensor_go_everywhere():
    """What is exported holds for the numbers that it was exported with; all else looks again."""
    model, deploy = converted(number_computed_of_a_tensor)
    assert relative_error(torch.export.export(deploy, (X,)).module()(X), model(X)) < EXACT
    assert relative_error(torch.compile(deploy, backend="eager")(X), model(X)) < EXACT
    again = structrep.reparameterize(copy.deepcopy(deploy), X)
    LOW_TENSOR(model)
    LOW_TENSOR(again)
    assert differs(model, again, X) is None
