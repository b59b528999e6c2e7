"""Parts of a model whose answers matter around them, and functions that are kept whole."""

import pytest
import torch
from torch import nn

import structrep
from tests.support.truth import EXACT, relative_error
from tests.trace.asking import Base, X, converted, judged, made

# --- modules in each other ------------------------------------------------------------------------------------------


class Part(nn.Module):
    """A part that asks, in a model that adds."""

    def __init__(self):
        super().__init__()
        self.c, self.n = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)


class Counting(Part):
    def forward(self, x):
        return int(x.shape[2]) // 4


class Listing(Part):
    def forward(self, x):
        return [self.n(self.c(x)), x, x][: int(x.shape[2]) // 4]


class Perhaps(Part):
    def forward(self, x):
        if x.shape[2] > 9:
            return None
        return self.n(self.c(x))


class Asking(Part):
    def forward(self, x):
        if x.dim() == 3:
            x = x[None]
        return self.n(self.c(x))


class Scaled(Part):
    def forward(self, x, scale):
        return self.n(self.c(x) * scale)


class Repeated(Part):
    def __init__(self):
        super().__init__()
        self.d = nn.ModuleList([nn.Conv2d(4, 4, 1, bias=False) for _ in range(4)])

    def forward(self, x, rounds):
        for index in range(rounds):
            x = self.d[index](x)
        return x


def outer(part, forward):
    class Outer(Base):
        def __init__(self):
            super().__init__()
            self.norms = self.m = None
            self.part = part()

    return made(forward, Outer)


def adds(self, x):
    return self.part(x) + (self.a(x) + self.b(x))


def counts(self, x):
    y = self.a(x)
    for index in range(self.part(x)):
        y = y + self.rows[index](x)
    return self.n(y)


def sums(self, x):
    return sum(self.part(x)) + self.a(x) + self.b(x)


def perhaps(self, x):
    y = self.part(x)
    return (x if y is None else y) + self.a(x) + self.b(x)


def scales(self, x):
    return self.part(x, torch.ones(1, 4, 1, 1, dtype=x.dtype) * int(x.shape[2]))


def scales_by_a_number(self, x):
    return self.part(x, int(x.shape[2]))


def repeats(self, x):
    return self.part(x, int(x.shape[2] // 4))


@pytest.mark.parametrize(
    ("part", "forward", "merged", "refused"),
    [
        pytest.param(Asking, adds, ["part.c", "reparam_conv"], "", id="a part that asks"),
        pytest.param(Counting, counts, [], "Counting.forward asks `int(x.shape[2])`", id="a part that counts"),
        pytest.param(Listing, sums, ["part.c"], "Listing.forward asks `int(x.shape[2])`", id="a list"),
        pytest.param(Perhaps, perhaps, ["part.c"], "Perhaps.forward asks `x.shape[2] > 9`", id="perhaps None"),
        pytest.param(Scaled, scales, [], "given a constant, which may be another one", id="a constant"),
        pytest.param(Scaled, scales_by_a_number, [], "called with something else for scale", id="a number"),
        pytest.param(Repeated, repeats, [], "called with something else for rounds", id="a number of rounds"),
    ],
)
def test_what_a_part_is_told_matters_around_it(part, forward, merged, refused):
    model = outer(part, forward)
    plan, deploy = converted(model)
    assert not judged(model, deploy)
    merges = sorted(one.where for one in plan.merges if not one.where.startswith("rows"))
    assert merges == merged, plan.refusals
    assert refused in str(plan.refusals)


# --- what gives back its argument, and functions that are kept whole --------------------------------------------------


class Dropping(nn.Module):
    """A drop path, which does nothing as it is."""

    def __init__(self):
        super().__init__()
        self.p, self.low = 0.5, False

    def forward(self, x):
        if self.p == 0.0 or not self.training:
            return x * 2 if self.low else x
        return x * torch.rand(1)


class Doubling(nn.Module):
    def forward(self, x):
        if x.shape[2] > 9:
            return x * 2
        return x


def passes_on(self, x):
    return self.part(self.a(x) + self.b(x)) + x


def test_a_part_that_gives_back_what_it_is_given_does_not_part_a_sum():
    model = outer(Dropping, passes_on)
    plan, deploy = converted(model)
    assert [one.where for one in plan.merges if not one.where.startswith("rows")] == ["reparam_conv"]
    assert not judged(model, deploy)
    model = outer(Dropping, passes_on)
    model.part.low = True
    truth = model(X)
    deploy = structrep.plan(model, X).apply()
    assert relative_error(deploy(X), truth) < EXACT


def test_a_part_that_gave_back_what_it_was_given_says_so():
    _, deploy = converted(outer(Dropping, passes_on))
    if deploy.part is not None:
        deploy.part.low = True
        with pytest.raises(ValueError, match="reparameterized for"):
            deploy(X)


def test_a_part_that_gives_it_back_for_the_example_alone():
    model = outer(Doubling, passes_on)
    plan, deploy = converted(model)
    assert not judged(model, deploy)
    assert [one.where for one in plan.merges if not one.where.startswith("rows")] == ["reparam_conv"]
    assert isinstance(deploy.part, Doubling)


@torch.jit.script
def fused(x):
    return x * torch.sigmoid(x)


def reduced(x):
    """As einops has it: it asks what no traced value tells, and gives a value however it ends."""
    try:
        return x.mean((2, 3)) if str(x) else x
    except KeyError as error:
        raise ValueError("no such pattern") from error


def reduces(self, x):
    return reduced(self.a(x) + self.b(x))


def test_a_function_that_tries_is_kept_whole():
    plan, deploy = converted(made(reduces))
    assert "reparam_conv" in [one.where for one in plan.merges], plan.refusals
    assert not judged(made(reduces), deploy)


def scripted(self, x):
    return fused(self.n(self.a(x)))


def scripted_sum(self, x):
    return fused(self.a(x) + self.b(x))


def test_a_function_of_torchscript_is_kept_whole():
    plan, deploy = converted(made(scripted))
    assert "a" in [one.where for one in plan.merges]
    assert not judged(made(scripted), deploy)
    plan, deploy = converted(made(scripted_sum))
    assert not judged(made(scripted_sum), deploy)
    assert [one.edit for one in plan.merges if one.where == "reparam_conv"] == ["edit"]  # its name stays the user's


@pytest.mark.parametrize("forward", [
    lambda self, x: self.n(self.a(x).to(x.device, x.dtype)),
    lambda self, x: self.n(self.a(x).to(device=x.device, dtype=self.m.weight.dtype)),
    lambda self, x: self.n(self.a(x).to(self.m.weight)),
])  # fmt: skip
def test_casts_to_what_a_value_is_already(forward):
    plan, deploy = converted(made(forward))
    assert "a" in [one.where for one in plan.merges], plan.refusals
    assert not judged(made(forward), deploy)


def test_a_cast_that_rounds_is_one():
    forward = lambda self, x: self.n(self.a(x).to(x.device, torch.float32).double())  # noqa: E731
    plan, deploy = converted(made(forward))
    assert "a" not in [one.where for one in plan.merges]
    assert not judged(made(forward), deploy)


def given_twice_perhaps(self, x):
    return self.part(x, x if x.shape[2] < 9 else x * 2)


class Adding(Part):
    def forward(self, x, other):
        return self.n(self.c(x)) + other


def test_one_value_for_two_arguments():
    model = outer(Adding, given_twice_perhaps)
    plan, deploy = converted(model)
    assert not judged(model, deploy)
    assert "one value for several arguments" in str(plan.refusals)


def test_a_block_behind_a_sign_of_one_way_merges_without_it():
    """A scale before all branches is given to each of them, where that may be."""

    class Branches(Part):
        def forward(self, x):
            return self.n(self.c(x)) + self.c2(x)

        def __init__(self):
            super().__init__()
            self.c2 = nn.Conv2d(4, 4, 3, padding=1)

    for example in (X, -X, None):
        model = outer(Branches, lambda self, x: self.part(x) if x.mean() > 0 else self.part(-x))
        plan, deploy = converted(model, example)
        assert "part.reparam_conv" in [one.where for one in plan.merges], plan.refusals
        assert not judged(model, deploy)
