"""A forward that asks its input is followed as it goes for the example, and right for every input.

Each program is converted with an example, with another one that takes another path, and without any. Whatever was
merged, the deploy model computes what the model does on all inputs that the model takes, or raises an error that names
what it was made for. Silently other is never right.
"""

import linecache

import pytest
import torch
import torch.nn.functional as F

import structrep
from tests.support.models import noise
from tests.trace.asking import Base, X, converted, judged, made

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


@pytest.mark.parametrize(("forward", "merges", "alone"), FOLLOWED)
def test_what_is_asked_costs_no_merge(forward, merges, alone):
    for example in (X, None):

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
    _, deploy = converted(model, X, merges)
    with pytest.raises(AssertionError):
        deploy(noise(2, 4, 8)) if "dims" in forward.__name__ else deploy(noise(2, 5, 8, 8))


# --- what is said ---------------------------------------------------------------------------------------------------


def test_a_question_that_nothing_answers_is_told_with_its_place_and_a_remedy():
    plan = structrep.plan(made(counts_the_batch))
    (reason,) = [one.reason for one in plan.refusals if one.kind == "Untraceable"]
    line = counts_the_batch.__code__.co_firstlineno + 3
    assert f"`int(y.shape[0])` ({__file__}:{line})" in reason
    assert "give example inputs: structrep.reparameterize(model, x)" in reason


def test_what_was_told_is_noted_with_the_call():
    plan = structrep.plan(made(adds_a_batch), X)
    assert len(plan.merges) == 1
    (trace,) = [one for one in plan._selection.findings.traced.traces if not one.path]
    (one,) = trace.root.specializations
    assert (one.text, one.told, one.asserted) == ("x.dim() == 3", False, False)
    assert one.code is adds_a_batch.__code__
    assert one.line == one.code.co_firstlineno + 2


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
