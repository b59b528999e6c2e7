"""A forward that asks its input is followed as it goes for the example, and right for every input.

Each program is converted with an example, with another one that takes another path, and without any. Whatever was
merged, the deploy model computes what the model does on all inputs that the model takes, or raises an error that names
what it was made for. Silently other is never right.
"""

import functools
import itertools
import linecache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import relative_error

GENERATOR = torch.Generator().manual_seed(0)


def noise(*sizes):
    return torch.randn(*sizes, dtype=torch.float64, generator=GENERATOR)


X = noise(2, 4, 8, 8)
LARGE = noise(2, 4, 12, 12)
SMALL = noise(2, 4, 3, 3)
INPUTS = {
    "as the example": X,
    "large": LARGE,
    "small": SMALL,
    "odd": noise(2, 4, 7, 9),
    "another batch": noise(3, 4, 8, 8),
    "one image": noise(1, 4, 8, 8),
    "no batch": noise(4, 8, 8),
    "empty": noise(0, 4, 8, 8),
    "with gradients": noise(2, 4, 8, 8).requires_grad_(),
    "great": X + 1e7,
    "not contiguous": noise(2, 4, 8, 8).transpose(2, 3),
}


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b, self.m = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), None
        self.m = nn.BatchNorm2d(4)
        self.rows = nn.ModuleList([nn.Conv2d(4, 4, 1, bias=False) for _ in range(4)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(4)])
        self.low = False


def made(forward, base=Base):
    torch.manual_seed(0)
    return settled(type("Made", (base,), {"forward": forward, "__module__": __name__})())


def given(x):
    return x.detach().clone().requires_grad_(x.requires_grad)


def judged(model, deploy):
    """The names of inputs on which a deploy model raises, and says what it was made for; it is right on all others."""
    told = []
    for name, x in INPUTS.items():
        try:
            truth = model(given(x))
        except Exception:
            continue
        try:
            found = deploy(given(x))
        except Exception as error:
            if not any(said in str(error) for said in ("reparameterized for", "raises for this input")):
                raise AssertionError(name) from error
            told.append(name)
            continue
        alike = relative_error(found, truth) < 1e-9 if isinstance(truth, torch.Tensor) else found == truth
        assert alike, name
    return told


def converted(model, example=X, merges=None):
    plan = structrep.plan(model, example)
    assert merges is None or len(plan.merges) == merges, plan.refusals
    return plan, plan.apply()


# --- what merges ----------------------------------------------------------------------------------------------------

FOLLOWED = []


def merging(count, alone=None):
    """A forward, how many merges there are with the example, and without one (as many, if not said)."""

    def add(forward):
        case = (forward, count, count if alone is None else alone)
        FOLLOWED.append(pytest.param(*case, id=forward.__name__))
        return forward

    return add


@merging(1)
def asserts_channels(self, x):
    assert x.shape[1] == 4
    return self.n(self.a(x)) + self.b(x)


@merging(1)
def asserts_dims(self, x):
    assert x.dim() == 4, "images"
    return self.n(self.a(x)) + self.b(x)


@merging(1)
def asserts_several(self, x):
    assert x.dim() == 4 and x.shape[1] == 4, f"not {x.shape}"  # noqa: PT018
    return self.n(self.a(x)) + self.b(x)


@merging(1)
def asserts_sizes(self, x):
    h, w = x.shape[2:]
    y = self.n(self.a(x)) + self.b(x)
    assert y.shape[2] * y.shape[3] == h * w
    return y


@merging(1)
def adds_a_batch(self, x):
    if x.dim() == 3:
        x = x[None]
    return self.n(self.a(x))


@merging(1)
def adds_a_batch_and_takes_it_away(self, x):
    single = x.ndim == 3
    x = x.unsqueeze(0) if single else x
    y = self.n(self.a(x))
    return y.squeeze(0) if single else y


@merging(1)
def leaves_where_there_is_nothing(self, x):
    if x.numel() == 0:
        return x
    return self.n(self.a(x))


@merging(1)
def asks_for_gradients(self, x):
    if x.requires_grad:
        x = x * 2
    return self.n(self.a(x))


@merging(1)
def asks_where_it_is(self, x):
    if x.is_cuda or x.device.type == "mps":
        x = x.float()
    return self.n(self.a(x))


@merging(1)
def asks_how_it_lies(self, x):
    if not x.is_contiguous():
        x = x.contiguous() * 2
    return self.n(self.a(x))


