"""Each block equals, in float64, one plain conv of a kernel put together here anew by the paper's formula."""

import copy
import doctest
import inspect
import itertools
import pickle
import warnings

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import structrep
from structrep import blocks
from structrep.blocks import (
    ACBlock2d,
    DiracConv2d,
    DOConv2d,
    DOConv3d,
    ExpandConv1d,
    ExpandConv2d,
    ExpandConv3d,
    ExpandLinear,
    RepVGGBlock1d,
    RepVGGBlock2d,
    RepVGGBlock3d,
)

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
REPVGG = {1: RepVGGBlock1d, 2: RepVGGBlock2d, 3: RepVGGBlock3d}
DIRAC = {1: blocks.DiracConv1d, 2: DiracConv2d, 3: blocks.DiracConv3d}
DO = {1: blocks.DOConv1d, 2: DOConv2d, 3: DOConv3d}
EXPAND = {1: ExpandConv1d, 2: ExpandConv2d, 3: ExpandConv3d}
ALL_2D = [RepVGGBlock2d, ACBlock2d, DiracConv2d, DOConv2d, ExpandConv2d]
OTHERS = ("ExpandLinear", "LoRALinear", "RepAdapterLinear", "Branches", "LearnableAffine", "RepMLP2d")
CONV_BLOCKS = [getattr(blocks, name) for name in blocks.__all__ if name not in OTHERS]
# arguments for the blocks that do not take any
WANTS = {
    blocks.EdgeBlock2d: (2, 4, 3, 1, 1),
    blocks.LargeKernelBlock2d: (2, 4, 5, 1, 2),
    blocks.RepMixer2d: (2, 2, 3, 1, 1),
    blocks.ResidualRepBlock2d: (2, 2, 3, 1, 1),
}


