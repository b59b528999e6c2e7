"""Branches merged before they are run are the branches run one by one: outputs, gradients, running statistics."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import structrep
from structrep.blocks import (
    Branches,
    MobileOneBlock1d,
    MobileOneBlock2d,
    MobileOneBlock3d,
    QARepVGGBlock2d,
    RepMixer2d,
    RepVGGBlock2d,
)
from structrep.blocks import online as online_module

NORMS = nn.modules.batchnorm._BatchNorm


@pytest.fixture
def composed(monkeypatch):
    """How often branches were merged first."""
    calls = []
    convolved = online_module.Composition.convolved
    monkeypatch.setattr(
        online_module.Composition, "convolved", lambda self, *args: calls.append(self) or convolved(self, *args)
    )
    return calls


def started(block: nn.Module, seed: int = 0) -> nn.Module:
    """In float64, in training mode, with parameters and statistics of no special value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in block.double().state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator, dtype=value.dtype) + 0.2)
                value *= (
                    torch.where(torch.rand(value.shape, generator=generator) < 0.5, -1, 1) if value.dim() > 1 else 1
                )
    return block.train()


def both(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The block with its branches merged first, and with its branches run."""
    first, run = block, copy.deepcopy(block)
    for module in first.modules():
        if hasattr(module, "online"):
            module.online = True
    for module in run.modules():
        if hasattr(module, "online"):
            module.online = False
    return first, run


def pixels(*shape: int, mean: float = 0.0, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) + mean).requires_grad_()


def step(block: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, the gradients, added to those of the step before, and the buffers."""
    x = x.detach().clone().requires_grad_()
    y = block(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).sin().view(y.shape)
    (y * weights).sum().backward()
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in block.named_parameters()}
    return {"output": y.detach(), "gradient of x": x.grad, **gradients, **dict(block.named_buffers())}


def assert_same(block: nn.Module, x: torch.Tensor, tolerance: float = 1e-12) -> None:
    first, run = both(block)
    for _ in range(2):  # the statistics and the gradients of the second batch add to those of the first
        found, expected = step(first, x), step(run, x)
        assert found.keys() == expected.keys()
        largest = max(float(value.abs().max()) for name, value in expected.items() if name.startswith("gradient"))
        for name, value in expected.items():
            size = largest if name.startswith("gradient") else float(value.double().abs().max())
            assert found[name].dtype == value.dtype
            difference = float((found[name] - value).abs().max())
            assert difference <= tolerance * max(size, 1), (name, difference, size)


DEPTHWISE = {"in_channels": 3, "out_channels": 3, "groups": 3}


@st.composite
def readings(draw):
    """Arguments of pointwise and depthwise blocks, whose branches can be merged first, and the size of an input."""
    dims = draw(st.sampled_from([1, 2, 2, 2, 3]))
    each = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * dims))  # noqa: E731
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    pointwise = dims == 3 or draw(st.booleans())
    groups = draw(st.integers(1, 3)) if pointwise else draw(st.integers(2, 4))
    ins, outs = (draw(st.integers(1, 3)) if pointwise else 1), draw(st.integers(1, 2))
    kernel = (1,) * dims if pointwise else each(1, 5)
    stride = each(1, 2) if pointwise else (1,) * dims
    padding = each(0, 1) if pointwise else tuple(draw(st.integers(0, k)) for k in kernel)
    size = tuple(max(k - 2 * p, p + 1, 1) + draw(st.integers(0, 4)) for k, p in zip(kernel, padding, strict=True))
    arguments = {
        "in_channels": groups * ins, "out_channels": groups * outs, "kernel_size": kernel, "stride": stride,
        "padding": padding, "groups": groups, "padding_mode": mode,
    }  # fmt: skip
    return dims, arguments, (draw(st.integers(2, 4)), groups * ins, *size), draw(st.sampled_from([0.0, 3.0, -100.0]))


@given(readings())
@settings(max_examples=150, deadline=None)
def test_merged_first_is_the_branches_run(drawn):
    dims, arguments, shape, mean = drawn
    kind = {1: MobileOneBlock1d, 2: MobileOneBlock2d, 3: MobileOneBlock3d}[dims]
    assert_same(started(kind(**arguments, branches=2)), pixels(*shape, mean=mean), 1e-11 if mean else 1e-12)


