"""Layers with code of their own, in a class or on an instance: what is read is what they compute, or they stay."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import structrep
from tests.foreign import repvgg
from tests.support.models import Written, bn, conv, noise, randomised
from tests.support.truth import EXACT, SAME, call, check, distance, equal, says

X, TINY = noise(2, 4, 5, 6), noise(1, 4, 1, 1)


# --- subclasses ----------------------------------------------------------------------------------------------


class ScaledConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2.0


class StandardisedConv(nn.Conv2d):
    """timm's ScaledStdConv and others: another weight, in forward."""

    def forward(self, x):
        w = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / (
            self.weight.std((1, 2, 3), keepdim=True) + 1e-5
        )
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class InnerConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 3, bias)


class CalledConv(nn.Conv2d):
    def __call__(self, x):
        return super().__call__(x) + 1


class SamePad(nn.Conv2d):
    """TensorFlow's "same": the pad depends on the input's size."""

    def forward(self, x):
        h, w = x.shape[-2:]
        ph, pw = [
            max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip((h, w), self.stride, self.kernel_size, strict=True)
        ]
        x = F.pad(x, (pw // 2, pw - pw // 2, ph // 2, ph - ph // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride)


class ClampedNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


class CheckedNorm(nn.BatchNorm2d):
    """Overrides a method that the parent's forward calls."""

    def _check_input_dim(self, x):
        if x.dim() != 4:
            raise ValueError("4 dims, please")


class AffineLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.abs(), self.bias)


# How many merges there are, for what others are refused without an example, and with one, and the model.
SUBCLASSES = [
    (1, "", "", lambda: nn.Sequential(ScaledConv(4, 4, 3, padding=1), bn(4))),
    (1, "", "", lambda: nn.Sequential(StandardisedConv(4, 4, 3, padding=1), bn(4))),
    (1, "", "", lambda: nn.Sequential(InnerConvForward(4, 4, 3, padding=1), bn(4))),
    (0, "Untraceable", "Untraceable", lambda: nn.Sequential(CalledConv(4, 4, 3, padding=1), bn(4))),
    (1, "Untraceable", "", lambda: nn.Sequential(SamePad(4, 4, 3, stride=2), bn(4))),
    (1, "", "", lambda: nn.Sequential(conv(), ClampedNorm(4))),
    (1, "", "", lambda: nn.Sequential(conv(), CheckedNorm(4))),
    (1, "Untraceable", "",
     lambda: Written(lambda m, x: m.a(x) + m.b(x), a=ScaledConv(4, 4, 3, padding=1), b=SamePad(4, 4, 1))),
    (1, "", "", lambda: Written(
        lambda m, x: m.a(x.mean((2, 3))) + m.b(x.mean((2, 3))), a=AffineLinear(4, 4), b=nn.Linear(4, 4))),
]  # fmt: skip


@pytest.mark.parametrize(("merges", "refused", "followed", "make"), SUBCLASSES)
def test_subclasses_with_their_own_forward(merges, refused, followed, make):
    check(make(), X, TINY, merges=merges, refused=refused, ways=("alone", "in place"))
    check(make(), X, TINY, merges=merges, refused=followed, ways=("with an example",))


class BiasElsewhere(nn.Conv2d):
    def forward(self, x):
        return F.relu(F.conv2d(x, self.weight)) + self.bias.view(1, -1, 1, 1)


class WeightElsewhere(nn.Conv2d):
    def forward(self, x):
        return F.relu(F.conv2d(x, self.weight, self.bias)) * self.weight.mean()


@pytest.mark.parametrize("cls", [BiasElsewhere, WeightElsewhere])
def test_parameters_used_twice(cls):
    check(nn.Sequential(nn.BatchNorm2d(4), cls(4, 4, 1)), X, merges=1)


def test_a_call_that_does_more_than_the_forward():
    model = nn.Sequential(CalledConv(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    check(model, X, merges=0, refused="Untraceable", within=SAME)


class Standardised(nn.Conv2d):
    """Its parameter is called raw; weight is computed."""

    def __init__(self):
        super().__init__(4, 4, 3, padding=1)
        self.raw = nn.Parameter(self.weight.detach().clone())
        del self.weight

    @property
    def weight(self):
        return (self.raw - self.raw.mean()) * 3

    @weight.setter
    def weight(self, value):
        pass


def test_weight_that_is_a_property():
    check(nn.Sequential(Standardised(), bn(4)), X, TINY, merges=1)


# --- instances -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "merges", "refused"),
    [("0.0", 1, "Isolated"), ("0.1", 1, ""), ("0", 2, ""), ("", 2, "")],
    ids=["conv", "norm", "container", "root"],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_instance_whose_forward_was_replaced(where, merges, refused, inplace):
    model = randomised(nn.Sequential(nn.Sequential(conv(), bn(4)), nn.ReLU(), nn.Sequential(conv(), bn(4))))
    target = model.get_submodule(where)
    inner = type(target).forward
    target.forward = lambda x: inner(target, x) * 2 + 1
    truth = call(model, X)
    deploy = says(structrep.plan(model), merges, refused).reparameterize(inplace=inplace)
    assert distance(call(deploy, X), truth) <= EXACT


class Fused(repvgg.Official):
    def forward_fuse(self, x):
        return self.rbr_dense(x) + self.rbr_1x1(x)


def test_method_bound_to_the_model_stays_with_its_own_model():
    """`model.forward = model.forward_fuse`, as detection code does: the copy must not run the original's layers."""
    model = randomised(Fused(4, 4))
    model.forward = model.forward_fuse
    truth = call(model, X)
    deploy = says(structrep.plan(model), 1).reparameterize()
    assert distance(call(deploy, X), truth) <= EXACT
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert distance(call(deploy, X), truth) <= EXACT


# --- weights that are computed --------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


WEIGHTS = {
    "parametrize": lambda c: parametrize.register_parametrization(c, "weight", Doubled().eval()) and c,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda c: torch.nn.utils.prune.l1_unstructured(c, "weight", 0.5),
}


def dressed(way, state=None):
    """Randomised first, then dressed: what the dress computes is a function of the weights as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = WEIGHTS[way](randomised(conv()))
        model = nn.Sequential(first, randomised(bn(4)), nn.ReLU(), randomised(conv())).eval()
        if state is not None:
            model.load_state_dict(state)
    return model


@pytest.mark.parametrize("way", WEIGHTS)
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "ran-once"])
def test_computed_weights(way, fresh):
    model = dressed(way)
    if not fresh:
        call(model, X)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    deploy = says(structrep.plan(model), 1).reparameterize()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert equal(deploy, model, X)
    assert equal(structrep.reparameterize(model, inplace=True), dressed(way, state), X)


def test_computed_weight_in_a_sum():
    model = Written(lambda m, x: m.c(x) + m.d(x) + x, c=parametrizations.weight_norm(conv()), d=conv(k=1))
    check(model, X, TINY, merges=1, conv=1)