@st.composite
def arguments(draw, dims=None, kernel=None):
    """Legal arguments of nn.Conv{n}d, and an input size that it accepts, often the smallest."""
    n = draw(st.sampled_from([1, 2, 2, 3])) if dims is None else dims
    each = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * n))  # noqa: E731
    groups = draw(st.integers(1, 3))
    ins, outs = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    kernel_size = each(1, 3 if n == 3 else 5) if kernel is None else (draw(kernel),) * n
    dilation = each(1, 3)
    padding = draw(st.sampled_from(["numbers"] * 4 + ["same", "valid"]))
    stride = (1,) * n if padding == "same" or draw(st.booleans()) else each(1, 3)
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    spans = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    if padding == "numbers":
        padding = each(0, 4)
        lows = highs = padding
    else:
        lows = [span // 2 if padding == "same" else 0 for span in spans]
        highs = [span - low if padding == "same" else 0 for span, low in zip(spans, lows, strict=True)]
    # reflect may read as far as the input is long, less one; circular as far as it is long
    room = [{"reflect": hi + 1, "circular": hi}.get(mode, 1) for hi in highs]
    sizes = zip(spans, lows, highs, room, each(0, 3), strict=True)
    size = tuple(max(1, span + 1 - lo - hi, least) + extra for span, lo, hi, least, extra in sizes)
    settings = {
        "in_channels": groups * ins,
        "out_channels": groups * outs,
        "kernel_size": kernel_size,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": mode,
    }
    return n, settings, size


def case(n: int, size: tuple[int, ...], **settings):
    return n, settings, size


def randomised(block: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 and evaluation mode, no parameter or statistic left at its tame starting value."""
    generator = torch.Generator().manual_seed(seed)
    block = block.double().eval()
    for name, value in [*block.named_parameters(), *block.named_buffers()]:
        if value.is_floating_point() and "delta" not in name and "D_diag" not in name:
            with torch.no_grad():
                value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype))
                if "running_var" in name:
                    value.abs_().add_(0.1)
    return block


def assert_is_conv(block: nn.Module, kernel: Tensor, bias: Tensor | None, n: int, arguments: dict, size) -> None:
    """The block equals nn.Conv{n}d of these arguments with this kernel (ungrouped if the kernel is)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")
        conv = CONV[n](**arguments | {"bias": bias is not None}, dtype=torch.float64)
        if kernel.shape[1] == arguments["in_channels"]:
            conv = CONV[n](**arguments | {"bias": bias is not None, "groups": 1}, dtype=torch.float64)
        assert conv.weight.shape == kernel.shape
        with torch.no_grad():
            conv.weight.copy_(kernel)
            if bias is not None:
                conv.bias.copy_(bias)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, arguments["in_channels"], *size, generator=generator, dtype=torch.float64)
        expected, found = conv(x), block(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11 * float(expected.detach().abs().max() + 1))


def scale(norm: nn.Module) -> tuple[Tensor, Tensor]:
    s = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return s, norm.bias - s * norm.running_mean


def fused(branch: nn.Module) -> tuple[Tensor, Tensor]:
    s, shift = scale(branch.norm)
    return torch.einsum("o,o...->o...", s, branch.conv.weight), shift


@given(arguments())
@example(case(2, (1, 1), in_channels=4, out_channels=4, kernel_size=3, padding=1, groups=2))
@example(case(2, (5, 4), in_channels=2, out_channels=2, kernel_size=3, padding=2, dilation=2, stride=2))
@example(case(2, (1, 1), in_channels=2, out_channels=2, kernel_size=1, padding=2))
@example(case(1, (1,), in_channels=2, out_channels=2, kernel_size=2, padding=1, dilation=2))
def test_repvgg_is_one_conv(drawn):
    n, settings, size = drawn
    block = randomised(REPVGG[n](**settings))
    centre = tuple(k // 2 for k in block.kernel_size)
    kernel, bias = fused(block.dense)
    assert (block.point is None) == (block.kernel_size == (1,) * n)
    if block.point is not None:
        point, shift = fused(block.point)
        kernel[(..., *centre)] += point.flatten(1)
        bias = bias + shift
    fits = settings["in_channels"] == settings["out_channels"] and block.stride == (1,) * n
    assert (block.identity is not None) == fits
    if block.identity is not None:
        s, shift = scale(getattr(block.identity, "norm", block.identity))
        for o in range(len(s)):
            kernel[(o, o % kernel.shape[1], *centre)] += s[o]
        bias = bias + shift
    assert_is_conv(block, kernel, bias, n, settings, size)


@given(arguments(dims=2))
@example(case(2, (3, 3), in_channels=2, out_channels=3, kernel_size=3))
@example(case(2, (3, 4), in_channels=2, out_channels=3, kernel_size=3, padding=1, dilation=2))
@example(case(2, (1, 1), in_channels=2, out_channels=3, kernel_size=3, padding=3))
@example(case(2, (4, 1), in_channels=2, out_channels=3, kernel_size=(3, 5), padding=(0, 4), stride=(2, 1)))
def test_acb_is_one_conv(drawn):
    n, settings, size = drawn
    block = randomised(ACBlock2d(**settings))
    height, width = block.kernel_size
    (kernel, bias), (tall, tall_bias), (wide, wide_bias) = map(fused, (block.square, block.tall, block.wide))
    kernel[:, :, :, width // 2] += tall[:, :, :, 0]
    kernel[:, :, height // 2, :] += wide[:, :, 0, :]
    assert_is_conv(block, kernel, bias + tall_bias + wide_bias, n, settings, size)


@given(arguments())
@example(case(2, (1, 1), in_channels=2, out_channels=5, kernel_size=3, padding=1))
def test_dirac_is_one_conv(drawn):
    n, settings, size = drawn
    block = randomised(DIRAC[n](**settings))
    kernel = torch.zeros_like(block.weight)
    centre = tuple(k // 2 for k in block.kernel_size)
    per_group = block.out_channels // block.groups
    with torch.no_grad():
        for o, w in enumerate(block.weight):
            kernel[o] = block.b[o] * w / torch.sqrt((w**2).sum())
            if o % per_group < len(w):
                kernel[(o, o % per_group, *centre)] += block.a[o]
    assert_is_conv(block, kernel, block.bias, n, settings, size)


def do_kernel(block: nn.Module) -> Tensor:
    """sum_s (D + I)[channel, tap, s] W[filter, j, s], the channel as the official reshape pairs it."""
    if block.D is None:
        return block.W.reshape(block.weight_shape)
    filters, channels, _ = block.W.shape
    o, j = torch.meshgrid(torch.arange(filters), torch.arange(channels), indexing="ij")
    d = block.D[o % block.groups * channels + j]  # (O, I/groups, M, D_mul)
    kernel = (d * block.W[:, :, None, :]).sum(-1) + block.W[:, :, : d.shape[2]]
    return kernel.reshape(block.weight_shape)


@given(arguments(), st.integers(0, 3))
def test_doconv_is_one_conv(drawn, extra):
    n, settings, size = drawn
    taps = CONV[n](1, 1, settings["kernel_size"]).weight.numel()
    block = randomised(DO[n](**settings, D_mul=taps + extra))
    assert_is_conv(block, do_kernel(block), block.bias, n, settings, size)


def ungrouped(conv: nn.Module) -> Tensor:
    """The (O, I, *K) kernel that says the same as a grouped conv's (O, I/groups, *K)."""
    out, per_group = conv.weight.shape[:2]
    dense = torch.zeros(out, conv.in_channels, *conv.kernel_size, dtype=conv.weight.dtype)
    for o in range(out):
        first = o // (out // conv.groups) * per_group
        dense[o, first : first + per_group] = conv.weight[o]
    return dense


def composed(first: Tensor, second: Tensor) -> Tensor:
    """The kernel of second after first: taps add, channels contract."""
    sizes = [a + b - 1 for a, b in zip(first.shape[2:], second.shape[2:], strict=True)]
    kernel = torch.zeros(len(second), first.shape[1], *sizes, dtype=first.dtype)
    for t in itertools.product(*map(range, first.shape[2:])):
        for u in itertools.product(*map(range, second.shape[2:])):
            tap = tuple(a + b for a, b in zip(t, u, strict=True))
            kernel[(..., *tap)] += second[(..., *u)] @ first[(..., *t)]
    return kernel


def assert_chain_is_conv(block: nn.Module, n: int, settings: dict, size) -> None:
    with torch.no_grad():
        convs = [m for m in block.chain if isinstance(m, CONV[n])]
        kernel, bias = ungrouped(convs[0]), convs[0].bias
        for conv in convs[1:]:
            kernel = composed(kernel, ungrouped(conv))
            if bias is not None:
                bias = ungrouped(conv).flatten(2).sum(2) @ bias + conv.bias
    assert (bias is not None) == settings.get("bias", True)
    assert_is_conv(block, kernel, bias, n, settings, size)


@given(arguments(), st.integers(1, 3))
@example(case(2, (1, 1), in_channels=3, out_channels=2, kernel_size=3, padding=1), 4)
def test_expanded_layer_is_one_conv(drawn, rate):
    n, settings, size = drawn
    block = randomised(EXPAND[n](**settings, rate=rate))
    widths = [settings["in_channels"], settings["out_channels"]]
    convs = [m for m in block.chain if isinstance(m, CONV[n])]
    assert [m.out_channels for m in convs] == [rate * widths[0], rate * widths[1], widths[1]]
    assert_chain_is_conv(block, n, settings, size)


@given(arguments(kernel=st.sampled_from([5, 5, 7])).filter(lambda drawn: drawn[0] < 3), st.integers(1, 2))
@example(case(3, (1, 2, 1), in_channels=1, out_channels=2, kernel_size=5, padding=2), 2)
@example(case(2, (1, 2), in_channels=2, out_channels=1, kernel_size=9, padding=4, stride=2), 2)
def test_expanded_kernel_is_one_conv(drawn, rate):
    n, settings, size = drawn
    block = randomised(EXPAND[n](**settings, rate=rate, mode="ck"))
    assert sum(m.kernel_size == (3,) * n for m in block.chain if isinstance(m, CONV[n])) == block.kernel_size[0] // 2
    assert_chain_is_conv(block, n, settings, size)


@pytest.mark.parametrize("bias", [True, False])
def test_expanded_linear_is_one_linear(bias):
    block = randomised(ExpandLinear(5, 3, bias, rate=2))
    assert [m.weight.shape for m in block.chain] == [(10, 5), (6, 10), (3, 6)]
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    expected = x @ block.chain[0].weight.T @ block.chain[1].weight.T @ block.chain[2].weight.T
    if bias:
        one, two, three = (m.bias for m in block.chain)
        expected = expected + (block.chain[2].weight @ (block.chain[1].weight @ one + two) + three)
    torch.testing.assert_close(block(x), expected)


def test_fresh_doconv_is_the_plain_conv_of_its_w():
    for settings in ({"groups": 1}, {"groups": 2}, {"groups": 4, "D_mul": 12}):
        block = DOConv2d(4, 8, 3, **settings)
        torch.testing.assert_close(block.kernel().flatten(2), block.W[..., :9], rtol=0, atol=0)
        bound = 1 / (9 * 4 / block.groups) ** 0.5  # nn.Conv2d's
        assert 0.8 * bound < block.W.abs().max() <= bound
        assert block.bias.abs().max() <= bound
    assert DOConv2d(4, 8, 1).D is None
    assert DOConv3d(2, 2, 1, D_mul=3).D.shape == (2, 1, 3)


def test_fresh_dirac_starts_as_the_paper_says():
    block = DiracConv2d(2, 4, 3, groups=2)
    assert block.a.tolist() == [1.0] * 4
    assert block.b.tolist() == pytest.approx([0.1] * 4)
    assert "delta" not in block.state_dict()
    norms = torch.linalg.vector_norm((block.kernel() - block.delta).flatten(1), dim=1)
    torch.testing.assert_close(norms, torch.full((4,), 0.1))


@pytest.mark.parametrize("block", CONV_BLOCKS)
def test_signature_is_the_convs(block):
    expected = list(inspect.signature(CONV[block.dims]).parameters.values())
    found = list(inspect.signature(block).parameters.values())
    for have, want in zip(found, expected, strict=False):
        assert (have.name, have.kind, have.default) == (want.name, want.kind, want.default)
    assert all(p.kind is p.KEYWORD_ONLY for p in found[len(expected) :])


SETTINGS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (5, 5), "padding": (0, 3), "dilation": (1, 2), "groups": 2},
    {"kernel_size": 5, "padding": "same", "padding_mode": "circular", "bias": False},
]
MODES = [*((block, {}) for block in ALL_2D), (ExpandConv2d, {"mode": "ck"})]


def cases():
    for (block, options), settings in itertools.product(MODES, SETTINGS):
        if not (options and settings["kernel_size"] == 3):
            yield block, settings | options


@pytest.mark.parametrize(("block", "settings"), list(cases()))
def test_traces_copies_saves_and_trains(block, settings):
    module = block(4, 4, **settings)
    x = torch.randn(2, 4, 7, 9)
    module(x).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    module = randomised(module)
    x = x.double()
    y = module(x)
    for same in (fx.symbolic_trace(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(same(x), y, rtol=0, atol=0)
    other = block(4, 4, **settings, dtype=torch.float64).eval()
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(x), y, rtol=0, atol=0)


@pytest.mark.parametrize("block", ALL_2D)
def test_compiles_whole(block):
    module = randomised(block(2, 2, 3, padding=2, padding_mode="replicate"))
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))


@pytest.mark.parametrize("block", [*CONV_BLOCKS, ExpandLinear, blocks.LoRALinear, blocks.RepAdapterLinear])
def test_device_and_dtype_are_those_asked_for(block):
    args = WANTS.get(block, (2, 4, 3) if hasattr(block, "dims") else (2, 4))
    for module in (block(*args, device="meta", dtype=torch.bfloat16), block(*args, dtype=torch.bfloat16)):
        floats = [t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()]
        assert {t.dtype for t in floats} == {torch.bfloat16}
    meta = block(*args, device="meta")
    assert all(t.is_meta for t in [*meta.parameters(), *meta.buffers()])
    made = meta.to_empty(device="cpu")
    for module in made.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x = torch.randn(2, 2, *[5] * getattr(block, "dims", 0))
    assert made(x).isfinite().all()


def test_differences_are_those_of_the_paper():
    """Each tap of a 3x3 takes, besides its own pixel, the centre's, its neighbour's, or the opposite side's."""
    block = randomised(blocks.DEConv2d(4, 6, 3, padding=1, groups=2))
    kernel = block.dense.detach().clone()
    ring = [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0)]  # clockwise
    for row, column in itertools.product(range(3), range(3)):
        kernel[..., row, column] += block.central[..., row, column]
        kernel[..., 1, 1] -= block.central[..., row, column]
    for at, (row, column) in enumerate(ring):
        kernel[..., row, column] += block.angular[..., row, column] - block.angular[(..., *ring[at - 1])]
    for at in range(3):
        kernel[..., at, 0] += block.horizontal[..., at]
        kernel[..., at, 2] -= block.horizontal[..., at]
        kernel[..., 0, at] += block.vertical[..., at]
        kernel[..., 2, at] -= block.vertical[..., at]
    settings = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 2}
    assert_is_conv(block, kernel.detach(), block.bias, 2, settings, (5, 4))


