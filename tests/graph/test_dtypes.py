"""Models that are float32, or another dtype, by their own words: they convert, are compared with a float64 truth that
their casts do not touch, and a wrong deploy model is seen."""

import contextlib
import copy
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from torch._C import _len_torch_dispatch_stack
from typer.testing import CliRunner

import structrep
from structrep import VerificationError
from structrep.algebra.shadows import Shadows
from structrep.cli import app
from structrep.errors import BadInput
from structrep.prove.run import observe
from structrep.records.verification import Verification
from tests.needs.integrations.test_transformers import rt_detr
from tests.support.models import settled
from tests.support.truth import CLOSE, relative_error

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SOBEL = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]).expand(4, 1, 3, 3) / 3


class Random(nn.Module):
    def forward(self, x):
        return x * torch.rand(1)


class Normed(nn.Module):
    """A convolution and its norm, and what comes behind."""

    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head, self.linear = nn.Conv2d(4, 2, 1), nn.Linear(8, 5)
        self.kernel, self.random = SOBEL.clone(), Random()

    def features(self, x):
        return self.n(self.a(x))


def model(forward, base=Normed):
    torch.manual_seed(0)
    return settled(type("M", (base,), {"forward": forward})()).float().eval()


def autocast(self, x):
    y = self.features(x)
    with torch.autocast("cpu", torch.bfloat16):
        return self.head(y.relu()).float()


def insisting(self, x):
    assert x.dtype == torch.float32
    y = self.features(x)
    return y.relu() if y.dtype == torch.float32 else y


def fourier(self, x):
    grown = torch.fft.rfft2(self.features(x)) * torch.view_as_complex(torch.ones(8, 5, 2))
    return torch.fft.irfft2(grown, s=(8, 8))


def sampled(self, x):
    theta = torch.eye(2, 3).expand(x.shape[0], 2, 3)
    return F.grid_sample(self.features(x), F.affine_grid(theta, [2, 4, 8, 8], align_corners=False), align_corners=False)


def quantized(self, x):
    return self.head(torch.quantize_per_tensor(self.features(x), 0.05, 0, torch.qint8).dequantize())


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * torch.full((1,), 2.0)


@torch.library.custom_op("structrep_tests::only_float32", mutates_args=())
def only_float32(x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32:
        raise RuntimeError("float32 alone")
    return x * 3


@torch.library.custom_op("structrep_tests::only_float32_in_place", mutates_args=("x",))
def only_float32_in_place(x: torch.Tensor) -> None:
    if x.dtype != torch.float32:
        raise RuntimeError("float32 alone")
    x.mul_(3)


def written(self, x):
    y = self.features(x) + 0
    torch.ops.structrep_tests.only_float32_in_place(y)
    return y.relu()


def numbered(self, x):
    table = torch.tensor([1, 2, 3, 250], dtype=torch.uint8)
    return self.features(x) * (table.float() / 7)[torch.arange(4) % 3].view(1, 4, 1, 1)


def forces(self, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.features(x).tanh().sum(), x)[0]


def masked(self, x):
    y = self.features(x)
    return y.masked_fill(y > 0.5, torch.finfo(self.linear.weight.dtype).min).softmax(1)


class Fp32Norm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.to(torch.float32)).to(x.dtype)


def normed(self, x):
    return self.linear(self.norm(x))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = Fp32Norm(8), nn.Linear(8, 4)


def gemma(self, x):
    h = x.float()
    return self.linear(
        (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.norm.weight.float())).type_as(x)
    )


