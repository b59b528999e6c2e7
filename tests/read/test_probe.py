"""Layers whose code cannot be read: by a reader of the user's, or found out by what they do."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import structrep
from structrep import ConvMap
from structrep.errors import BadInput, Inexact, InvalidReader, Refusal, Unreadable
from tests.support.models import settled
from tests.support.truth import CLOSE, EXACT, relative_error


class Opaque(nn.Module):
    """Hides what it does from torch.fx, and goes through numpy."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        if str(x) == "never":
            return x
        return torch.from_numpy(self.inner(x).detach().numpy().copy())


@st.composite
def layers(draw):
    dims = draw(st.integers(0, 3))
    torch.manual_seed(draw(st.integers(0, 99)))
    groups = draw(st.sampled_from([1, 1, 2]))
    inside, out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    if not dims:
        return nn.Linear(inside, out), torch.randn(3, inside)
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        inside, out, each(1, 3), each(1, 2), each(0, 1), each(1, 2), groups, draw(st.booleans()), mode
    )
    return conv, torch.randn(2, inside, *each(6, 8))


@given(layers())
def test_a_hidden_convolution_is_found(case):
    conv, x = case
    map_ = structrep.probe(Opaque(conv), x)
    truth = conv.double()(x.double())
    assert relative_error(map_(x.double()), truth) < EXACT


@pytest.mark.parametrize(("layer", "said"), [
    (nn.ReLU(), "not affine"),
    (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Tanh()), "not affine"),
    (nn.LayerNorm([4, 6, 6], elementwise_affine=False), "not affine"),
    (nn.MaxPool2d(2), "not affine"),
    (nn.Softmax(1), "not affine"),
    (nn.AvgPool2d(3, 1, 1, count_include_pad=False), "pads its input with nothing that is known"),
    (nn.Upsample(scale_factor=2), "sizes"),
    (nn.Flatten(2), "as many dims"),
    (nn.AdaptiveAvgPool2d(1), "sizes"),
])  # fmt: skip
def test_what_is_no_map_is_refused(layer, said):
    with pytest.raises(Refusal, match=said):
        structrep.probe(layer, torch.randn(1, 4, 6, 6))