OPTIONS = ("branches", "layer_scale", "pool", "depth", "point", "ratio", "rank")
BEYOND = [
    (blocks.DiverseBranchBlock1d, "dbb", {"kernel_size": 5, "padding": 2, "stride": 2}),
    (blocks.DiverseBranchBlock2d, "dbb", {"kernel_size": (3, 5), "padding": (1, 2), "groups": 2}),
    (blocks.DiverseBranchBlock2d, "dbb", {"kernel_size": 2}),
    (blocks.DiverseBranchBlock3d, "dbb", {"kernel_size": 3, "padding": "same"}),
    (blocks.MobileOneBlock1d, "mobileone", {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    (blocks.MobileOneBlock2d, "mobileone", {"kernel_size": 3, "padding": 2, "dilation": 2, "branches": 2}),
    (blocks.MobileOneBlock2d, "mobileone", {"kernel_size": (3, 1), "padding": (0, 0), "stride": 2, "groups": 4}),
    (blocks.MobileOneBlock2d, "mobileone_pointwise", {"kernel_size": 1, "branches": 1}),
    (blocks.MobileOneBlock3d, "mobileone", {"kernel_size": 3, "padding": "same"}),
    (blocks.LargeKernelBlock2d, "replknet", {"kernel_size": 7, "padding": 3, "groups": 4}),
    (blocks.LargeKernelBlock2d, "replknet", {"kernel_size": 9, "padding": 0, "stride": 2, "groups": 4}),
    (blocks.LargeKernelBlock2d, "unireplknet", {"kernel_size": 9, "padding": 4, "groups": 4, "branches": "dilated"}),
    (blocks.RepMixer2d, "repmixer", {"kernel_size": 7, "padding": 3, "groups": 4}),
    (blocks.RepMixer2d, "repmixer_unscaled", {"kernel_size": (1, 11), "padding": (0, 5), "layer_scale": None}),
    (blocks.QARepVGGBlock1d, "qarepvgg", {"kernel_size": 3, "padding": 1, "stride": 2}),
    (blocks.QARepVGGBlock2d, "qarepvgg", {"kernel_size": 3, "padding": 1, "pool": True}),
    (blocks.QARepVGGBlock2d, "repvit", {"kernel_size": 3, "padding": 1, "groups": 4}),
    (blocks.QARepVGGBlock3d, "qarepvgg", {"kernel_size": 3, "padding": "same", "groups": 2}),
    (blocks.EdgeBlock2d, "ecbsr", {"kernel_size": 3, "padding": 1}),
    (blocks.EdgeBlock2d, "ecbsr", {"kernel_size": 3, "padding": "same", "depth": 0.5}),
    (blocks.OREPA2d, "orepa", {"kernel_size": 3, "padding": 1, "groups": 2}),
    (blocks.OREPA2d, "orepa", {"kernel_size": (5, 2), "stride": 2, "padding_mode": "circular", "padding": 1}),
    (blocks.EdgeBlock2d, "edbb", {"kernel_size": 3, "padding": 1, "point": True}),
    (blocks.ResidualRepBlock2d, "rrrb", {"kernel_size": 3, "padding": "same", "ratio": 3}),
    (blocks.DEConv2d, "deconv", {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 2, "padding_mode": "reflect"}),
    (blocks.LoRAConv2d, "conv_lora", {"kernel_size": 5, "dilation": 2, "groups": 2, "rank": 1}),
    (blocks.CSLABlock1d, "csla", {"kernel_size": 5, "padding": 2, "padding_mode": "circular"}),
    (blocks.CSLABlock2d, "csla", {"kernel_size": (3, 5), "padding": 2, "stride": 2, "groups": 2}),
    (blocks.CSLABlock3d, "csla", {"kernel_size": 3, "padding": "same"}),
    (blocks.CompactorBlock1d, "resrep", {"kernel_size": 1, "stride": 2}),
    (blocks.CompactorBlock2d, "resrep", {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"}),
    (blocks.ImplicitConv2d, "yolor", {"kernel_size": 1, "stride": 2, "groups": 2}),
]


@pytest.mark.parametrize(("block", "rule", "settings"), BEYOND)
def test_a_block_stands_for_one_conv_of_its_arguments(block, rule, settings):
    module = randomised(block(4, 4, **settings))
    x = torch.randn(2, 4, *(11, 10, 9)[: block.dims], dtype=torch.float64)
    plain = {k: v for k, v in settings.items() if k not in OPTIONS}
    conv = CONV[block.dims](4, 4, **plain).double()
    plan = structrep.plan(nn.Sequential(module))
    assert [merge.rules[0] for merge in plan.merges] == [rule]
    (deploy,) = plan.apply()
    assert (deploy(x) - module(x)).abs().max() <= 1e-12 * module(x).abs().max()
    assert deploy(x).shape == conv(x).shape
    names = ("weight.shape", "stride", "dilation", "groups", "padding_mode")
    have = deploy if isinstance(deploy, CONV[block.dims]) else deploy[-1]  # behind a pad that no conv does
    assert have.weight.shape == conv.weight.shape
    assert all(getattr(have, name) == getattr(conv, name) for name in names[1:-1])
    module.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_a_diverse_branch_block_starts_its_chain_as_the_identity():
    block = blocks.DiverseBranchBlock2d(4, 6, 3, padding=1, groups=2)
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(block.chain.conv(x), x)


@pytest.mark.parametrize(
    ("rule", "block"),
    [
        ("lora", lambda: blocks.LoRALinear(6, 7, rank=2, alpha=3.0)),
        ("repadapter", lambda: blocks.RepAdapterLinear(6, 7, rank=4, scale=0.5)),
        ("repadapter", lambda: blocks.RepAdapterLinear(6, 7, rank=3, groups=3)),
    ],
)
def test_an_adapter_starts_as_nothing_and_merges_to_one_linear(rule, block):
    block = block()
    x = torch.randn(3, 6)
    torch.testing.assert_close(block(x), block.base(x))
    block = randomised(block)
    plan = structrep.plan(block)
    assert [merge.rules for merge in plan.merges] == [(rule,)]
    torch.testing.assert_close(plan.apply()(x.double()), block(x.double()))


ERRORS = [
    ({"in_channels": 0}, "in_channels=0"),
    ({"out_channels": 2.5}, "out_channels=2.5"),
    ({"groups": 0}, "groups=0"),
    ({"groups": 3}, "groups=3 does not divide in_channels=4 and out_channels=6: choose a divisor of 2"),
    ({"kernel_size": 0}, "kernel_size=0"),
    ({"kernel_size": (3,)}, "one for each of the 2 spatial dims"),
    ({"stride": (1, 0)}, r"stride=\(1, 0\)"),
    ({"dilation": 1.5}, "dilation=1.5"),
    ({"padding": -1}, "padding=-1"),
    ({"padding": "full"}, "padding='full' is unknown: choose 'same', 'valid' or numbers"),
    ({"padding": "same", "stride": 2}, r"padding='same' has no meaning with stride=\(2, 2\)"),
    ({"padding_mode": "mirror"}, "padding_mode='mirror' is unknown: choose one of zeros, reflect"),
]


@pytest.mark.parametrize(("wrong", "message"), ERRORS)
def test_illegal_arguments_are_refused(wrong, message):
    settings = {"in_channels": 4, "out_channels": 6, "kernel_size": 3} | wrong
    for block in ALL_2D:
        with pytest.raises(ValueError, match=message):
            block(**settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DOConv2d(2, 2, 3, D_mul=8), "D_mul=8 is not an integer of at least 9: give D_mul >= 9"),
        (lambda: ExpandConv2d(2, 2, 3, rate=0), "rate=0"),
        (lambda: ExpandConv2d(2, 2, 3, mode="fc"), "mode='fc' is unknown: choose 'cl' or 'ck'"),
        (lambda: ExpandConv2d(2, 2, 3, mode="ck"), r"kernel_size=\(3, 3\): choose"),
        (lambda: ExpandConv2d(2, 2, 6, mode="ck"), r"kernel_size=\(6, 6\): choose"),
        (lambda: ExpandConv2d(2, 2, (5, 7), mode="ck"), r"kernel_size=\(5, 7\): choose"),
        (lambda: ExpandLinear(0, 3), "in_features=0"),
        (lambda: ExpandLinear(3, 3, rate=1.5), "rate=1.5"),
        (lambda: RepVGGBlock2d(2, 2, 3, dtype=torch.complex64), "dtype=torch.complex64: batch norm"),
        (lambda: ACBlock2d(2, 2, 3, dtype=torch.complex64), "dtype=torch.complex64: batch norm"),
    ],
)
def test_illegal_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", blocks.__all__)
def test_example_in_the_docstring_is_as_it_says(name):
    cls = getattr(blocks, name)
    names = {**vars(blocks), "nn": nn, "torch": torch, "structrep": structrep}
    lines = doctest.DocTestParser().get_doctest(inspect.getdoc(cls), names, name, None, None)
    assert lines.examples
    said = []
    doctest.DocTestRunner().run(lines, out=said.append)
    assert not said, "".join(said)
