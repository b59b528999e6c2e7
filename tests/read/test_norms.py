"""Norms: which are affine maps, of which dim, and what takes them: a convolution, or a Linear, also of tokens."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.foreign import repvgg
from tests.support.models import Written, bn, conv, noise, randomised
from tests.support.truth import CLOSE, EXACT, call, check, distance, equal, says

X, TINY = noise(2, 4, 5, 6), noise(1, 4, 1, 1)


def linear_norm(width, then=None):
    return Written(
        lambda m, x: m.n(m.l(x) if then is None else then(m.l(x))), l=nn.Linear(6, width), n=nn.BatchNorm1d(5)
    )


def test_a_norm_after_a_linear_is_of_its_channels_on_2d_alone():
    """The module does not say of how many dims its input is; the example does."""
    x = noise(3, 6)
    check(linear_norm(5), x, merges=0, refused="Unreadable", ways=("alone", "in place"), norm=1)
    check(linear_norm(5), x, merges=1, ways=("with an example",), norm=0)


def test_norm_after_a_linear_on_3d_acts_on_another_dim():
    """(N, L, C) with L == C: the shapes allow it, the norm is over L."""
    check(linear_norm(5), noise(3, 5, 6), merges=0, refused="Unreadable", norm=1)


def test_norm_after_a_linear_planned_on_2d_and_run_on_3d():
    """What example inputs say of the rank holds for the merge: another rank must not be silently wrong."""
    model = randomised(linear_norm(5))
    deploy = says(structrep.plan(model, noise(3, 6)), 1).apply()
    x = noise(3, 5, 6)
    with contextlib.suppress(Exception):
        assert distance(call(deploy, x), call(model, x)) <= EXACT


def test_norm_after_flatten_and_linear_needs_no_example():
    model = Written(lambda m, x: m.n(m.l(torch.flatten(x, 1))), l=nn.Linear(24, 5), n=nn.BatchNorm1d(5))
    check(model, noise(2, 4, 2, 3), merges=1, norm=0, linear=1)


def test_norm_after_a_transposed_linear():
    """Linear on the last dim, then BatchNorm1d on dim 1 of the transpose: the channels are the Linear's again."""
    model = Written(lambda m, x: m.n(m.l(x).transpose(1, 2)), l=nn.Linear(6, 5), n=nn.BatchNorm1d(5))
    inputs = noise(3, 5, 6), noise(3, 7, 6)
    check(model, *inputs, merges=0, refused="Isolated", ways=("alone", "in place"))
    check(model, *inputs, merges=1, ways=("with an example",))  # which says that there is a batch


def test_concat_of_linears_on_the_wrong_dim():
    model = Written(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=nn.Linear(6, 5), b=nn.Linear(6, 5))
    check(model, noise(3, 6), merges=1, ways=("with an example",))
    check(model, noise(3, 2, 6), merges=0, refused="Unreadable", ways=("with an example",), linear=2)
    check(model, noise(3, 6), merges=0, refused="Unreadable", ways=("alone", "in place"))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.BatchNorm2d(4, eps=0.1, affine=False),
                                  nn.BatchNorm2d(4, momentum=None), repvgg.MyBN(4), repvgg.FrozenNorm(4)])  # fmt: skip
def test_norms_that_fold(norm):
    check(nn.Sequential(conv(), norm), X, TINY, merges=1, conv=1, norm=0, add=0)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LocalResponseNorm(2), nn.GroupNorm(4, 4),
                                  nn.InstanceNorm2d(4, affine=True, track_running_stats=False),
                                  nn.InstanceNorm2d(4, affine=True, track_running_stats=True)])  # fmt: skip
def test_norms_that_do_not_fold(norm):
    check(nn.Sequential(conv(), norm), X, merges=0)


def test_norm_without_running_stats_is_refused_with_the_reason():
    model = nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False))
    check(model, X, merges=0, refused="Unreadable")
    (refusal,) = structrep.plan(model).refusals
    assert "track_running_stats" in refusal.reason


def test_functional_batch_norm_in_training_mode_stays():
    """F.batch_norm(training=True) takes the batch's statistics; evaluated for real, it would also write buffers."""
    model = Written(lambda m, x: F.batch_norm(m.c(x), m.mean, m.var, training=True), c=conv())
    model.register_buffer("mean", torch.zeros(4))
    model.register_buffer("var", torch.ones(4))
    check(model, X, merges=0)


def test_norm_and_activation_in_one_module():
    timm = pytest.importorskip("timm")
    norm = timm.layers.BatchNormAct2d
    check(nn.Sequential(conv(), norm(4)), X, merges=1, conv=1)
    branches = Written(
        lambda m, x: m.n(m.c(x)) + m.p(m.d(x)), c=conv(), d=conv(k=1), n=norm(4), p=norm(4, apply_act=False)
    )
    check(branches, X, merges=2)
    check(nn.Sequential(conv(), timm.layers.FrozenBatchNormAct2d(4)), X, merges=1)


def test_torchvision_frozen_norm():
    ops = pytest.importorskip("torchvision.ops")
    check(nn.Sequential(conv(), ops.FrozenBatchNorm2d(4)), X, TINY, merges=1, norm=0, conv=1, add=0)


def test_norm_with_zero_variance_and_zero_scale():
    model = randomised(nn.Sequential(conv(), bn(4)))
    model[1].running_var.zero_()
    model[1].weight.data[:2] = 0
    deploy = says(structrep.plan(model), 1).reparameterize()
    assert equal(deploy, model, X)


# --- of tokens -----------------------------------------------------------------------------------------------


class RepBN(nn.Module):
    """A batch norm and a share of its input, on tokens: arXiv:2405.11582."""

    def __init__(self, channels):
        super().__init__()
        self.bn, self.alpha = nn.BatchNorm1d(channels), nn.Parameter(torch.tensor([0.7]))

    def forward(self, x):
        x = x.transpose(1, 2)
        x = self.bn(x) + self.alpha * x
        return x.transpose(1, 2)


@pytest.mark.parametrize(("make", "merges"), [
    (lambda: nn.Sequential(RepBN(8), nn.Linear(8, 8)), 1),
    (lambda: nn.Sequential(nn.Linear(8, 8), RepBN(8)), 1),
    (lambda: nn.Sequential(RepBN(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), RepBN(8), nn.Linear(8, 8)), 2),
])  # fmt: skip
def test_a_norm_of_tokens_goes_into_a_linear(make, merges):
    x = noise(2, 5, 8)
    deploy = check(make(), x, merges=merges, within=CLOSE)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in deploy.modules())
    with pytest.raises((RuntimeError, IndexError)):
        make()(x[0])


class Half(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.bn, self.linear, self.dims = nn.BatchNorm1d(8), nn.Linear(8, 8), dims

    def forward(self, x):
        return self.linear(self.bn(x.transpose(*self.dims)).relu().transpose(1, 2))


def test_a_norm_of_tokens_with_a_curve_behind_it_stays():
    deploy = check(Half((1, 2)), noise(2, 5, 8), merges=0, refused="Isolated", within=CLOSE)
    assert isinstance(deploy.bn, nn.BatchNorm1d)
