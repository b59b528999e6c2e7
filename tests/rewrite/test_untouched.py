"""Lines of published forwards beside a merge: they keep nothing out, and go on doing what they did."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import EXACT, SAME, relative_error, says

TOKENS = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Linears(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)


class LeadingDims(Linears):
    def forward(self, x):
        y = self.a(x) + self.b(x)
        return y.reshape(*y.shape[:-1], 2, 4)


class UnpackedDims(Linears):
    def forward(self, x):
        y = self.a(x) + self.b(x)
        *lead, c = y.shape
        return y.reshape(*lead, 2, c // 2)


class CastToAWeights(Linears):
    """What a layer is given as it is has the dtype of its weight."""

    def forward(self, x):
        return self.a(x) + F.linear(x.to(self.b.weight.dtype), self.b.weight)


class CastBehind(Normed):
    def forward(self, x):
        return self.n(self.c(x).to(self.n.weight.dtype))


def cast(x, dtype):
    return x if x.dtype == dtype else x.to(dtype=dtype)


class WithAdapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x):
        y = self.base(x)
        return y + self.up(self.down(cast(x, self.down.weight.dtype))) * 0.5


class CastBelowAFlag(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = WithAdapter(), WithAdapter()

    def forward(self, x, output_hidden_states=False):
        seen = ()
        for layer in (self.one, self.two):
            if output_hidden_states:
                seen = (*seen, x)
            x = torch.relu(layer(x))
        return (x, seen) if output_hidden_states else x


class Magnitude(nn.Module):
    def __init__(self):
        super().__init__()
        self.m = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x, *, layer):
        weight = layer.weight
        return ((self.m / weight.norm(dim=1)).view(1, -1) - 1) * F.linear(x, weight)


class HandedLayer(WithAdapter):
    def __init__(self):
        super().__init__()
        self.magnitude = Magnitude()

    def forward(self, x):
        return super().forward(x) + self.magnitude(x, layer=self.base)


class AskedForRank(Linears):
    """What is added where an answer is that of the example stays behind the condition."""

    def forward(self, x):
        y = self.a(x) + self.b(x)
        if y.ndim == 3:
            y = y * 2
        if x.size(-1) % 2:
            y = y + 1
        return y


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.ModuleList(nn.Conv2d(3, 8, 1) for _ in range(2))
        self.c, self.n = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, features):
        y = 0
        for one, proj in zip(features, self.proj, strict=False):
            y = y + proj(one)
        return self.n(self.c(y))


class ListOfFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = Decoder()

    def forward(self, x):
        if x.sum() > 1e9:
            x = x + 1
        return self.head([x, x * 2])


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n = nn.Conv1d(5, 5, 3), nn.BatchNorm1d(5)

    def forward(self, x):
        return self.n(self.c(F.pad(x, (1, 1), mode="reflect")))


class TriedWithMore(nn.Module):
    """As speechbrain's x-vectors: a call that raises was no call."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Padded(), Padded()])

    def forward(self, x, lengths=None):
        for block in self.blocks:
            try:
                x = block(x, lengths=lengths)
            except TypeError:
                x = block(x)
        return x


class AsTensor(Normed):
    def forward(self, x):
        return self.n(self.c(x)) + torch.as_tensor(x).sum()


CASES = [
    (LeadingDims, TOKENS, 0, 1),
    (UnpackedDims, TOKENS, 0, 1),
    (CastToAWeights, TOKENS, 1, 1),
    (CastBehind, IMAGE, 1, 1),
    (CastBelowAFlag, TOKENS, 2, 2),
    (HandedLayer, TOKENS, 1, 1),
    (AskedForRank, TOKENS, 1, 1),
    (ListOfFeatures, IMAGE, 1, 1),
    (TriedWithMore, TOKENS, 2, 2),
    (AsTensor, IMAGE, 1, 1),
]