@pytest.mark.parametrize(
    "block",
    [
        lambda: MobileOneBlock2d(**DEPTHWISE, kernel_size=3, padding=1),
        lambda: MobileOneBlock2d(**DEPTHWISE, kernel_size=7, padding=3, branches=1),
        lambda: MobileOneBlock2d(**DEPTHWISE, kernel_size=4, padding="same"),
        lambda: MobileOneBlock2d(3, 3, 1),
        lambda: MobileOneBlock2d(3, 6, 1, stride=2),
        lambda: RepVGGBlock2d(**DEPTHWISE, kernel_size=3, padding=1),
        lambda: RepVGGBlock2d(**DEPTHWISE, kernel_size=3, padding=0),
        lambda: RepVGGBlock2d(**DEPTHWISE, kernel_size=3, padding=2),
        lambda: RepMixer2d(**DEPTHWISE, kernel_size=3, padding=1),
        lambda: RepMixer2d(**DEPTHWISE, kernel_size=5, padding=2, layer_scale=None),
        lambda: QARepVGGBlock2d(**DEPTHWISE, kernel_size=3, padding=1),
        lambda: QARepVGGBlock2d(**DEPTHWISE, kernel_size=3, padding=1, pool=True),
        lambda: QARepVGGBlock2d(**DEPTHWISE | {"out_channels": 6}, kernel_size=3, padding=1),
        lambda: Branches(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.BatchNorm2d(3)), nn.BatchNorm2d(3)),
        lambda: Branches(
            nn.Sequential(nn.Conv2d(3, 3, (3, 1), padding=(1, 0), groups=3, bias=False), nn.BatchNorm2d(3)),
            nn.Sequential(nn.Conv2d(3, 3, 5, padding="same", groups=3, bias=False), nn.BatchNorm2d(3)),
        ),
    ],
)
@pytest.mark.parametrize("size", [(5, 7), (9, 6)])
def test_families(block, size, composed):
    assert_same(started(block()), pixels(3, 3, *size))
    assert len(composed) == 2


def run_first(block: nn.Module, *shape: int) -> bool:
    """Whether branches are merged before they are run, for an input of this shape, where that is left to the block."""
    block.train().online = None
    counted = []
    convolved = online_module.Composition.convolved
    try:
        online_module.Composition.convolved = lambda self, *args: counted.append(self) or convolved(self, *args)
        block(torch.randn(*shape))
    finally:
        online_module.Composition.convolved = convolved
    return bool(counted)


@pytest.mark.parametrize(
    ("block", "shape", "first"),
    [
        (lambda: MobileOneBlock2d(8, 8, 1, branches=2), (2, 8, 4, 4), True),  # few channels
        (lambda: MobileOneBlock2d(128, 128, 1), (2, 128, 10, 10), True),  # 200 pixels: 5 + 8 * 128 / 200 < 12
        (lambda: MobileOneBlock2d(128, 128, 1), (1, 128, 10, 10), False),  # 100 pixels: 5 + 8 * 128 / 100 > 12
        (lambda: MobileOneBlock2d(128, 128, 1, branches=1), (4, 128, 32, 32), False),  # one branch
        (lambda: MobileOneBlock2d(8, 8, 3, padding=1, groups=8), (2, 8, 5, 5), True),
        (lambda: MobileOneBlock2d(8, 8, 3, stride=2, padding=1, groups=8), (2, 8, 20, 20), False),
        (lambda: MobileOneBlock2d(8, 8, 3, padding=1), (2, 8, 20, 20), False),  # dense
        (lambda: RepVGGBlock2d(8, 8, 3, padding=1, groups=8), (2, 8, 20, 20), True),
        (lambda: RepVGGBlock2d(8, 8, 3, padding=1, groups=8), (2, 8, 14, 14), False),  # one kernel, few pixels
        (lambda: RepVGGBlock2d(8, 8, 3, padding=1), (2, 8, 20, 20), False),  # dense
    ],
)
def test_what_is_merged_first_by_count(block, shape, first):
    assert run_first(block(), *shape) is first


def dilated() -> nn.Module:
    return MobileOneBlock2d(2, 2, 3, padding=2, dilation=2, groups=2)


def strided() -> nn.Module:
    return MobileOneBlock2d(2, 2, 3, stride=2, padding=1, groups=2)


def dense() -> nn.Module:
    return MobileOneBlock2d(2, 2, 3, padding=1)


def volume() -> nn.Module:
    return MobileOneBlock3d(2, 2, 3, padding=1, groups=2)


def hooked() -> nn.Module:
    block = MobileOneBlock2d(2, 2, 1)
    block.skip.register_forward_hook(lambda module, args, output: 2 * output)
    return block


def computed() -> nn.Module:
    block = MobileOneBlock2d(2, 2, 1)
    nn.utils.parametrizations.weight_norm(block.dense[1].conv)
    return block


def other() -> nn.Module:
    return Branches(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU()), nn.BatchNorm2d(2))


@pytest.mark.parametrize("block", [dilated, strided, dense, volume, hooked, computed, other])
def test_what_cannot_be_merged_first_is_run(block, composed):
    made = started(block())
    assert_same(made, pixels(2, 2, *[5] * (3 if block is volume else 2)))
    assert not composed


def test_a_block_in_eval_mode_runs_its_branches(composed):
    block, _ = both(started(MobileOneBlock2d(2, 2, 1)))
    block.eval()(pixels(2, 2, 3, 3))
    assert not composed