MERGED = {
    "float": lambda self, x: self.features(x.float() / 255),
    "to": lambda self, x: self.features(x.to(torch.float32)),
    "type": lambda self, x: self.features(x.type(torch.FloatTensor)),
    "type by name": lambda self, x: self.features(x.type("torch.FloatTensor")),
    "between": lambda self, x: self.n(self.a(x).float()),
    "between, to": lambda self, x: self.n(self.a(x).to(self.n.weight.dtype)),
    "plain kernel": lambda self, x: F.conv2d(self.features(x).relu(), self.kernel, groups=4),
    "plain kernel behind a cast": lambda self, x: F.conv2d(self.features(x.float()), self.kernel, groups=4),
    "buffer": lambda self, x: self.features(x) * self.a.bias.float().view(1, -1, 1, 1),
    "ones": lambda self, x: self.features(x) @ torch.ones(8, 5),
    "einsum": lambda self, x: torch.einsum("bchw,cd->bdhw", self.features(x).relu(), torch.ones(4, 5)),
    "grid_sample": sampled,
    "quantized": quantized,
    "fake-quantized": lambda s, x: s.head(torch.fake_quantize_per_tensor_affine(s.features(x), 0.05, 0, -128, 127)),
    "autocast": autocast,
    "its own check": insisting,
    "fourier": fourier,
    "functional": lambda self, x: F.linear(self.features(x).float(), self.linear.weight.float()),
    "autograd function": lambda self, x: Doubling.apply(self.features(x)),
    "operator": lambda self, x: torch.ops.structrep_tests.only_float32(self.features(x)),
    "operator in place": written,
    "table": numbered,
    "gradient": forces,
    "mask": masked,
    "half in the middle": lambda self, x: self.features(x).relu().half().float(),
    "random": lambda self, x: self.random(self.features(x)),
    "a number of its own": lambda self, x: self.features(x) / (1 + self.a.bias.abs().max().item()),
}


def planted(plan, x, by=1e-3):
    """The deploy model, off in one merged weight."""
    deploy = plan.apply()
    deploy.get_submodule(plan.merges[0].where).weight.data.mul_(1 + by)
    return plan.verify(x, deploy)


def demand(net, x, merges=1):
    """It converts, is equal, and a planted error is seen."""
    plan = structrep.plan(net, x)
    assert len(plan.merges) >= merges, plan.record.reasons
    deploy = structrep.reparameterize(net, x)
    assert not structrep.plan(deploy, x).merges
    found = plan.verify(x)
    assert found.ok
    assert found.truth == "float64", found.failed
    assert not planted(plan, x).ok
    return found


@pytest.mark.parametrize("name", MERGED)
def test_it_converts_and_a_wrong_deploy_model_is_seen(name):
    found = demand(model(MERGED[name]), X)
    assert found.error < 1e-5
    assert len(found.regions) <= 1


@pytest.mark.parametrize(
    ("forward", "dtype"), [(normed, torch.float32), (gemma, torch.float32), (gemma, torch.float64)]
)
def test_norms_in_float32(forward, dtype):
    net = model(forward, Normed).to(dtype)
    x = torch.randn(2, 3, 8, dtype=dtype)
    plan = structrep.plan(net, x)
    assert len(plan.merges) == 1
    plan.prove()
    assert len(plan.merges) == 1
    demand(net, x)


class Spectrum(nn.Module):
    """A kernel of a few numbers that are written in float32 to where they belong, as FourierFT's (arXiv:2405.03003)."""

    def __init__(self):
        super().__init__()
        self.base, self.few = nn.Linear(8, 8), nn.Parameter(torch.randn(5))
        self.register_buffer("where", torch.tensor([[0, 1, 2, 5, 7], [3, 3, 0, 6, 1]]))

    def forward(self, x):
        dense = torch.zeros(8, 8)
        dense[self.where[0], self.where[1]] = self.few.float()
        return self.base(x) + F.linear(x, torch.fft.ifft2(dense).real.to(self.few.dtype))


def test_a_kernel_that_float32_makes_of_a_model_in_float64():
    demand(settled(Spectrum()), torch.randn(4, 8, dtype=torch.float64))


@pytest.mark.parametrize("scaled", [lambda x: x / 255, lambda x: x * 0.5, lambda x: x - 0.5])
def test_a_scale_of_integers_stays(scaled):
    """It makes floats of them, which the layer behind it takes; the norm behind that is merged."""

    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(scaled(x)))

    model, x = settled(Images()).float(), torch.arange(96, dtype=torch.uint8).reshape(1, 3, 4, 8)
    plan = structrep.plan(model, x)
    assert [merge.before for merge in plan.merges] == ["(conv 1x1 -> norm)"]
    deploy = structrep.reparameterize(model, x)
    assert relative_error(deploy(x), model(x)) < 1e-6