@pytest.mark.parametrize(("cls", "x", "guessed", "known"), CASES, ids=[cls.__name__ for cls, *_ in CASES])
def test_a_line_beside_a_merge(cls, x, guessed, known):
    for given in (False, True):
        torch.manual_seed(0)
        model, inputs = settled(cls()), (x,) if given else ()
        plan = structrep.plan(model, *inputs)
        assert len(plan.merges) == (known if given else guessed)
        deploy = plan.reparameterize(*inputs)
        for one in (x, -x, torch.cat([x, x])):
            assert relative_error(deploy(one), model(one)) < EXACT
        assert not structrep.plan(deploy, *inputs).merges


def test_of_a_condition_on_rank_both_ways_stay():
    torch.manual_seed(0)
    model = settled(AskedForRank())
    deploy = says(structrep.plan(model, TOKENS), 1, "ExampleOnly").reparameterize(TOKENS)
    assert relative_error(deploy(TOKENS[0]), model(TOKENS[0])) < EXACT


def test_a_flag_above_casts_stays():
    torch.manual_seed(0)
    model = settled(CastBelowAFlag())
    deploy = says(structrep.plan(model, TOKENS), 2).reparameterize(TOKENS)
    ours, theirs = deploy(TOKENS, output_hidden_states=True), model(TOKENS, output_hidden_states=True)
    for one, other in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True):
        assert relative_error(one, other) < EXACT


class NormOfEither(nn.Module):
    """As speechbrain's norms: for features that stand last, or behind the batch."""

    def __init__(self):
        super().__init__()
        self.n = nn.BatchNorm1d(8)

    def forward(self, x):
        if x.ndim == 3:
            x = x.transpose(-1, 1)
        x = self.n(x)
        return x.transpose(1, -1)


class NormOfRows(NormOfEither):
    def forward(self, x):
        if len(x.shape) != 2:
            return x
        return self.n(x)


class NormOfAnother(NormOfEither):
    """What is asked is no argument as it was given."""

    def forward(self, x):
        x = x.transpose(-1, 1)
        if x.dim() != 3:
            x = x.transpose(-1, 1)
        return self.n(x).transpose(1, -1)


class ThenNormed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.l, self.n = nn.Linear(8, 8), norm()

    def forward(self, x):
        return self.n(self.l(x))


@pytest.mark.parametrize(
    ("norm", "x", "other", "asked"),
    [
        (NormOfEither, TOKENS, TOKENS[0], "`x.ndim == 3` is True"),
        (NormOfRows, TOKENS[0], TOKENS, "`len(x.shape) != 2` is False"),
    ],
)
def test_a_condition_on_the_rank_of_an_argument_is_guarded_where_a_merge_needs_it(norm, x, other, asked):
    torch.manual_seed(0)
    model = settled(ThenNormed(norm))
    plan = structrep.plan(model, x)
    assert len(plan.merges) == 1
    deploy = plan.reparameterize(x)
    assert relative_error(deploy(x), model(x)) < EXACT
    with pytest.raises(ValueError, match="was reparameterized for inputs of which") as raised:
        deploy(other)
    assert asked in str(raised.value)
    assert not structrep.plan(model).merges  # without inputs nothing tells


def test_a_condition_on_the_rank_of_what_was_computed_keeps_a_merge_out():
    torch.manual_seed(0)
    model = settled(ThenNormed(NormOfAnother))
    plan = structrep.plan(model, TOKENS)
    assert not plan.merges
    assert any("`x.dim() != 3`" in refusal.reason for refusal in plan.refusals)


class Grows(nn.Sequential):
    """A container with an `append` of its own, as speechbrain's, beside code that fills a list."""

    def append(self, layer, name):
        self.add_module(name, layer)
        return self.forward(torch.zeros(1, 3, 9, 9, dtype=torch.float64)).shape


class FillsAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Grows(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

    def forward(self, x):
        found = []
        for _ in range(2 if str(x) != "never" else 3):  # which cannot be followed
            found.append(self.part(x))
        return torch.cat(found)


def test_a_list_that_is_filled_calls_no_method_of_that_name():
    model = settled(FillsAList())
    deploy = structrep.reparameterize(model, IMAGE)
    assert isinstance(deploy.part[1], nn.Identity)
    assert relative_error(deploy(IMAGE), model(IMAGE)) < EXACT


class Part(Normed):
    def forward(self, x):
        return self.n(self.c(x))


class Stage(nn.Module):
    """A norm that the next part could take as well, and that the layer before it takes in its own part."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = Part(), Part()
        self.body.c = nn.Conv2d(8, 8, 3, groups=2)
        self.whole = True

    def forward(self, x):
        x = self.stem(x)
        return self.body(x) if self.whole else x


def test_a_norm_goes_into_its_own_parts_layer_before_it_goes_into_anothers():
    torch.manual_seed(0)
    model, x = settled(Stage()), IMAGE
    plan = structrep.plan(model)
    assert [(merge.where, merge.edit) for merge in plan.merges] == [("stem.c", "swap"), ("body.c", "swap")]
    deploy = plan.apply()
    assert type(deploy) is Stage
    for one in (model, deploy):
        one.whole = False
    assert relative_error(deploy(x), model(x)) < SAME


class CallsForward(nn.Module):
    """As HRNet's: a part is run by its forward, beside a sum."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)) for _ in range(2)])

    def forward(self, x):
        y = None
        for i in range(3):
            y = x if y is None else x.relu() + self.down[i - 1].forward(y)
        return y


def test_a_part_that_is_run_by_its_forward_is_a_part():
    torch.manual_seed(0)
    model, x = settled(CallsForward()), IMAGE
    plan = structrep.plan(model)
    assert [(merge.where, merge.edit) for merge in plan.merges] == [("down.0.0", "swap"), ("down.1.0", "swap")]
    assert relative_error(plan.apply()(x), model(x)) < SAME


class Attends(nn.Module):
    """As timm's multiscale attention: the shape of what it is given is taken apart, and so is what its layer gives."""

    def __init__(self):
        super().__init__()
        self.qkv, self.more = nn.Linear(8, 8), None

    def forward(self, x):
        b, n, _ = x.shape
        y = self.qkv(x).reshape(b, n, 2, 4)
        if self.more is not None:
            y = self.more(y)
        return y.flatten(2)


class Expands(nn.Module):
    """As Hiera's: on a way by a setting, what a norm gives goes to another layer too."""

    def __init__(self, expands):
        super().__init__()
        self.norm, self.proj, self.attn, self.expands = nn.LayerNorm(8), nn.Linear(8, 8), Attends(), expands

    def forward(self, x):
        normed = self.norm(x)
        if self.expands:
            x = self.proj(normed)
        return x + self.attn(normed)


def test_a_way_by_a_setting_that_takes_a_norm_too_is_guarded_in_the_text():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    both, one = settled(Expands(True)), settled(Expands(False))
    assert [merge.edit for merge in structrep.plan(both, x).merges] == ["swap", "swap"]
    plan = structrep.plan(one, x)
    assert [(merge.where, merge.edit) for merge in plan.merges] == [("attn.qkv", "edit")]
    deploy = plan.apply()
    assert relative_error(deploy(x), one(x)) < SAME
    deploy.expands = True
    with pytest.raises(ValueError, match=r"self\.expands"):
        deploy(x)


class Residual(nn.Module):
    """As LeViT's and EfficientViT's: in training some of a batch is left out."""

    def __init__(self):
        super().__init__()
        self.m, self.drop = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)), 0.0

    def forward(self, x):
        if self.training and self.drop > 0:
            return x + self.m(x) * torch.rand(x.size(0), 1, 1, 1)
        return x + self.m(x)


class PerhapsNormed(nn.Module):
    """As RepVGG blocks in many repositories: where there is no norm, another sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        if self.n is None:
            return self.a(x) + self.b(x)
        return self.a(x) + self.b(x) + self.n(x)


@pytest.mark.parametrize("cls", [Residual, PerhapsNormed])
def test_what_runs_in_training_alone_or_without_a_part_keeps_no_branches(cls):
    torch.manual_seed(0)
    model = settled(cls())
    plan = structrep.plan(model)
    assert [merge.edit for merge in plan.merges] == ["edit"]
    deploy = plan.apply()
    assert sum(isinstance(part, nn.Conv2d) for part in deploy.modules()) == 1
    assert relative_error(deploy(IMAGE), model(IMAGE)) < SAME


class OwnEye(nn.Conv2d):
    """As DBB's identity of a 1x1: a plain tensor is added to the kernel."""

    def __init__(self):
        super().__init__(3, 3, 1, bias=False)
        self.eye = torch.eye(3)[:, :, None, None]

    def forward(self, x):
        return F.conv2d(x, self.weight + self.eye.to(self.weight.device).type_as(self.weight))


