"""A norm that stays says which layer stands beside it and why that does not take it, and that there is none only where
there is none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import says

X = torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NONE = "there is no convolution or Linear beside it"


def forward(text):
    """A model whose forward is an expression of x, with layers a, b, h, t, l and a norm n."""
    scope = {"F": F, "torch": torch}
    exec(f"def forward(s, x):\n    {text}", scope)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.h = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)
            self.t, self.l, self.u = nn.ConvTranspose2d(4, 8, 1), nn.Linear(8, 3), Unfollowed(4, 8, 1)
            self.n = nn.BatchNorm2d(8)
            self.h.register_forward_hook(lambda *_: None)

        forward = scope["forward"]

    return settled(Model())


class Unfollowed(nn.Conv2d):
    def forward(self, x):
        return super().forward(x if str(x) != "never" else -x)


REASONS = {
    "s.n(s.t(x, output_size=(4, 4)))": "t, before it, is called with output_size=",
    "s.n(s.u(x))": "u, before it, is not followed",
    "s.n(F.conv2d(x, x.mean() * torch.ones(8, 4, 1, 1)))": "conv2d, before it, has a kernel that depends on the input",
    "s.n(s.a(x).relu())": NONE,
    "s.b(s.n(x.repeat(1, 2, 1, 1).relu()).relu())": NONE,
    "s.n(torch.cat([s.h(x), s.h(x)], 1))": NONE,
    "s.n(F.channel_shuffle(s.a(x), 2).transpose(1, 2).reshape(2, 8, 4, 4))": (
        "a is before it, but reshape and transpose and channel_shuffle stand between"
    ),
    "s.n(s.a(x).reshape(2, 4, 4, 8).permute(0, 3, 1, 2))": "a is before it, but permute and reshape stand between",
    "s.l(F.adaptive_avg_pool2d(s.n(torch.cat([x, x], 1).relu()), 4).reshape(2, 16, 8))": (
        "l is behind it, but adaptive_avg_pool2d and reshape stand between"
    ),
    "s.l(s.n(torch.cat([x, x], 1).relu()).mean(1).reshape(2, 2, 8))": (
        "l is behind it, but mean and reshape stand between"
    ),
    "s.n(s.a(x).mT.reshape(2, 4, 4, 8).transpose(1, 3))": (
        "a is before it, but transpose and reshape and mT stand between"
    ),
    "s.n(torch.einsum('bchw->bwhc', s.a(x)).reshape(2, 8, 4, 4))": (
        "a is before it, but reshape and einsum stand between"
    ),
    "s.n(torch.einsum('bchw->bc', s.a(x))[..., None, None])": NONE,
    "s.n(s.a(x).half())": "a is before it, but half stands between",
    "s.b(s.n(torch.cat([x, x], 1).relu()).float())": "b is behind it, but float stands between",
}


@pytest.mark.parametrize("text", REASONS)
def test_what_stands_beside_it(text):
    plan = structrep.plan(forward(f"return {text}"))
    assert not plan.merges
    (refusal,) = (one for one in plan.refusals if one.kind == "Isolated")
    assert refusal.where == "n"
    assert refusal.reason.endswith(f": {REASONS[text]}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "y = s.a(x); return s.n(y).relu() + y",
            "it scales what a gives, which add reads too, for relu: a, before it, gives its values to more than the "
            "norm",
        ),
        (
            "y = s.n(torch.cat([x, x], 1).relu()); return s.b(y) + y.relu()",
            "it scales what relu gives for b and relu: b, behind it, is not all that reads the norm",
        ),
    ],
)
def test_what_else_reads(text, reason):
    (refusal,) = (one for one in structrep.plan(forward(text)).refusals if one.kind == "Isolated")
    assert refusal.reason == reason


@pytest.mark.parametrize(
    ("between", "name"),
    [
        (nn.Fold((4, 4), 1), "Fold"),
        (nn.Sequential(nn.Flatten(1), nn.Unflatten(1, (16, 8))), "Unflatten) and 1.0 (Flatten"),
        (
            nn.Sequential(nn.ChannelShuffle(2), nn.Flatten(1), nn.Unflatten(1, (16, 8))),
            "Unflatten) and 1.1 (Flatten) and 1.0 (ChannelShuffle",
        ),
    ],
)
def test_layers_between(between, name):
    model = settled(nn.Sequential(nn.Conv2d(4, 8, 1), between, nn.BatchNorm2d(8)))
    (refusal,) = structrep.plan(model).refusals
    assert refusal.kind == "Isolated"
    assert refusal.reason.split(": ")[1].startswith("0 is before it, but 1")
    assert f"({name}) stand" in refusal.reason


@pytest.mark.parametrize("family", ["repvgg", "doconv"])
def test_norms_that_are_kept_are_no_refusals(family):
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
    )
    plan = structrep.plan(settled(structrep.expand(model, family, where="3")), norms="keep")
    assert [merge.where for merge in plan.merges] == ["3"]
    assert plan.refusals == ()


def test_a_norm_of_each_batch_behind_a_merge():
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8, track_running_stats=False))
    plan = structrep.plan(settled(model))
    assert ([merge.where for merge in plan.merges], [r.kind for r in plan.refusals]) == (["0"], ["Unreadable"])


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.conv = nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = x.sigmoid()
        return y + self.conv(self.drop(self.norm(y)).relu())


def test_a_norm_that_stays_says_what_it_stands_between():
    (refusal,) = says(structrep.plan(settled(PreActivation())), 0, "Isolated").refusals
    assert refusal.layers == ("norm",)
    assert "it scales what sigmoid gives, which add reads too, for relu" in refusal.reason