@merging(1, 0)
def asks_for_its_length(self, x):
    if len(x) == 0:
        return x
    return self.n(self.a(x))


@merging(1)
def pads_to_a_multiple(self, x):
    if x.shape[2] % 4:
        x = F.pad(x, (0, 0, 0, 4 - x.shape[2] % 4))
    return self.n(self.a(x))


@merging(1)
def asks_behind_the_merge(self, x):
    y = self.n(self.a(x))
    if y.shape[2] > 9:
        y = y.relu()
    return y


@merging(1)
def takes_sizes_apart(self, x):
    batch, *size = x.shape
    return self.n(self.a(x)).view(batch, 4, *size[1:])


@merging(1)
def spreads_sizes(self, x):
    y = self.n(self.a(x)) + self.b(x)
    return y.reshape(*y.shape[:-1], 1, y.shape[-1])


@merging(1)
def lists_sizes(self, x):
    y = self.n(self.a(x)) + self.b(x)
    return y.reshape(list(y.shape[:-1]) + [1, y.shape[-1]])  # noqa: RUF005


@merging(1)
def packs_sizes(self, x):
    y = self.n(self.a(x)) + self.b(x)
    return y.reshape(tuple(y.shape[:-1]) + (1, y.shape[-1]))  # noqa: RUF005


@merging(1)
def goes_through_dims(self, x):
    y = self.n(self.a(x))
    for dim in range(x.ndim):
        y = y + dim
    return y