class HasAnEye(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), OwnEye()

    def forward(self, x):
        return self.a(x) + self.b(x)


def test_a_part_with_a_plain_tensor_vanishes_with_it():
    for inputs in ((), (IMAGE,)):
        torch.manual_seed(0)
        model = settled(HasAnEye())
        plan = structrep.plan(model, *inputs)
        assert len(plan.merges) == 1
        deploy = plan.reparameterize(*inputs)
        assert deploy.b is None
        assert relative_error(deploy(IMAGE), model(IMAGE)) < SAME


OF_THE_FILE = torch.rand(1, 8)


class AddsAFilesTensor(Linears):
    def forward(self, x):
        return self.b(self.a(x) + OF_THE_FILE.to(x.device))


def test_a_tensor_of_a_file_that_is_moved_merges_with_nothing():
    for inputs in ((), (TOKENS,)):
        model = settled(AddsAFilesTensor())
        plan = structrep.plan(model, *inputs)
        assert not plan.merges
        assert relative_error(plan.apply()(TOKENS), model(TOKENS)) < SAME


class MovesItself(nn.Sequential):
    def to(self, device):
        return super().to(device)


def test_a_model_whose_to_takes_a_device_alone():
    model = settled(MovesItself(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    assert isinstance(structrep.reparameterize(model, IMAGE)[1], nn.Identity)


class Adaptive(nn.Conv2d):
    """A convolution that pads by what its input's size asks for, as OpenMMLab's and TensorFlow's do."""

    def forward(self, x):
        h, w = x.size()[-2:]
        kernel, _ = self.weight.size()[-2:]
        pads = [max((-(-one // self.stride[0]) - 1) * self.stride[0] + kernel - one, 0) for one in (w, h)]
        if pads[0] > 0 or pads[1] > 0:
            x = F.pad(x, [pads[0] // 2, pads[0] - pads[0] // 2, pads[1] // 2, pads[1] - pads[1] // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class WithoutBias(Adaptive):
    def forward(self, x):
        return F.conv2d(F.pad(x, [max(x.shape[3] % 2, 1)] * 4), self.weight, None, self.stride)


class AsksForItsBias(Adaptive):
    def forward(self, x):
        y = F.conv2d(F.pad(x, [max(x.shape[3] % 2, 1)] * 4), self.weight, self.bias, self.stride)
        return y if self.bias is None else y * 2


class OnTwoWays(Adaptive):
    def forward(self, x):
        if x.shape[3] % 2:
            return F.conv2d(F.pad(x, [1] * 4), self.weight, self.bias, self.stride)
        return F.conv2d(x, self.weight, self.bias, self.stride)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("make", [Adaptive, WithoutBias, AsksForItsBias, OnTwoWays])
def test_a_convolution_that_pads_by_itself_keeps_its_forward(make, bias):
    torch.manual_seed(0)
    model = settled(nn.Sequential(make(3, 8, 3, stride=2, bias=bias), nn.BatchNorm2d(8)))
    plan = structrep.plan(model, IMAGE)
    assert len(plan.merges) == {Adaptive: 1, WithoutBias: bias, AsksForItsBias: 0, OnTwoWays: 0}[make], plan
    deploy = plan.apply()
    if make is Adaptive:
        assert type(deploy[0]) is Adaptive
        assert deploy[0].weight.shape == model[0].weight.shape
    for size in (9, 8, 7, 12):
        x = IMAGE.repeat(1, 1, 2, 2)[..., :size, :size]
        assert relative_error(deploy(x), model(x)) < EXACT
