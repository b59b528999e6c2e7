"""What `verify` says of a deploy model: errors against noise, in every dtype, region by region; and of its numbers."""

import warnings

import pytest
import torch
from torch import nn

import structrep
from structrep import VerificationError
from structrep.blocks import RepVGGBlock2d
from structrep.errors import BadInput
from tests.foreign import repvgg
from tests.support.models import noise, randomised, settled, small
from tests.support.truth import says


class Net(nn.Module):
    """Three blocks, a computed kernel's like among them, and a head behind a nonlinearity each."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(RepVGGBlock2d(3, 8, 3, padding=1), nn.ReLU(), RepVGGBlock2d(8, 8, 3, padding=1))
        self.conv, self.norm = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.conv(self.blocks(x).relu())).relu()
        return {"logits": self.head(x.mean((2, 3))), "map": x}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return settled(Net()).float()


X = torch.randn(3, 3, 17, 16, generator=torch.Generator().manual_seed(0))
HOW = {
    "as it is": {},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "autocast": {"autocast": torch.bfloat16},
    "channels last": {"channels_last": True},
    "channels last, bfloat16": {"channels_last": True, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("how", HOW)
def test_every_output_and_region_is_within_the_original_s_own_noise(net, how, batch):
    plan = structrep.plan(net, X[:batch])
    found = plan.verify(X[:batch], **HOW[how])
    assert found.ok
    assert found.first_off is None
    assert [region.where for region in found.regions] == ["blocks.0", "blocks.2", "conv"]
    assert [len(region.rules) for region in found.regions] == [1, 1, 1]
    assert len(found.outputs) == 2
    dtype = HOW[how].get("dtype", HOW[how].get("autocast", torch.float32))
    coarsest = dtype if torch.finfo(dtype).eps > 2e-7 else torch.float32  # what the merged weights were cast to
    assert 0 < found.error < 100 * torch.finfo(coarsest).eps
    assert found.channels_last == ("channels last" in how)
    assert (found.device, found.seed, found.tf32, found.torch) == ("cpu", 0, False, torch.__version__)
    assert type(found).model_validate_json(found.model_dump_json()) == found


def test_merged_in_half_precision(net):
    for dtype in (torch.bfloat16, torch.float16):
        half = net.to(dtype)
        deploy = says(structrep.plan(half, X.to(dtype)), 3).reparameterize(X.to(dtype))
        assert {p.dtype for p in deploy.parameters()} == {dtype}


def test_the_first_region_that_is_off_is_named(net):
    plan = structrep.plan(net, X)
    deploy = plan.apply()
    deploy.blocks[2].bias.data += 0.01
    found = plan.verify(X, deploy)
    assert not found.ok
    assert found.first_off.where == "blocks.2"
    assert "OFF" in str(found)


def test_a_failing_verification_is_an_error_that_names_the_region(net, monkeypatch):
    honest = structrep.Plan.apply

    def wrongly(self, inplace=False):
        deploy = honest(self, inplace)
        deploy.conv.bias.data += 1
        return deploy

    monkeypatch.setattr(structrep.Plan, "apply", wrongly)
    with pytest.raises(VerificationError, match=r"first merged layer that is off is conv \(fold_norm\)"):
        structrep.reparameterize(net, X)
    assert isinstance(net.norm, nn.BatchNorm2d)


def test_plot(net):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    ax = structrep.plan(net, X).verify(X).plot()
    assert [len(line.get_xdata()) for line in ax.lines] == [3, 3, 3]
    assert ax.get_yscale() == "log"


def test_a_deep_model_region_by_region():
    torch.manual_seed(0)
    model = settled(small("repvgg_a0")).float()
    x = torch.randn(1, 3, 33, 33)
    found = structrep.plan(model, x).verify(x)
    assert found.ok
    assert len(found.regions) == 6
    assert all(map(found.holds, found.regions))


# --- the numbers of a merge ------------------------------------------------------------------------------------------


def test_dead_channels_are_told(net):
    net.norm.running_var[:2] = 1e-9
    plan = structrep.plan(net)
    (notes,) = [merge.notes for merge in plan.merges if merge.where == "conv"]
    assert notes == ("norm: 2 of its channels have a variance below eps, dead in training and scaled by eps alone",)
    assert "2 of its channels" in str(plan)


def test_the_largest_coefficient_before_and_after_is_told(net):
    net.norm.running_var[0] = 1e-9
    (merge,) = [merge for merge in structrep.plan(net).merges if merge.where == "conv"]
    before, after = merge.largest
    assert before == pytest.approx(net.conv.weight.detach().abs().max().item())
    assert after > 20 * before


def test_numbers_that_half_precision_loses_are_told_before_they_are_cast(net):
    net.norm.weight.data.mul_(1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        half, bfloat = (structrep.plan(net.to(dtype)) for dtype in (torch.float16, torch.bfloat16))
    (notes,) = [merge.notes for merge in half.merges if merge.where == "conv"]
    assert "merged numbers are below float16's normal range, 6.1e-05" in notes[0]
    assert not any(merge.notes for merge in bfloat.merges)


def test_numbers_that_half_precision_cannot_hold_are_refused(net):
    net = net.half()
    net.norm.weight.data.fill_(6e4)
    net.norm.running_var.fill_(1e-4)
    plan = says(structrep.plan(net), 2, "Overflow")
    assert "conv" not in [merge.where for merge in plan.merges]
    (refusal,) = [refusal for refusal in plan.refusals if refusal.kind == "Overflow"]
    assert "65504" in refusal.reason.replace(",", "") or "6.55e+04" in refusal.reason


# --- what it is asked of ------------------------------------------------------------------------------------


def test_verify_finds_a_wrong_model():
    model, x = randomised(repvgg.Official(4, 4)).float(), noise(2, 4, 5, 6).float()
    deploy = says(structrep.plan(model), 1).reparameterize()
    with torch.no_grad():
        next(deploy.parameters())[0, 0, 0, 0] += 1e-2
    assert not structrep.verify(model, deploy, x).ok


class Sizes(nn.Module):
    def forward(self, x):
        return x.shape[0]


def test_verify_says_so_where_there_is_nothing_to_compare():
    with pytest.raises(BadInput, match="no tensor that could be compared"):
        structrep.verify(Sizes(), Sizes(), torch.ones(1, 2))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) + torch.randn_like(x)


def test_verify_of_a_model_that_draws_random_numbers():
    model, x = settled(Noisy()).float(), torch.randn(1, 4, 3, 3)
    deploy = says(structrep.plan(model, x), 1).reparameterize(x)
    deploy.conv.weight.data *= 1.5
    assert not structrep.verify(model, deploy, x).ok


class Complex(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return torch.complex(x, self.factor * x)


def test_verify_of_complex_values():
    x = torch.randn(1, 4)
    assert structrep.verify(Complex(1.0), Complex(1.0), x).ok
    assert not structrep.verify(Complex(1.0), Complex(2.0), x).ok


def test_channels_last_in_three_dims():
    model, x = settled(nn.Sequential(nn.Conv3d(2, 3, 3), nn.BatchNorm3d(3))).float(), torch.randn(1, 2, 5, 5, 5)
    deploy = says(structrep.plan(model), 1).reparameterize()
    assert structrep.verify(model, deploy, x, channels_last=True).ok
