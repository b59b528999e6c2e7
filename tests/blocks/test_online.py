"""Branches merged before they are run are the branches run one by one: outputs, gradients, running statistics."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

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
