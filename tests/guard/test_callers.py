"""Parts that are called otherwise than with their defaults, by code that cannot be followed."""

import dataclasses
import functools
import inspect
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import structrep
from structrep.errors import BadInput
from structrep.prove.run import observe
from tests.support.models import settled
from tests.support.truth import EXACT, relative_error, says

X = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
UNKNOWN = "not known: example inputs would tell"


class Plain(nn.Module):
    """A Linear and a scale behind it: one Linear, if its forward is written anew."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(8, 8)
        self.g = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        return self.g * self.l(x)


class Sized(Plain):
    def forward(self, x, size=None):
        y = super().forward(x)
        return y if size is None else y + size[0]


class Masked(Plain):
    def forward(self, x, mask):
        y = super().forward(x)
        return y if mask is None else y + mask


class Added(Plain):
    def forward(self, x, other):
        return super().forward(x) + other


class Times(Plain):
    def forward(self, x, times=1):
        return super().forward(x) * times


class Choosing(Plain):
    def forward(self, x, times=1):
        y = super().forward(x)
        return y * 2 if times > 2 else y


class Flagged(Plain):
    def forward(self, x, twice=False):
        y = super().forward(x)
        return y * 2 if twice else y


class Listed(Plain):
    def forward(self, xs):
        return super().forward(xs[0]) + xs[1]


@dataclasses.dataclass
class Box:
    x: torch.Tensor
    times: int = 2


class Boxed(Plain):
    def forward(self, box):
        return super().forward(box.x) * box.times


class Writing(Plain):
    def forward(self, box):
        box.x = super().forward(box.x)
        return box.x + 1


class Counter:
    def __init__(self):
        self.count = 0


class Counting(nn.Module):
    def forward(self, x, counter):
        counter.count += 1
        return x * counter.count


class Handing(Plain):
    """Hands on an object that something inside writes to."""

    def __init__(self):
        super().__init__()
        self.counting = Counting()

    def forward(self, x, counter=None):
        return self.counting(super().forward(x), counter)


class Encoder(Plain):
    def forward(self, x):
        return self.encode(x)

    def encode(self, x, times=1):
        return self.g * self.l(x) * times


class Given(Plain):
    def forward(self, x, layer):
        return self.g * layer(x)


class Normed(nn.Module):
    """A swap of modules, but for what the argument does."""

    def __init__(self):
        super().__init__()
        self.l, self.n = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x, low=None):
        y = self.l(x)
        return self.n(y) if low is None else y + low


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.p, self.o = Sized(), Plain()

    def forward(self, x, size=None):
        return self.o(torch.relu(self.p(x, size)))


odd = str  # which no traced value can be given to


def net(part, body, several=False):
    """A model whose forward cannot be followed, with a part, or several in a list."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.ModuleList([part(), part()]) if several else part()

    Net.forward = body
    return Net


def call_plainly(self, x):
    return self.a(x if odd(x) else x + 1)


def call_with_size(self, x):
    return self.a((x if odd(x) else x + 1), size=(3, 4))


def call_with_none(self, x):
    return self.a((x if odd(x) else x + 1), None)


def call_with_two(self, x):
    return self.a((x if odd(x) else x + 1), x)


def call_with_a_traced_number(self, x):
    return self.a((x if odd(x) else x + 1), times=x.shape[0])


def call_with_a_flag(self, x):
    return self.a((x if odd(x) else x + 1), twice=True)


def call_with_a_computed_flag(self, x):
    return self.a((x if odd(x) else x + 1), twice=bool(x.sum() > 0))


def call_otherwise_in_a_branch(self, x):
    if odd(x) and x.sum() > 1e9:
        return self.a(x, twice=True)
    return self.a(x)


def call_with_mask_or_none(self, x):
    return self.a(x, x) if odd(x) and x.sum() > 0 else self.a(x, None)


def call_with_a_list(self, x):
    return self.a([(x if odd(x) else x + 1), x])


def call_with_a_box(self, x):
    return self.a(Box((x if odd(x) else x + 1), 3))