def test_one_number_a_channel_has_no_variance():
    block, run = both(started(MobileOneBlock2d(2, 2, 1)))
    for each in (block, run):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            each(pixels(1, 2, 1, 1))


@pytest.mark.parametrize("which", ["all", "some"])
def test_frozen_norms_have_their_running_statistics(which, composed):
    block = started(MobileOneBlock2d(**DEPTHWISE, kernel_size=3, padding=1))
    norms = [module for module in block.modules() if isinstance(module, NORMS)]
    for norm in norms if which == "all" else norms[::2]:
        norm.eval()
    assert_same(block, pixels(2, 3, 6, 5))
    assert composed


@pytest.mark.parametrize("norm", [{"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"eps": 0.5}])
def test_settings_of_norms(norm, composed):
    conv = nn.Conv2d(3, 3, 3, padding=1, groups=3)
    assert_same(
        started(Branches(nn.Sequential(conv, nn.BatchNorm2d(3, **norm)), nn.BatchNorm2d(3, **norm))),
        pixels(2, 3, 6, 5),
    )
    assert composed


def test_constant_channels(composed):
    x = pixels(2, 3, 6, 5).detach()
    x[:, 1] = 7.0
    for block in (MobileOneBlock2d(**DEPTHWISE, kernel_size=3, padding=1), MobileOneBlock2d(3, 3, 1)):
        assert_same(started(block), x, 1e-11)
    assert composed


@pytest.mark.parametrize("mean", [0.0, 3.0, 100.0, 1000.0])
@pytest.mark.parametrize("kernel", [1, 3])
def test_large_means_cost_no_more_digits_than_in_branches(kernel, mean):
    """float32 against float64: the error of either form."""
    groups = 8 if kernel > 1 else 1
    block, run = both(started(MobileOneBlock2d(8, 8, kernel, padding=kernel // 2, groups=groups)))
    x = pixels(4, 8, 20, 20, mean=mean).detach().float()
    truth = step(copy.deepcopy(run), x.double())
    found, expected = step(block.float(), x), step(run.float(), x)

    def error(values: dict[str, torch.Tensor], name: str) -> float:
        return float((values[name] - truth[name]).norm() / truth[name].norm())

    for name in ("output", "gradient of x"):
        assert error(found, name) <= 4 * error(expected, name) + 1e-6, name


def test_gradients_of_gradients():
    found, expected = (
        twice(block, pixels(2, 2, 3, 4))
        for block in both(started(MobileOneBlock2d(2, 2, 3, padding=1, groups=2, branches=2)))
    )
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


def twice(block: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    gradient, *_ = torch.autograd.grad(block(x).sin().sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), [x, *block.parameters()])


def test_gradcheck():
    for block in (MobileOneBlock2d(2, 2, 3, padding=1, groups=2), MobileOneBlock2d(2, 2, 1)):
        first, _ = both(started(block))
        assert torch.autograd.gradcheck(first, pixels(2, 2, 3, 3))


class Net(nn.Module):
    """A depthwise and a pointwise block."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = MobileOneBlock2d(4, 4, 3, padding=1, groups=4, branches=2)
        self.pointwise = MobileOneBlock2d(4, 6, 1, branches=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pointwise(torch.relu(self.depthwise(x)))


def test_checkpointed_activations(composed):
    class Checkpointed(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    assert_same(started(Checkpointed()), pixels(2, 4, 5, 6))
    assert composed


def test_autocast_keeps_statistics_in_float32():
    block, run = both(started(Net()).float())
    truth = copy.deepcopy(run).double()
    x = pixels(4, 4, 12, 12).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = block(x.float()), run(x.float())
        found.float().sum().backward()
    exact = truth(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert (found - exact).norm() <= 1.5 * (expected - exact).norm()
    variance = block.depthwise.dense[0].norm.running_var
    torch.testing.assert_close(variance.double(), truth.depthwise.dense[0].norm.running_var, rtol=1e-6, atol=1e-6)


def test_compiled_without_a_break():
    block, run = both(started(Net()))
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for size in (5, 6, 7):
        x = pixels(2, 4, size, size + 1)
        torch.testing.assert_close(compiled(x), run(x), rtol=1e-12, atol=1e-12)


def test_one_state_dict_for_both_and_one_merge():
    block, run = both(started(Net()))
    x = pixels(2, 4, 6, 5)
    step(block, x), step(run, x)
    assert block.state_dict().keys() == run.state_dict().keys()
    assert [name for name, _ in block.named_buffers()] == [name for name, _ in run.named_buffers()]
    expected = block.eval()(x)
    deploy = structrep.reparameterize(block, x)
    assert sum(isinstance(module, NORMS) for module in deploy.modules()) == 0
    torch.testing.assert_close(deploy(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("online", [None, True, False])
def test_expanded_models_have_the_choice(online):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    expanded = structrep.expand(model, "mobileone", online=online)
    assert expanded[1].online is online
    assert structrep.expand(model, "mobileone")[1].online is None