def test_uint8():
    demand(model(MERGED["float"]), (X.abs() * 80).to(torch.uint8))


def test_a_float64_truth_is_what_the_model_computes_but_for_its_casts():
    net = model(MERGED["float"])
    twin = copy.deepcopy(net).double()
    with torch.no_grad():
        expected = twin.features(X.double() / 255)
        with Shadows() as shadows:
            found = net(X)
        assert torch.equal(found, net(X))
    assert torch.equal(shadows.of(found), expected)
    assert 0 < (found.double() - expected).abs().max() < 1e-5


def test_what_a_kernel_keeps_for_its_backward_is_no_choice():
    """On a GPU `cudnn_batch_norm` gives an empty tensor of bytes beside the output."""
    weights = [torch.rand(4) + 0.5 for _ in range(4)]
    with Shadows(recorded=True) as shadows:
        *_, kept = torch.ops.aten._batch_norm_no_update(torch.randn(2, 4, 3, 3), *weights, 0.1, 1e-5)
        assert kept.dtype is torch.uint8
        assert not shadows.chooses
        torch.randn(3).argmax()
        assert [one.name for one in shadows.choices] == ["argmax"]


def test_views_and_writes_are_those_of_the_model():
    def run(x, cast):
        y = cast(x)
        y[0].mul_(0.3)
        y.view(-1)[3:] += y.t().reshape(-1)[3:] / 7
        z = torch.empty_like(y)
        z.copy_(y)
        return torch.cat([x, z.transpose(0, 1).contiguous() / 3])

    x = torch.randn(4, 4)
    with Shadows() as shadows:
        one = x.clone()
        found = run(one, torch.Tensor.float)  # `one` itself
    assert torch.allclose(shadows.of(found), run(x.double(), lambda y: y), rtol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_part_in_float32_of_a_model_in_half_precision(dtype):
    def gate(self, x):
        y = self.features(x)
        return F.linear(y.float(), self.linear.weight.float(), self.linear.bias.float())

    net = model(gate).to(dtype)
    x = X.to(dtype)
    deploy = structrep.reparameterize(net, x)
    assert {p.dtype for p in deploy.parameters()} == {dtype, torch.float32}
    plan = structrep.plan(net, x)
    assert plan.verify(x).ok
    assert not planted(plan, x, 0.5).ok
    net = model(lambda self, x: self.linear(self.features(x).float())).to(dtype)
    net.linear.float()
    deploy = structrep.reparameterize(net, x)
    assert deploy(x).dtype == torch.float32
    assert deploy.a.weight.dtype == dtype


def test_a_buffer_in_float32_of_a_model_in_float64():
    net = model(lambda self, x: self.features(x) * self.scale)
    net.register_buffer("scale", torch.rand(4, 1, 1))
    net = net.double()
    net.scale = net.scale.float()
    assert demand(net, X.double()).error < CLOSE


class Child(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.kernel = nn.Conv2d(4, 4, 1), torch.rand(1)

    def forward(self, x):
        return self.conv(x.relu()) * self.kernel + torch.ones(1)


@pytest.mark.parametrize("made", [lambda child, x: torch.jit.trace(child, x), lambda child, x: torch.jit.script(child)])
def test_children_that_torchscript_runs(made):
    net = model(lambda self, x: self.child(self.features(x)))
    deploy = structrep.reparameterize(model(lambda self, x: self.features(x)), X)
    net.child = made(Child().eval(), torch.randn(2, 4, 8, 8))
    merged = model(lambda self, x: self.child(self.a(x)))
    merged.child, merged.a = net.child, deploy.a
    found = structrep.verify(net, merged, X)
    assert found.ok
    assert found.truth == "float64"
    merged.a.weight.data.mul_(1.001)
    assert not structrep.verify(net, merged, X).ok


def test_what_is_compiled_stays_compiled():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    child = torch.compile(nn.Conv2d(4, 2, 1), backend=backend)
    net = model(lambda self, x: self.features(x))
    found = structrep.verify(nn.Sequential(net, child), nn.Sequential(structrep.reparameterize(net), child), X)
    assert found.ok
    assert found.truth == "float64"
    before = len(compiled)
    child(torch.randn(5, 4, 7, 3))
    assert len(compiled) > before  # under a mode torch's compiler skips code, and goes on skipping it


# --- which truth, and which run failed --------------------------------------------------------------------------------


def test_an_operator_without_float64_is_named():
    found = demand(model(MERGED["operator"]), X)
    assert list(found.alone) == ["structrep_tests::only_float32"]
    assert "but for structrep_tests::only_float32, which has no float64 kernel" in " ".join(str(found).split())
    assert "no float64 kernel" in found._repr_html_()


class Unseen(nn.Module):
    """Runs under no dispatch mode."""

    def forward(self, x):
        if _len_torch_dispatch_stack():
            raise NotImplementedError("no rule for this mode")
        return x.relu()


def test_the_run_that_failed_is_named_and_the_truth_is_the_models_own():
    net = model(lambda self, x: self.random(self.features(x)))
    net.random = Unseen()
    plan = structrep.plan(net, X)
    found = plan.verify(X)
    assert found.ok
    assert found.truth == "float32"
    assert "does not run in float64: NotImplementedError: no rule for this mode" in found.failed
    assert "against a float32 run of the training-time model" in str(found)
    assert not planted(plan, X).ok
    structrep.reparameterize(net, X)


def test_outputs_that_torch_does_not_compute():
    net = model(lambda self, x: torch.from_numpy(self.features(x).detach().numpy() * 2))
    deploy = copy.deepcopy(net)
    assert structrep.verify(net, deploy, X).ok
    deploy.a.weight.data.mul_(1.001)
    assert not structrep.verify(net, deploy, X).ok


def test_a_model_that_rejects_the_inputs_itself_is_told_from_a_deploy_model_that_does():
    net = model(MERGED["to"])
    with pytest.raises(BadInput, match="does not accept inputs of shape"):
        structrep.reparameterize(net, X[:, :2])
    with pytest.raises(BadInput, match="cannot run in bfloat16"):
        structrep.verify(net, net, X, dtype=torch.bfloat16)
    deploy = structrep.reparameterize(net, X)
    deploy.a = nn.Conv2d(5, 4, 3)
    with pytest.raises(VerificationError, match="the deploy model cannot run on inputs that the training-time model"):
        structrep.verify(net, deploy, X)


def test_records_of_before_load():
    found = structrep.verify(model(MERGED["to"]), model(MERGED["to"]), X).model_dump()
    for new in ("truth", "failed", "alone", "lost", "choices"):
        del found[new]
    assert Verification.model_validate(found).truth == "float64"


def test_asking_what_vanishes_for_its_dtype():
    net = model(lambda self, x: self.features(x).to(self.n.weight.dtype))
    deploy = structrep.reparameterize(net, X)
    assert isinstance(deploy.n, nn.Identity)
    assert torch.allclose(deploy(X), net(X), atol=1e-5)


# --- models that choose -----------------------------------------------------------------------------------------------


class Chooser(nn.Module):
    """Gives the features of the best pixels; by scores that are equal but for rounding, many times over."""

    def __init__(self):
        super().__init__()
        self.features, self.fnorm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.score, self.snorm = nn.Conv2d(3, 1, 3, padding=1), nn.BatchNorm2d(1)

    def forward(self, x):
        scores = self.snorm(self.score(x)).flatten(2) * 0.0 + self.snorm(self.score(x)).flatten(2)
        scores = scores - scores.roll(1, 2) + scores.roll(1, 2)  # rounds anew
        best = scores.topk(5, 2).indices
        return self.fnorm(self.features(x)).flatten(2).gather(2, best.expand(-1, 8, -1))


def ties():
    """A model and an input of which two pixels score the same, and have other features."""
    torch.manual_seed(0)
    net = settled(Chooser()).float().eval()
    net.score.weight.data[:, 1:] = 0  # the score sees one channel, the features all
    x = torch.randn(1, 3, 12, 12)
    x[:, :1] = x[:, :1].flip(3).add(x[:, :1]) / 2  # mirrored: each score is there twice, but for the kernel's sides
    net.score.weight.data = (net.score.weight.data + net.score.weight.data.flip(3)) / 2
    return net, x


def test_a_model_that_chooses_is_compared_with_the_same_choices():
    net, x = ties()
    plan = structrep.plan(net, x)
    found = plan.verify(x)
    assert found.ok
    assert found.error < 1e-5
    if found.lost:
        assert "rounding changes what it chooses by topk" in found.lost
    off = plan.apply()
    off.features.weight.data.mul_(1.001)
    assert not plan.verify(x, off).ok
    off = plan.apply()  # what it chooses by alone is wrong
    off.score.weight.data[..., 0] *= 1.5
    assert not plan.verify(x, off).ok


def test_detection_with_random_weights():
    """Its queries are chosen by scores that are nearly equal."""
    torch.manual_seed(0)
    net = settled(rt_detr(decoder_layers=1)).float().eval()
    x = {"pixel_values": torch.randn(1, 3, 64, 64)}
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.Linear) and layer.out_features == 5:
                layer.weight.mul_(1e-6)  # scores that rounding tells apart
    deploy = structrep.reparameterize(net, x)
    found = structrep.verify(net, deploy, x)
    assert found.ok
    assert found.error < 1e-4


@pytest.mark.parametrize("kind", ["DeepseekV3", "Glm4Moe", "Gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_language_models(kind, dtype):
    common = dict(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=4, head_dim=8,
    )  # fmt: skip
    experts = dict(
        moe_intermediate_size=16, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
        first_k_dense_replace=1, num_hidden_layers=2,
    )  # fmt: skip
    heads = dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    more = {"DeepseekV3": experts | heads, "Glm4Moe": experts, "Gemma": {"num_hidden_layers": 1}}[kind]
    torch.manual_seed(0)
    net = getattr(hf, f"{kind}ForCausalLM")(getattr(hf, f"{kind}Config")(**common | more)).eval().to(dtype)
    for layer in net.modules():
        if "Norm" in type(layer).__name__:
            layer.weight.data.uniform_(0.5, 1.5)
    x = {"input_ids": torch.randint(0, 50, (1, 9))}
    plan = structrep.plan(net, x)
    listed = len(plan.merges)
    deploy = plan.reparameterize(x)
    assert listed == len(plan.merges) > 0
    found = structrep.verify(net, deploy, x)
    assert found.ok
    assert found.truth == "float64"
    grouped = kind != "Gemma" and hasattr(torch, "_grouped_mm")  # without it experts run one by one
    assert list(found.alone) == (["_grouped_mm"] if grouped else [])
    if dtype == torch.float32:
        assert not planted(plan, x).ok


# --- exported programs and the command --------------------------------------------------------------------------------


class Exported(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.c, self.n, self.how = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), how

    def forward(self, x):
        match self.how:
            case "to":
                return self.n(self.c(x.to(x.dtype)))
            case "float":
                return self.n(self.c(x.float()))
            case "cpu":
                return self.n(self.c(x.cpu()))
            case "to cpu":
                return self.n(self.c(x.to("cpu")))
        return self.n(self.c(x).float())


@pytest.mark.parametrize("how", ["to", "float", "cpu", "to cpu", "between"])
def test_exported_programs(how, tmp_path):
    x = torch.randn(2, 3, 9, 9)
    program = torch.export.export(settled(Exported(how)).float().eval(), (x,))
    demand(program.module(), x)
    torch.export.save(program, tmp_path / "e.pt2")
    done = CliRunner().invoke(
        app, ["convert", str(tmp_path / "e.pt2"), "--shape", "2x3x9x9", "--out", str(tmp_path / "e.onnx")]
    )
    assert done.exit_code == 0, done.output
    assert "1 merge, 0 refusals" in done.output
    assert "against a float64 run of the training-time model" in done.output


UINT8 = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.n(self.a(x.float() / 255))

def make():
    return Net().eval()
"""


def test_the_command(tmp_path, monkeypatch):
    (tmp_path / "its_own_dtype.py").write_text(UINT8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for command in (["convert", "--out", "d.safetensors", "--report", "d.html"], ["verify"]):
        name, *more = command
        done = CliRunner().invoke(app, [name, "its_own_dtype:make", "--shape", "1x3x16x16", *more])
        assert done.exit_code == 0, done.output
    assert "against a float64 run of the training-time model" in (tmp_path / "d.html").read_text()
    sys.modules.pop("its_own_dtype", None)


def test_measured_cost():
    net = model(MERGED["float"])
    plan = structrep.plan(net, X, cost="measured")
    assert plan.merges or {refusal.kind for refusal in plan.refusals} == {"Slower"}
    assert structrep.verify(net, plan.apply(), X).ok


def test_a_layer_that_insists_on_its_dtype_is_probed():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            if float(x.sum()) == 1e9:
                return x
            return self.conv(x.float()).half().float()

    layer = Hidden()
    found = structrep.probe(layer, X)
    assert torch.allclose(found.kernel, layer.conv.weight.detach().double(), rtol=1e-9)


def test_accepted_inputs_are_as_the_model_takes_them():
    net = model(MERGED["to"]).double()
    with contextlib.suppress(BadInput):
        observe(net, X)
    net = model(lambda self, x: self.features(x)).double()
    assert observe(net, X).inputs.dtype == torch.float64


# --- outputs that show little -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("choose", [lambda y: y.argmax(1), lambda y: y > 0, lambda y: (y * 10).long()])
def test_outputs_that_are_no_floats_are_compared_by_what_they_are_chosen_by(choose, dtype):
    net = model(lambda self, x: choose(self.features(x))).to(dtype)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    plan = structrep.plan(net, x)
    assert plan.verify(x).ok
    off = plan.apply()
    off.a.weight.data.neg_()
    for found in (plan.verify(x, off), structrep.verify(net, off, x)):
        assert not found.ok
        assert "cannot be run in float64" not in found.lost
    off.a.weight.data.fill_(float("nan"))
    assert not structrep.verify(net, off, x).ok


BLANK = {
    "NaN": lambda y: y * float("nan"),
    "infinite": lambda y: y.abs() * float("inf"),
    "infinite or NaN": lambda y: y / 0.0,
    "nothing": lambda y: y[:0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", BLANK)
def test_where_outputs_have_no_finite_number_merged_layers_decide(name, dtype):
    net = model(lambda self, x: BLANK[name](self.features(x).tanh())).to(dtype)
    x = X.to(dtype)
    plan = structrep.plan(net, x)
    found = plan.verify(x)
    assert found.ok
    assert "gives no finite number here" in str(found).replace("\n", " ")
    structrep.reparameterize(net, x)
    off = plan.apply()
    off.a.weight.data.mul_(1.5)
    found = plan.verify(x, off)
    assert found.first_off.where == "a"
    assert not found.ok


CASTS_BEHIND_NORMS = {
    "layer norm": lambda self, x: self.linear(self.last(x).float()),
    "to": lambda self, x: self.linear(self.last(x).to(torch.float32)),
    "functional layer norm": lambda self, x: self.linear(
        F.layer_norm(x, (8,), self.last.weight, self.last.bias).float()
    ),
    "batch norm": lambda self, x: self.c(self.n(x).float()),
}


@pytest.mark.parametrize("forward", CASTS_BEHIND_NORMS.values(), ids=CASTS_BEHIND_NORMS)
def test_a_cast_to_the_dtype_of_a_norm_is_merged_across(forward):
    for inputs in (False, True):

        class Normed(nn.Module):
            def __init__(self):
                super().__init__()
                self.last, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
                self.n, self.c = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)

        Normed.forward = forward
        net = settled(Normed()).float()
        nn.init.normal_(net.last.weight)
        x = torch.randn(2, 4, 8, 8)
        plan = structrep.plan(net, *([x] if inputs else []))
        assert len(plan.merges) == 1, plan.refusals
        assert relative_error(structrep.reparameterize(net, *([x] if inputs else []))(x), net(x)) < 1e-5
        assert not structrep.plan(net.double()).merges  # which a cast to float32 is not the dtype of


class Branched(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)


def _of_weight(self, x):
    return x.to(self.a.weight.device, self.a.weight.dtype, non_blocking=True)


# Casts of what two branches take, or give.
CASTS_BESIDE_BRANCHES = {
    "twice": lambda self, x: self.n(self.a(x.float()) + self.b(x.float())),
    "of one branch": lambda self, x: self.n(self.a(x.float()) + self.b(x)),
    "to a place": lambda self, x: self.n(self.a(x.to("cpu", non_blocking=True)) + self.b(x)),
    "a copy": lambda self, x: self.n(self.a(x.to("cpu", copy=True)) + self.b(x)),
    "cpu": lambda self, x: self.n(self.a(x.cpu()) + self.b(x)),
    "as a weight": lambda self, x: self.n(self.a(x.to(self.a.weight.device)) + self.b(x)),
    "as a weight, twice": lambda self, x: self.n(self.a(_of_weight(self, x)) + self.b(_of_weight(self, x))),
    "of the sum": lambda self, x: self.n((self.a(x) + self.b(x)).to(torch.float32)),
    "to what it was": lambda self, x: self.n((y := self.a(x), (y + self.b(x)).to(y.dtype))[1]),
}


@pytest.mark.parametrize("forward", CASTS_BESIDE_BRANCHES.values(), ids=CASTS_BESIDE_BRANCHES)
def test_casts_beside_branches(forward):
    for inputs in (False, True):
        net = model(forward, Branched)
        x = torch.randn(2, 4, 6, 6)
        plan = structrep.plan(net, *([x] if inputs else []))
        assert len(plan.merges) == 1, plan.refusals
        deploy = plan.reparameterize()
        assert relative_error(deploy(x), net(x)) < 1e-5
        assert [type(part) for part in deploy.modules()].count(nn.Conv2d) == 1
        if "twice" in [name for name, one in CASTS_BESIDE_BRANCHES.items() if one is forward]:
            assert relative_error(deploy((9 * x).byte()), net((9 * x).byte())) < 1e-5


@pytest.mark.parametrize(
    ("forward", "merges"),
    [
        (lambda self, x: self.n(self.a(x.double().float()) + self.b(x.half().float())), 2),  # of two inputs
        (lambda self, x: self.n((self.a(x).half() + self.b(x).half()).to(torch.float32)), 0),
        (lambda self, x: self.n((self.a(x) + self.b(x).half().float()).float()), 0),
        (lambda self, x: self.n((self.a(x) * torch.ones(1, dtype=torch.float64) + self.b(x)).float()), 1),
    ],
)
def test_casts_that_change_numbers(forward, merges):
    net = model(forward, Branched)
    x = torch.randn(2, 4, 6, 6)
    plan = structrep.plan(net, x)
    assert len(plan.merges) == merges
    assert relative_error(plan.apply()(x), net(x)) < 1e-5


def test_a_cast_to_what_another_value_has():
    """`y.float().to(y.dtype)` is of `y`'s dtype again."""

    def forward(self, x):
        y = self.a(x)
        z = y.float().to(y.dtype)
        return self.n(y + self.b(x)) + (z if z.dtype == torch.float64 else 3 * z)

    net, x = model(forward, Branched).double(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert relative_error(structrep.reparameterize(net, x)(x), net(x)) < 1e-6


class Energy(nn.Module):
    """Forces, which are a gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(torch.tanh(self.n(self.a(x))).sum(), x)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_takes_gradients(dtype):
    net, x = settled(Energy()).to(dtype), torch.randn(1, 4, 6, 6, dtype=dtype)
    deploy = structrep.reparameterize(net, x)
    assert isinstance(deploy.n, nn.Identity)
    assert relative_error(deploy(x), net(x)) < 1e-5
    assert structrep.verify(net, deploy, x).ok


def test_merged_weights_that_were_cast_are_as_near_as_their_dtype_lets_them():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            y = F.linear(x.float(), self.a.weight.float(), self.a.bias.float())
            return F.linear(y, self.b.weight.float())

    net, x = settled(Casts()), torch.randn(2, 4, 6, dtype=torch.float64)
    deploy = structrep.reparameterize(net, x)
    assert deploy.reparam_linear.weight.dtype == torch.float32
    assert relative_error(deploy(x), net(x)) < 1e-6