def call_and_look_at_the_box(self, x):
    box = Box(x if odd(x) else x + 1)
    return self.a(box) + box.x


def call_with_an_object(self, x):
    counter = Counter()
    return self.a(self.a((x if odd(x) else x + 1), counter), counter)


def call_a_method(self, x):
    return self.a.encode((x if odd(x) else x + 1), times=2)


def call_both(self, x):
    return self.a.encode(self.a(x if odd(x) else x + 1), times=2)


def call_with_a_module(self, x):
    return self.a((x if odd(x) else x + 1), self.a.l)


def call_in_two_ways(self, x):
    return self.a(self.a(x if odd(x) else x + 1), size=(3, 4))


def call_in_one_way_twice(self, x):
    return self.a(self.a((x if odd(x) else x + 1), (1, 2)), size=(3, 4))


def call_low_and_not(self, x):
    return self.a(self.a(x if odd(x) else x + 1), x)


def call_low(self, x):
    return self.a((x if odd(x) else x + 1), x)


def call_with_stars(self, x):
    return self.a(*((x if odd(x) else x + 1),), **{"size": (1, 2)})


def call_by_a_computed_name(self, x):
    part = getattr(self, "a")  # noqa: B009
    return part((x if odd(x) else x + 1), (1, 2))


def call_through_another(self, x):
    return checkpoint(self.a, (x if odd(x) else x + 1), (1, 2), use_reentrant=False)


def call_all_plainly(self, x):
    for part in self.a:
        x = part(x if odd(x) else x + 1)
    return x


def call_each_otherwise(self, x):
    for index, part in enumerate(self.a):
        x = part((x if odd(x) else x + 1), size=(index, 2))
    return x


def call_beside_others(self, x):
    for part, y in zip(self.a, [x, (x if odd(x) else x + 1)], strict=True):
        x = x + part(y)
    return x


def call_one_of_two(self, x):
    return self.a[1](self.a[0](x if odd(x) else x + 1), (1, 2))


TWICE = "is called 2 times, and not always in the same way"
# part, forward of the model; what merges, or why not: with example inputs, and without
CASES = {
    "plain": (Plain, call_plainly, ["a.l"], ["a.l"]),
    "a default": (Sized, call_plainly, ["a.l"], ["a.l"]),
    "BEiT": (Sized, call_with_size, ["a.l"], f"what a is given for size is {UNKNOWN}"),
    "None": (Masked, call_with_none, ["a.l"], f"what a is given for mask is {UNKNOWN}"),
    "a tensor": (Masked, call_with_two, ["a.l"], f"what a is given for mask is {UNKNOWN}"),
    "a tensor always": (Added, call_with_two, ["a.l"], ["a.l"]),
    "a tensor or None": (Masked, call_with_mask_or_none, "a may be called with", f"mask is {UNKNOWN}"),
    "a number": (Times, call_with_a_traced_number, ["a.l"], f"what a is given for times is {UNKNOWN}"),
    "a number that decides": (Choosing, call_with_a_traced_number, "asks `times > 2`", f"for times is {UNKNOWN}"),
    "a flag": (Flagged, call_with_a_flag, ["a.l"], f"what a is given for twice is {UNKNOWN}"),
    "a computed flag": (Flagged, call_with_a_computed_flag, "a may be called with something else for twice", UNKNOWN),
    "a branch": (Flagged, call_otherwise_in_a_branch, "a may be called with True for twice", UNKNOWN),
    "a list": (Listed, call_with_a_list, ["a.l"], ["a.l"]),
    "a dataclass": (Boxed, call_with_a_box, ["a.l"], "cannot be followed"),
    "a dataclass that is written to": (Writing, call_and_look_at_the_box, "a", "cannot be followed"),
    "an object": (Handing, call_with_an_object, ["a.l"], f"what a is given for counter is {UNKNOWN}"),
    "a method": (Encoder, call_a_method, ["a.l"], f"what a is given for times is {UNKNOWN}"),
    "a method and its forward": (Encoder, call_both, TWICE, f"what a is given for times is {UNKNOWN}"),
    "a module": (Given, call_with_a_module, "asks for what it is of a.l", ""),
    "two ways": (Sized, call_in_two_ways, TWICE, f"what a is given for size is {UNKNOWN}"),
    "two sizes": (Sized, call_in_one_way_twice, ["a.l"], f"what a is given for size is {UNKNOWN}"),
    "early": (Normed, call_low_and_not, TWICE, "may look at what a.l gives"),
    "early, always": (Normed, call_low, "", "may look at what a.l gives"),
    "inside": (Inner, call_in_two_ways, ["a.o.l"], ["a.o.l"]),
    "stars": (Sized, call_with_stars, ["a.l"], f"what a is given for size is {UNKNOWN}"),
    "a computed name": (Sized, call_by_a_computed_name, ["a.l"], f"what a is given for size is {UNKNOWN}"),
    "another function": (Sized, call_through_another, ["a.l"], ""),
}
IN_LISTS = {
    "plain": (Plain, call_all_plainly, ["a.0.l", "a.1.l"], ["a.0.l", "a.1.l"]),
    "a default": (Sized, call_all_plainly, ["a.0.l", "a.1.l"], ["a.0.l", "a.1.l"]),
    "each otherwise": (Sized, call_each_otherwise, ["a.0.l", "a.1.l"], f"for size is {UNKNOWN}"),
    "beside others": (Sized, call_beside_others, ["a.0.l", "a.1.l"], ["a.0.l", "a.1.l"]),
    "by number": (Sized, call_one_of_two, ["a.0.l", "a.1.l"], ["a.0.l"]),
}


