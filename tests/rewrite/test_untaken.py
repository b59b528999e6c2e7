"""Paths that were not taken when a forward was followed: values that they use, and parts that they run."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.rewrite.asking import Asked, X, converted, differs, made
from tests.support.models import settled
from tests.support.truth import EXACT, SAME, relative_error, says

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
    assert relative_error(deploy(X), model(X)) < EXACT
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
    assert relative_error(deploy(X), model(X)) < EXACT
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
    assert relative_error(deploy(X), model(X)) < EXACT
    for one in (model, deploy):
        one.low, one.which, one.cfg["which"], one.run = 1, "m", "m", one.run_half
    error = differs(model, deploy, X)
    assert error is not None
    assert any(f"self.{name}" in error for name in ("low", "which", "cfg", "run"))


def test_parts_that_a_way_to_run_it_picks():
    """Forwards are followed without gradients, as a program that is compiled or traced is not."""
    for ask in (torch.is_grad_enabled, torch.jit.is_tracing, torch.compiler.is_compiling):
        model = made(lambda self, x, ask=ask: (self.n if ask() else self.m)(self.a(x)), Several)
        deploy = says(structrep.plan(model), 1, "Unreadable").apply()
        assert relative_error(deploy(X), model(X)) < EXACT
        assert (
            relative_error(
                torch.jit.trace(deploy, X, check_trace=False)(X), torch.jit.trace(model, X, check_trace=False)(X)
            )
            < EXACT
        )
        compiled = [torch.compile(one, backend="eager") for one in (deploy, model)]
        assert relative_error(compiled[0](X), compiled[1](X)) < EXACT


def test_parts_that_are_picked_by_what_cannot_be_guarded():
    class Wrapped(Several):
        def forward(self, x):
            return (self.n if self.which_of(0) else self.m)(self.a(x))

        which_of = staticmethod(lambda place, seen=[True]: seen[place])

    plan = structrep.plan(settled(Wrapped()))
    assert "test_untaken.py may use what is merged otherwise" in str(plan.refusals)
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


class Neutral(Asked):
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


class Between(nn.Module):
    """A layer in the middle that a setting leaves out: what stands behind it then takes what stands before it."""

    def __init__(self):
        super().__init__()
        self.short = False
        self.first, self.second = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1)
        self.kernel = nn.Parameter(torch.randn(3, 3, 2, 2))

    def forward(self, x):
        y = self.first(x)
        if not self.short:
            y = self.second(y)
        return F.conv2d(y, self.kernel)


def test_a_text_that_takes_another_value_where_a_layer_is_left_out():
    torch.manual_seed(0)
    model, x = settled(Between()), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    plan = structrep.plan(model)
    assert [(merge.before, merge.edit) for merge in plan.merges] == [("(conv 1x1 -> conv 1x1 -> conv 2x2)", "edit")]
    deploy = plan.apply()
    assert relative_error(deploy(x), model(x)) < SAME
    deploy.short = True
    with pytest.raises(ValueError, match=r"self\.short"):
        deploy(x)


class Sized(nn.Module):
    """Asks for the sizes of what vanishes, and needs them on another path alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.low, self.kept = nn.Conv2d(4, 6, 1, stride=2), nn.Conv2d(6, 4, 3), False, None

    def forward(self, x):
        y = self.first(x)
        _, _, h, w = y.shape
        z = self.second(y)
        return z * h + w if self.low else z


class Keeping(Sized):
    def forward(self, x):
        y = self.first(x)
        self.kept = y.shape[2]
        return self.second(y)


class Giving(Sized):
    def forward(self, x):
        y = self.first(x)
        h = y.shape[2]
        return self.second(y), h


def test_sizes_that_only_another_path_goes_by():
    model = settled(Sized())
    deploy = says(structrep.plan(model), 1).apply()
    assert relative_error(deploy(X), model(X)) < EXACT
    deploy.low = True
    with pytest.raises(ValueError, match=r"self\.low"):
        deploy(X)


@pytest.mark.parametrize("kind", [Keeping, Giving])
def test_sizes_that_are_kept_or_given_back_keep_what_has_them(kind):
    says(structrep.plan(settled(kind())), 0)