@merging(1, 0)
def goes_through_channels(self, x):
    y = self.n(self.a(x))
    for _ in range(x.shape[1] // 3):
        y = y.relu() - 1
    return y


@merging(1, 0)
def counts_the_batch(self, x):
    y = self.n(self.a(x))
    return y.view(int(y.shape[0]), -1)


@merging(1, 0)
def takes_the_batch_apart(self, x):
    y = self.n(self.a(x))
    return torch.cat([one.relu() for one in y.split(1)])


@merging(1)
def pools_it_all(self, x):
    y = self.n(self.a(x))
    return F.avg_pool2d(y, y.shape[-2:])


@merging(1)
def looks_at_values(self, x):
    if x.abs().max() > 1e6:
        x = x / 1e6
    return self.n(self.a(x))


@merging(1)
def looks_at_values_behind_the_merge(self, x):
    y = self.n(self.a(x))
    if y.sum() > 1e6:
        y = y / 1e6
    return y


@merging(1)
def asks_for_channels_behind_a_layer(self, x):
    y = self.a(x).relu()
    if y.shape[1] == 3:
        y = y * 2
    return y + (self.n(self.b(x)) + x)


@merging(1)
def takes_channels_apart(self, x):
    y = self.a(x)
    return sum(y[:, index : index + 1].relu() for index in range(y.shape[1])) + (self.n(self.b(x)) + x)


@pytest.mark.parametrize("example", [X, None], ids=["with an example", "without"])
@pytest.mark.parametrize(("forward", "merges", "alone"), FOLLOWED)
def test_what_is_asked_costs_no_merge(forward, merges, alone, example):
    class Plain(Base):
        def __init__(self):
            super().__init__()
            self.rows = self.norms = self.m = None

    model = made(forward, Plain)
    _, deploy = converted(model, example, alone if example is None else merges)
    told = judged(model, deploy)
    assert "as the example" not in told


@pytest.mark.parametrize(("forward", "merges", "alone"), FOLLOWED[:2])
def test_assertions_are_known_whoever_compiles_them(forward, merges, alone):
    """pytest writes those of this file anew; others are as Python has them."""
    lines = "".join(linecache.getlines(__file__)[forward.__code__.co_firstlineno :]).partition("\n\n\n")[0]
    name = f"<{forward.__name__}>"
    linecache.cache[name] = (len(lines), None, lines.splitlines(True), name)
    space = {**globals()}
    exec(compile(lines, name, "exec"), space)
    model = made(space[forward.__name__])
    _, deploy = converted(model)
    with pytest.raises(AssertionError):
        deploy(noise(2, 4, 8)) if "dims" in forward.__name__ else deploy(noise(2, 5, 8, 8))


# --- what does not --------------------------------------------------------------------------------------------------

TRAPS = []


def trap(forward):
    """A forward whose norm may not be merged into the convolution before it, or whose layers may not be one."""
    TRAPS.append(pytest.param(forward, id=forward.__name__))
    return forward


@trap
def gives_back_what_is_between(self, x):
    y = self.a(x)
    if x.shape[2] > 9:
        return y
    return self.n(y)


@trap
def gives_back_what_is_between_by_value(self, x):
    y = self.a(x)
    if x.abs().max() > 1e6:
        return y
    return self.n(y)


@trap
def gives_back_what_is_between_if_one_asks_there(self, x):
    if (y := self.a(x)).shape[2] > 9:
        return y
    return self.n(y)


@trap
def convolution_without_its_norm(self, x):
    if x.shape[2] > 9:
        return self.a(x)
    return self.n(self.a(x))


@trap
def convolution_twice(self, x):
    if x.shape[2] > 9:
        x = self.a(x).relu()
    return self.n(self.a(x))


@trap
def convolution_by_its_weight(self, x):
    if x.shape[2] > 9:
        return F.conv2d(x, self.a.weight)
    return self.n(self.a(x))


@trap
def norm_without_its_convolution(self, x):
    if x.numel() == 0 or x.shape[2] > 9:
        return self.n(x)
    return self.n(self.a(x))


@trap
def norm_twice(self, x):
    y = self.n(self.a(x))
    if x.shape[2] > 9:
        y = self.n(y)
    return y


@trap
def another_norm(self, x):
    y = self.a(x)
    return self.m(y) if x.shape[2] > 9 else self.n(y)


@trap
def another_norm_for_gradients(self, x):
    y = self.a(x)
    return self.m(y) if x.requires_grad else self.n(y)


@trap
def channels_in_another_order(self, x):
    y = self.a(x)
    if x.shape[2] > 9:
        y = y[:, [1, 0, 3, 2]]
    return self.n(y)


@trap
def written_to(self, x):
    y = self.a(x)
    if x.shape[2] > 9:
        y[:, 0] = 1
    return self.n(y)


@trap
def written_to_in_place(self, x):
    y = self.a(x)
    if x.shape[2] > 9:
        y += 1
    return self.n(y)


@trap
def input_written_to_meanwhile(self, x):
    x = x.clone()
    y = self.n(x)
    if x.shape[2] > 9:
        x += 1
    return self.b(y)


@trap
def as_many_layers_as_the_input_says(self, x):
    for index in range(x.shape[2] // 4):
        x = self.rows[index](x)
    return x


@trap
def as_many_layers_as_a_name_says(self, x):
    _, _, h, _ = x.shape
    for index in range(h // 4):
        x = self.rows[index](x)
    return x


@trap
def as_many_layers_as_a_slice_says(self, x):
    for layer in self.rows[: x.shape[2] // 4]:
        x = layer(x)
    return x


@trap
def as_many_layers_as_zip_says(self, x):
    for layer, _ in zip(self.rows, range(x.shape[2] // 4), strict=False):
        x = layer(x)
    return x


@trap
def as_many_layers_as_islice_says(self, x):
    for layer in itertools.islice(self.rows, int(x.shape[2] // 4)):
        x = layer(x)
    return x


@trap
def as_many_layers_as_reduce_is_given(self, x):
    return functools.reduce(lambda y, layer: layer(y), list(self.rows)[: int(x.shape[2] // 4)], x)


@trap
def as_many_layers_as_images(self, x):
    for layer, _ in zip(self.rows, x, strict=False):
        x = layer(x)
    return x


@trap
def layers_until_a_break(self, x):
    for index, layer in enumerate(self.rows):
        if index >= x.shape[2] // 4:
            break
        x = layer(x)
    return x


@trap
def layers_while(self, x):
    index = 0
    while index < x.shape[2] // 4:
        x = self.rows[index](x)
        index += 1
    return x


@trap
def one_layer_and_then_some(self, x):
    y = self.rows[0](x)
    for _ in range(x.shape[2] // 8):
        y = self.rows[1](y)
    return y


@trap
def one_round_of_several_before_a_norm(self, x):
    y = x
    for _ in range(x.shape[2] // 6):
        y = self.a(y)
    return self.n(y)


@trap
def one_round_of_several_of_a_norm(self, x):
    y = self.a(x)
    for _ in range(x.shape[2] // 6):
        y = self.n(y)
    return y


@trap
def no_round_between(self, x):
    y = self.a(x)
    for _ in range(x.shape[2] // 12):
        y = y * 2
    return self.n(y)


@trap
def norm_of_an_index(self, x):
    return self.norms[x.shape[2] // 8](self.a(x))


@trap
def norm_of_a_condition(self, x):
    return self.norms[int(x.shape[2] > 9)](self.a(x))


@trap
def norm_of_a_value(self, x):
    return self.norms[int((x.abs().max() > 1e6).item())](self.a(x))


@trap
def norm_of_a_bound(self, x):
    return self.norms[max(0, x.shape[2] // 4 - 2)](self.a(x))


@trap
def norm_of_a_name(self, x):
    return getattr(self, "m" if x.shape[2] > 9 else "n")(self.a(x))


@trap
def norm_of_a_dict(self, x):
    return {8: self.n, 12: self.m}.get(int(x.shape[2]), self.n)(self.a(x))


@trap
def norm_that_sorting_puts_first(self, x):
    return sorted([self.n, self.m], key=lambda one: (x.shape[2] > 9) == (one is self.n))[0](self.a(x))


@trap
def norm_in_a_function(self, x):
    def ends(y):
        if x.shape[2] > 9:
            return y
        return self.n(y)

    return ends(self.a(x))


@trap
def matched(self, x):
    match int(x.shape[2]):
        case 12:
            return self.a(x)
        case _:
            return self.n(self.a(x))


@trap
def caught(self, x):
    y = self.a(x)
    try:
        y = self.n(y) if x.shape[2] < 9 else y.undefined
    except AttributeError:
        y = y * 2
    return y


@trap
def asserted_in_vain(self, x):
    try:
        assert x.shape[2] < 9
    except AssertionError:
        return self.a(x)
    return self.n(self.a(x))


@trap
def factor_of_the_batch(self, x):
    return self.n(self.a(x) * int(x.shape[0]))


@trap
def factor_of_one_for_the_example(self, x):
    return self.n(self.a(x) * (int(x.shape[2]) // 8))


@trap
def factor_of_a_condition(self, x):
    return self.n(self.a(x) * (not x.shape[2] > 9))


@trap
def sum_behind_a_condition(self, x):
    if x.shape[2] > 9:
        x = x * 2
    return self.a(x) + self.b(x)


@trap
def sum_of_as_many_as_the_input_says(self, x):
    return sum(self.rows[index](x) for index in range(x.shape[2] // 4))


@trap
def weights_of_a_size(self, x):
    some = int(x.shape[2]) // 4
    return F.conv2d(F.conv2d(x, self.rows[0].weight[:some]), self.rows[1].weight[:, :some])


@pytest.mark.parametrize("forward", TRAPS)
def test_no_other_path_is_lost(forward):
    for example in (X, LARGE, SMALL, None):
        if forward is weights_of_a_size and example is SMALL:
            continue  # which it does not take
        model = made(forward)
        plan, deploy = converted(model, example)
        assert not judged(model, deploy)
        edited = forward is sum_behind_a_condition
        assert all(merge.where.startswith("rows") or (edited and merge.edit == "edit") for merge in plan.merges)


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
    assert relative_error(deploy(X), truth) < 1e-12


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


# --- what is said ---------------------------------------------------------------------------------------------------


def test_a_question_that_nothing_answers_is_told_with_its_place_and_a_remedy():
    plan = structrep.plan(made(counts_the_batch))
    (reason,) = [one.reason for one in plan.refusals if one.kind == "Untraceable"]
    line = counts_the_batch.__code__.co_firstlineno + 3
    assert f"`int(y.shape[0])` ({__file__}:{line})" in reason
    assert "give example inputs: structrep.reparameterize(model, x)" in reason


def test_what_was_told_is_noted_with_the_call():
    plan = structrep.plan(made(adds_a_batch), X)
    (trace,) = [one for one in plan._selection.findings.traced.traces if not one.path]
    (answer,) = trace.root.answers
    assert (answer.text, answer.told, answer.asserted) == ("x.dim() == 3", False, False)
    assert answer.code is adds_a_batch.__code__
    assert answer.line == answer.code.co_firstlineno + 2


def test_the_example_is_not_written_to():
    def forward(self, x):
        x *= 2
        if x.sum() > 1e9:
            x = x + 1
        return self.n(self.a(x))

    x = X.clone()
    plan = structrep.plan(made(forward), x)
    assert torch.equal(x, X)
    assert "a" in [one.where for one in plan.merges]