def judge(model, inputs, expected):
    plan = structrep.plan(model, *inputs)
    where = [merge.where for merge in plan.merges]
    if isinstance(expected, list):
        assert where == expected
    else:
        assert where == []
        assert any(expected in refusal.reason for refusal in plan.refusals)
    deploy = plan.reparameterize(*inputs)
    for x in (X, -X, torch.cat([X, X, X])):
        assert relative_error(deploy(x), model(x)) < EXACT


@pytest.mark.parametrize("case", CASES)
def test_a_part_is_merged_for_what_it_is_given(case):
    for inputs in ((X,), ()):
        part, body, known, guessed = CASES[case]
        torch.manual_seed(0)
        judge(settled(net(part, body)()), inputs, known if inputs else guessed)


# merges and refusals with an example, and without
SHOWN = dict.fromkeys(CASES, ((1, ""), (1, "Untraceable"))) | {
    "a tensor": ((0, "ExampleOnly"), (1, "ExampleOnly Untraceable")),
    "a tensor always": ((0, "ExampleOnly"), (1, "ExampleOnly Untraceable")),
    "a list": ((0, "ExampleOnly"), (1, "ExampleOnly Untraceable")),
    "a number that decides": ((0, "ExampleOnly"), (0, "ExampleOnly Untraceable")),
    "early, always": ((0, "ExampleOnly"), (0, "ExampleOnly Untraceable")),
    "a computed flag": ((0, "Unreadable"), (0, "ExampleOnly Unreadable Untraceable")),
    "a dataclass that is written to": ((0, "ExampleOnly Unreadable"), (0, "Unreadable Untraceable")),
    "a tensor or None": ((0, "Unreadable"), (0, "Unreadable Untraceable")),
    "a branch": ((0, "Unreadable"), (0, "Unreadable Untraceable")),
    "a method and its forward": ((0, "Costlier Shared"), (0, "Costlier Shared Untraceable")),
    **dict.fromkeys(("an object", "two ways", "two sizes", "early"), ((0, "Shared"), (0, "Shared Untraceable"))),
    "a module": ((0, "Shared"), (0, "ExampleOnly Shared Untraceable")),
    "inside": ((1, "Shared"), (1, "Shared Untraceable")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_part_is_given_what_the_example_does_not_show(case, monkeypatch):
    """The same, of a model that asks for values, and so is followed on one of its ways."""
    monkeypatch.setattr(sys.modules[__name__], "odd", lambda x: x.sum() < 1e9)
    part, body, *_ = CASES[case]
    for inputs in ((X,), (-X,), ()):
        torch.manual_seed(0)
        model = settled(net(part, body)())
        deploy = says(structrep.plan(model, *inputs), *SHOWN[case][not inputs]).reparameterize(*inputs)
        for x in (X, -X, torch.cat([X, X, X]), X + 1e9):
            assert relative_error(deploy(x), model(x)) < EXACT


@pytest.mark.parametrize("case", IN_LISTS)
def test_parts_in_a_list(case):
    for inputs in ((X,), ()):
        part, body, known, guessed = IN_LISTS[case]
        torch.manual_seed(0)
        judge(settled(net(part, body, several=True)()), inputs, known if inputs else guessed)


def test_what_is_not_called_with_the_example_inputs():
    """Its source says how it is called otherwise."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = Sized(), Sized(), Sized()

        def forward(self, x, more=False):
            x = x if odd(x) else x + 1
            if more:
                x = self.b(x) + self.c(x, (1, 2))
            return self.a(x)

    model = settled(Net())
    plan = structrep.plan(model, X)
    assert [merge.where for merge in plan.merges] == ["a.l", "b.l"]
    deploy = plan.reparameterize(X)
    for more in (False, True):
        assert relative_error(deploy(X, more), model(X, more)) < EXACT


def test_a_block_that_followed_and_other_code_call():
    class Outer(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return torch.relu(self.block(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Sized()
            self.outer = Outer(self.block)

        def forward(self, x):
            return self.outer(x if odd(x) else x + 1) + self.block(x, (1, 2))

    judge(settled(Net()), (X,), "is called 2 times, and not always in the same way")


def first_layer(model):
    return model.a.l


def test_a_layer_that_other_code_calls_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Normed()

        def forward(self, x):
            return self.a(x if odd(x) else x + 1) + first_layer(self)(x)

    judge(settled(Net()), (X,), "the model, whose code cannot be followed, calls a.l itself")


class Featured(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n = nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.n(self.c(x))

    def features(self, x):
        return self.c(x)


@pytest.mark.parametrize(("known", "reason"), [
    (True, "a.c is used 2 times"),
    (False, "Featured.features may look at what a.c gives"),
], ids=["with inputs", "without"])  # fmt: skip
def test_another_method_that_the_model_calls(known, reason):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Featured()

        def forward(self, x):
            return self.a(x if odd(x) else x + 1) + self.a.features(x)

    model, x = settled(Net()), X.unsqueeze(2)
    plan = structrep.plan(model, x if known else None)
    assert not plan.merges
    assert any(reason in refusal.reason for refusal in plan.refusals)
    assert relative_error(plan.apply()(x), model(x)) == 0


def test_wrong_inputs_are_the_users():
    model = settled(net(Sized, call_with_size)())
    with pytest.raises(BadInput, match="Net does not accept inputs of shape"):
        structrep.plan(model, X[:, :3])


def test_an_observed_run_holds_no_tensors_and_leaves_the_model_alone():
    from structrep.prove.run import observe

    model = settled(net(Sized, call_in_two_ways)())
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    observed = observe(model, X)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    forms = observed.forms("a", "forward")
    assert [sorted(form.given) for form in forms] == [["x"], ["size", "x"]]
    assert forms[0].given["x"].shape == (2, 8)
    assert not any(isinstance(value, torch.Tensor) for form in forms for value in form.given.values())
    assert [callee for callee, _ in observed.called_by("", "forward")] == [("a", "forward")]


def test_a_model_that_does_not_bear_to_be_watched_is_planned_all_the_same():
    class Proud(Plain):
        def forward(self, x):
            if "forward" in self.__dict__:
                raise RuntimeError("somebody watches")
            return super().forward(x)

    model = settled(nn.Sequential(Proud(), nn.ReLU()))
    assert [merge.where for merge in structrep.plan(model, X).merges] == ["0.l"]


MASKS = {"eager": lambda x: None}


def mask_of(x):
    """Cannot be followed, and what it gives is not in its source."""
    bool((x > 100).any())
    return MASKS["eager"](x)


class Handed(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Masked()

    def forward(self, x):
        return self.part(x, mask_of(x))


def test_what_a_function_gives_that_is_not_followed_may_be_none():
    """As transformers' `create_bidirectional_mask` does, for DAB-DETR."""
    model = settled(Handed())
    plan = structrep.plan(model)
    assert not plan.merges
    assert any("what part is given for mask is not known" in refusal.reason for refusal in plan.refusals)
    assert relative_error(plan.apply()(X), model(X)) == 0
    plan = structrep.plan(model, X)
    assert not plan.merges
    assert any("called with another mask as the model runs" in refusal.reason for refusal in plan.refusals)


def with_a_size(net, x):
    return net.part(x, size=(3,)) if bool((x > -100).all()) else x


class Helped(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Sized()

    def forward(self, x):
        return with_a_size(self, x)


def test_what_a_function_gives_to_a_part_of_the_module_that_it_is_handed():
    model = settled(Helped())
    plan = structrep.plan(model)
    assert not plan.merges
    assert any("what part is given for size is not known" in refusal.reason for refusal in plan.refusals)
    assert relative_error(plan.apply()(X), model(X)) == 0
    plan = structrep.plan(model, X)
    assert len(plan.merges) == 1
    assert relative_error(plan.apply()(X), model(X)) < EXACT


class Asking(Plain):
    def forward(self, x, mask):
        y = super().forward(x)
        return y if isinstance(mask, str) else y + mask


class Listing(Plain):
    def forward(self, x, mask):
        return super().forward(x) * (2 if isinstance(mask, (list, tuple)) else mask)


@pytest.mark.parametrize(("cls", "other"), [(Masked, None), (Asking, "none"), (Listing, (1,))])
def test_an_argument_that_was_taken_for_a_tensor(cls, other):
    for inputs in ((), ((X, X),)):
        model = settled(cls())
        deploy = structrep.reparameterize(model, *inputs)
        assert relative_error(deploy(X, X), model(X, X)) < EXACT
        with pytest.raises(ValueError, match="reparameterized for a tensor as mask and was called with mask="):
            deploy(X, other)


def test_a_number_for_an_argument_that_nothing_is_asked_of():
    model = settled(Added())
    deploy = says(structrep.plan(model), 1).apply()
    assert relative_error(deploy(X, 2.0), model(X, 2.0)) < EXACT


def setting(function):
    """As transformers' decorators do: sets what the function was given by keyword, whatever that was."""

    @functools.wraps(function)
    def run(self, *args, **kwargs):
        kwargs["cached"] = kwargs.pop("cached", None) or self.cached
        return function(self, *args, **kwargs)

    return run


class SetByDecorator(Plain):
    cached = False

    @setting
    def forward(self, x, cached=None):
        return super().forward(x) if not cached else x


def call_by_keyword(self, x):
    return self.a(x, cached=None) if odd(x) else x


@pytest.mark.parametrize("model", [net(SetByDecorator, call_by_keyword), SetByDecorator], ids=["a part", "the model"])
def test_what_is_given_by_keyword_is_followed_so(model):
    for inputs in ((X,), ({"x": X},)):
        plan = structrep.plan(settled(model()), *inputs)
        assert len(plan.merges) == 1
        assert not any("multiple values" in refusal.reason for refusal in plan.refusals)


class Chunked(nn.Module):
    """Hands a method to a function that asks for its signature, as transformers' `apply_chunking_to_forward` does."""

    def __init__(self):
        super().__init__()
        self.part = Plain()

    def forward(self, x):
        if len(inspect.signature(self.one_input).parameters) != 1:
            raise ValueError("one input, please")
        return self.one_input(x)

    def one_input(self, x):
        return self.part(x)


def test_a_method_whose_signature_is_asked_for_is_seen_to_be_called():
    assert observe(settled(Chunked()), X).forms("part", "forward")