class Positional(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.map = nn.Parameter(torch.randn(1, 4, 6, 6))

    def forward(self, x):
        return x + self.map if self.kind == "add" else x * self.map


@pytest.mark.parametrize("kind", ["add", "mul"])
def test_what_depends_on_the_place_is_refused(kind):
    with pytest.raises(Unreadable, match="not the same everywhere"):
        structrep.probe(Positional(kind), torch.randn(1, 4, 6, 6))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd, self.norm, self.act = Opaque(nn.Conv2d(3, 4, 3, padding=1)), nn.BatchNorm2d(4), nn.ReLU()
        self.curve = Opaque(nn.Tanh())

    def forward(self, x):
        return self.curve(self.act(self.norm(self.odd(x))))


def test_a_plan_probes_what_the_user_names_and_marks_it():
    model, x = settled(Net()), torch.randn(1, 3, 6, 6, dtype=torch.float64)
    assert not structrep.plan(model, x).merges
    plan = structrep.plan(model, x, probe=["odd", "curve"])
    (merge,) = plan.merges
    assert merge.notes == ("odd was probed, not read",)
    assert "curve" in [refusal.where for refusal in plan.refusals if refusal.what == "probed"]
    by_type = structrep.plan(model, x, probe=Opaque)
    assert (by_type.merges, by_type.refusals) == (plan.merges, plan.refusals)
    deploy = structrep.reparameterize(model, x, probe="od*")
    assert type(deploy.odd) is nn.Conv2d
    assert relative_error(deploy(x), model(x)) < CLOSE
    assert not any(hasattr(module, "structrep_probed") for module in (*model.modules(), *deploy.modules()))


class Counts(nn.Module):
    """Writes to itself, so its forward cannot be written anew, and goes by an argument, so it cannot be edited: the
    search is made a second time."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.curve = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), Opaque(nn.Tanh())

    def forward(self, x, sign=1.0):
        self.seen = x
        return self.curve(self.left(x) + sign * self.right(x))


def test_what_was_refused_to_be_probed_is_still_said_after_a_second_search():
    plan = structrep.plan(settled(Counts()), torch.randn(1, 3, 6, 6, dtype=torch.float64), probe=["curve"])
    assert not plan.merges
    assert [refusal.where for refusal in plan.refusals if refusal.what == "probed"] == ["curve"]


def test_probing_needs_inputs_and_a_layer():
    with pytest.raises(BadInput, match="example_inputs are needed"):
        structrep.plan(settled(Net()), probe="odd")
    with pytest.raises(BadInput, match="no module named 'even'"):
        structrep.plan(settled(Net()), torch.randn(1, 3, 6, 6), probe="even")
    with pytest.raises(BadInput, match="no module of type Conv3d"):
        structrep.plan(settled(Net()), torch.randn(1, 3, 6, 6), probe=[nn.Conv3d, "odd"])
    with pytest.raises(BadInput, match="or types of modules"):
        structrep.plan(settled(Net()), torch.randn(1, 3, 6, 6), probe=int)


# --- readers ---------------------------------------------------------------------------------------------------------


class Gained(nn.Module):
    """A convolution with a gain, in code that is not followed."""

    def __init__(self, inside, out, k):
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(out, inside, k, k)), nn.Parameter(torch.rand(out))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x):
        if str(x) == "never":
            return x
        return F.conv2d(x, self.weight * self.gain.reshape(-1, 1, 1, 1), self.bias, padding=self.weight.shape[-1] // 2)


class Shifted(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(channels))

    def forward(self, x):
        return x + self.shift.reshape(-1, 1, 1) if str(x) != "never" else x


@structrep.reader(Gained)
def gained(layer):
    kernel = layer.weight * layer.gain.reshape(-1, 1, 1, 1)
    return ConvMap(kernel, layer.bias, pad=layer.weight.shape[-1] // 2)


@structrep.reader(Shifted)
def shifted(layer):
    return ConvMap.scale(torch.ones_like(layer.shift), layer.shift)


def test_a_reader_of_the_users():
    torch.manual_seed(0)
    model = settled(
        nn.Sequential(Gained(3, 4, 3), Shifted(4), nn.BatchNorm2d(4), nn.ReLU(), Gained(4, 4, 1), nn.ReLU())
    )
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    deploy = structrep.reparameterize(model, x)
    assert relative_error(deploy(x), model(x)) < CLOSE
    assert type(deploy[0]) is nn.Conv2d
    assert not any(isinstance(module, (Shifted, nn.BatchNorm2d)) for module in deploy)


def test_a_subclass_with_a_forward_of_its_own_is_not_read_so():
    class Doubled(Gained):
        def forward(self, x):
            return 2 * super().forward(x)

    model = settled(nn.Sequential(Doubled(3, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    assert relative_error(structrep.reparameterize(model)(x), model(x)) < CLOSE


def test_readers_that_cannot_be():
    for types in ((), (nn.Conv2d,), (Gained,), (3,), (int,)):
        with pytest.raises(InvalidReader):
            structrep.reader(*types)


def test_a_reader_that_gives_something_else_or_something_wrong():
    class Broken(Gained):
        forward = Gained.forward

    class Lies(Gained):
        def forward(self, x):
            return super().forward(x)

    structrep.reader(Broken)(lambda layer: layer.weight)
    structrep.reader(Lies)(lambda layer: ConvMap(layer.weight * 2, layer.bias, pad=1))
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    for kind, said in ((Broken, "gave a Parameter, not a ConvMap"), (Lies, "off by")):
        model = settled(nn.Sequential(kind(3, 4, 3), nn.BatchNorm2d(4)))
        plan = structrep.plan(model)
        plan.prove()
        assert not plan.merges
        assert any(said in refusal.reason for refusal in plan.refusals)
        assert relative_error(structrep.reparameterize(model)(x), model(x)) < CLOSE


def test_a_border_that_no_map_has():
    with pytest.raises(Inexact):
        structrep.probe(nn.AvgPool2d(3, 1, 1, count_include_pad=False), torch.randn(1, 2, 6, 6))
