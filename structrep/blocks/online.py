"""Branches with norms as one convolution, while they train: batch statistics come from the moments of the input.

The mean and the variance of what a branch would give follow from its kernel and the moments of the patches that it
reads (`moments`). So branches are scaled, shifted and added as kernels, and one convolution is run. Outputs,
gradients and running statistics are those of the branches run one by one, up to rounding; no branch's output is ever
made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from structrep.blocks._geometry import CONV, CONVOLVE, NORM, Pad, Pads, Reading
from structrep.blocks.moments import Moments, large_means, patch_moments

NORMS = (*NORM.values(), nn.BatchNorm1d, nn.SyncBatchNorm)
NARROW = 64  # input channels of a group up to which their products cost less than the passes of norms
SMALL_MAP = 14 * 14  # outputs of an image beyond which one depthwise kernel beside others pays


class Branch(NamedTuple):
    """A conv, or None for the identity; a norm, or None; and the pads of their input."""

    conv: Any
    norm: Any
    pads: Pads


def merged_first(
    modules: Sequence[nn.Module], reading: Reading, x: Tensor, online: bool | None, behind: Sequence[Any] = ()
) -> list[Branch] | None:
    """The branches of a block, if they are to be merged before they are run; None if they are to be run.

    Args:
        modules: what the block adds up.
        reading: how its kernels read their input.
        x: that input.
        online: True wherever they can be merged, None where it takes less time, by count, False never.
        behind: norms behind the sum.
    """
    if online is False:
        return None
    branches = [branch for branch in (read_branch(module, len(reading.kernel_size)) for module in modules) if branch]
    norms = [*(branch.norm for branch in branches if branch.norm is not None), *behind]
    if len(branches) < len(modules) or not _one_kernel(branches, reading, x) or not _alike(norms):
        return None
    together = _over_processes(norms[0])
    if not together and len(x) * reading.outputs(x) < 2:  # as a norm would say
        return None
    return branches if online or _pays(branches, len(norms), reading, None if together else x) else None


def read_branch(module: nn.Module, dims: int) -> Branch | None:
    """A norm, a conv, or both in turn, perhaps behind a `Pad`; None for all else, and where hooks watch."""
    parts: list[Any] = list(module) if type(module) is nn.Sequential else [module]
    if any(map(watched, {module, *parts})):
        return None
    pads, conv, norm = ((0, 0),) * dims, None, None
    if parts and type(parts[0]) is Pad:
        pads = parts.pop(0).pads
    if parts and type(parts[0]) is CONV[dims]:
        conv = parts.pop(0)
        flat = conv._reversed_padding_repeated_twice  # the last dim first
        own = zip(flat[-2::-2], flat[::-2], strict=True)
        pads = tuple((lo + more, hi + beyond) for (lo, hi), (more, beyond) in zip(pads, own, strict=True))
    if parts and type(parts[0]) in NORMS:
        norm = parts.pop(0)
    return None if parts or conv is norm is None else Branch(conv, norm, pads)


def common_reading(modules: Sequence[nn.Module]) -> Reading | None:
    """How the largest conv among branches reads their input; None if there is none."""
    kinds = {kind: dims for dims, kind in CONV.items()}
    found: list[Any] = [(one, kinds[type(one)]) for module in modules for one in module.modules() if type(one) in kinds]
    if not found:
        return None
    conv: Any
    conv, dims = max(found, key=lambda pair: math.prod(pair[0].kernel_size))
    branch = read_branch(conv, dims)
    if branch is None:
        return None
    return Reading(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, branch.pads, conv.dilation, conv.groups,
        conv.padding_mode,
    )  # fmt: skip


def watched(module: Any) -> bool:
    """Whether hooks would miss a call of a module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _one_kernel(branches: Sequence[Branch], reading: Reading, x: Tensor) -> bool:
    """Whether the branches can be one kernel, of whose patches the moments are to be had."""
    return (
        x.dim() == len(reading.kernel_size) + 2
        and x.is_floating_point()
        and not x.is_meta
        and x.numel() > 0
        and (reading.pointwise or (reading.depthwise and len(reading.kernel_size) < 3))
        and all(k == 1 or stride == dilation == 1 for k, stride, dilation in reading.taps)
        and all(_fits(branch, reading) for branch in branches)
    )


def _alike(norms: Sequence[Any]) -> bool:
    """Whether norms can be computed together."""
    kinds = set()
    for norm in norms:
        over = (norm.process_group, norm.training) if type(norm) is nn.SyncBatchNorm else None
        kinds.add((over, norm.weight is None, norm.bias is None))
    return len(kinds) == 1 and all(type(norm) in NORMS and not watched(norm) for norm in norms)


def _over_processes(norm: Any) -> bool:
    """Whether a norm takes the statistics of several processes."""
    if type(norm) is not nn.SyncBatchNorm or not norm.training:
        return False
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(norm.process_group) > 1


def _fits(branch: Branch, reading: Reading) -> bool:
    """Whether a branch is a kernel of the block, some taps of which are 0."""
    conv, dims = branch.conv, len(reading.kernel_size)
    if conv is None:
        alike = reading.in_channels == reading.out_channels and set(reading.stride) == {1}
    else:
        mode = conv.padding_mode == reading.padding_mode or not any(map(any, branch.pads))
        alike = mode and (conv.groups, conv.stride, conv.out_channels) == (
            reading.groups, reading.stride, reading.out_channels
        )  # fmt: skip
        alike = alike and all(d == 1 or k == 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    sizes = (1,) * dims if conv is None else conv.kernel_size
    sides = zip(reading.kernel_size, reading.pads, sizes, branch.pads, strict=True)
    return alike and all(
        before >= lo and after >= hi and before - lo + after - hi == k - size
        for k, (before, after), size, (lo, hi) in sides
    )


def _pays(branches: Sequence[Branch], norms: int, reading: Reading, x: Tensor | None) -> bool:
    """Whether it takes less time to merge the branches first, by count.

    A branch takes 3 convolutions: forward, and two gradients. Merged first, all take 3; the products of input channels
    2 I/O; and the variances of each branch's outputs 2 I/N, with I and O the channels of a group and N the pixels of
    all outputs. Where there are few channels, the passes of norms weigh more.

    Args:
        norms: how many there are.
        x: None where processes, whose inputs may differ, have to come to the same.
    """
    if norms < 2:
        return False
    convs = [branch.conv for branch in branches if branch.conv is not None and branch.norm is not None]
    if not reading.pointwise:
        spatial = sum(max(conv.kernel_size) > 1 for conv in convs)
        return spatial > 1 or (x is not None and reading.outputs(x) > SMALL_MAP)
    ins, outs = reading.in_channels // reading.groups, reading.out_channels // reading.groups
    if ins <= NARROW or x is None:
        return ins <= NARROW
    return 3 + 2 * ins / outs + 2 * len(convs) * ins / (len(x) * reading.outputs(x)) < 3 * len(convs)


class Composition:
    """Kernels that read one input alike, as numbers: scaled and shifted as the norms behind them would, and added.

    They read the input less a constant a channel, near its mean where that is large: biases belong to outputs of that.

    Args:
        x: (N, I, *spatial).
        reading: how all kernels read it.
        norms: all that are computed; if none goes by the batch, the input is taken as it is.
    """

    def __init__(self, x: Tensor, reading: Reading, norms: Sequence[Any]) -> None:
        self.reading, self.pads = reading, reading.pads
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.shift, self.moments = x.new_zeros(x.shape[1]), Moments(x, x, 0)
        if reading.padding_mode != "zeros" or set(reading.stride) != {1} or len(reading.pads) > 2:
            x = Pad(reading.pads, reading.padding_mode)(x)
            self.pads = ((0, 0),) * len(reading.pads)
        every = [slice(None, None, stride) for stride in reading.stride]
        self.x = x[(slice(None), slice(None), *every)]
        if any(map(_by_batch, norms)):
            self._read(norms[0])

    def _read(self, norm: Any) -> None:
        """Centre the input, border and all, and take its moments."""
        x, kernel_size, pads = self.x, self.reading.kernel_size, self.pads
        size = x.shape
        if x.dim() != 4:  # one row of pixels
            x, kernel_size, pads = x.flatten(2).unsqueeze(2), (1, kernel_size[-1]), ((0, 0), pads[-1])
        self.shift = _of_all(large_means(x), norm)
        padded = Pad(pads, "zeros")(x) - self.shift[:, None, None]
        (top, _), (left, _) = pads
        z = padded[:, :, top : top + x.shape[2], left : left + x.shape[3]]
        self.moments = patch_moments(z, self.shift, kernel_size, pads, self.reading.groups)  # type: ignore[arg-type]
        self.x = padded if len(size) == 4 else padded.view(*size[:2], *(size[2:] if len(size) > 3 else (-1,)))
        self.pads = ((0, 0),) * len(self.pads)

    def kernel(self, branch: Branch) -> Tensor:
        """What a branch is before its norm, as a kernel of the block: (O, J), J = I/groups * taps."""
        weight = self._one() if branch.conv is None else branch.conv.weight.to(self.dtype)
        sides = zip(self.reading.kernel_size, self.reading.pads, branch.pads, weight.shape[2:], strict=True)
        around = [(before - lo, k - size - before + lo) for k, (before, _), (lo, _), size in sides]
        flat = [side for pair in reversed(around) for side in pair]
        return (F.pad(weight, flat) if any(flat) else weight).flatten(1)

    def identity(self) -> Tensor:
        """The kernel that gives its input, (O, J)."""
        return self.kernel(Branch(None, None, ((0, 0),) * len(self.pads)))

    def average(self) -> Tensor:
        """The kernel that gives the average of all taps, channel by channel, (O, J)."""
        taps = self.reading.kernel_size
        return (self._one().expand(-1, -1, *taps) / math.prod(taps)).flatten(1)

    def _one(self) -> Tensor:
        """Of a pointwise conv that gives its input, the weight."""
        ins = self.reading.in_channels // self.reading.groups
        eye = torch.eye(ins, dtype=self.dtype, device=self.x.device).repeat(self.reading.groups, 1)
        return eye.view(-1, ins, *[1] * len(self.reading.kernel_size))

    def of_shift(self, kernels: Tensor) -> Tensor:
        """What kernels (B, O, J) give of the constant that was taken off: (B, O)."""
        ins = self.reading.in_channels // self.reading.groups
        each = kernels.unflatten(2, (ins, -1)).sum(3).unflatten(1, (self.reading.groups, -1))
        given: Tensor = (each * self.shift.to(self.dtype).view(-1, 1, ins)).sum(3).flatten(1)
        return given

    def normed_branches(self, branches: Sequence[Branch]) -> tuple[Tensor, Tensor]:
        """The kernels (B, O, J) and biases (B, O) of branches, with their norms."""
        none = self.x.new_zeros(self.reading.out_channels, dtype=self.dtype)
        convs = [branch.conv for branch in branches]
        biases = self._stack(none if conv is None or conv.bias is None else conv.bias for conv in convs)
        kernels = torch.stack([self.kernel(branch) for branch in branches])
        return self.normed(kernels, biases + self.of_shift(kernels), [branch.norm for branch in branches])

    def normed(self, kernels: Tensor, biases: Tensor, norms: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Kernels (B, O, J) and biases (B, O) with the norm of each behind it; running statistics are updated."""
        if any(map(_by_batch, norms)):
            means, variances, count = self._statistics(kernels, norms[0])
            for b, norm in enumerate(norms):
                if _by_batch(norm):
                    _track(norm, (means[b] + biases[b]).detach(), variances[b].detach(), count)
        below, spread = [], []
        for b, norm in enumerate(norms):
            # the mean takes a bias away, whose gradient is 0 then, and not none
            below.append(means[b] + 0 * biases[b] if _by_batch(norm) else norm.running_mean - biases[b])
            spread.append((variances[b] if _by_batch(norm) else norm.running_var) + norm.eps)
        scale = self._stack(spread).rsqrt()
        if norms[0].weight is not None:
            scale = scale * self._stack(norm.weight for norm in norms)
        bias = -scale * self._stack(below)
        if norms[0].bias is not None:
            # times 1, or the gradient of a sum would be one memory for all norms, which would each add to it
            bias = bias + self._stack(norm.bias for norm in norms) * torch.ones_like(bias)
        return scale.unsqueeze(-1) * kernels, bias

    def _stack(self, rows: Iterable[Tensor]) -> Tensor:
        return torch.stack([row.to(self.dtype) for row in rows])

    def _statistics(self, kernels: Tensor, norm: Any) -> tuple[Tensor, Tensor, int | Tensor]:
        """The mean and the variance, (B, O) each, of what kernels give, and of how many numbers."""
        grouped = kernels.unflatten(1, (self.reading.groups, -1)).transpose(0, 1)  # (groups, B, O/groups, J)
        mean, variance = (
            found.unflatten(1, grouped.shape[1:3]).transpose(0, 1).flatten(1)
            for found in (self.moments.mean_of(grouped.flatten(1, 2)), self.moments.variance_of(grouped.flatten(1, 2)))
        )
        variance = variance + (variance.clamp_min(0) - variance).detach()  # what rounding took below 0
        if _over_processes(norm):
            return _of_all_processes(mean, variance, self.moments.outputs, norm.process_group)
        return mean, variance, self.moments.outputs

    def convolved(self, kernel: Tensor, bias: Tensor) -> Tensor:
        """What a kernel (O, J) and a bias (O,) give, (N, O, *out)."""
        x, padding = self.x, [lo for lo, _ in self.pads]
        if any(lo != hi for lo, hi in self.pads):
            x, padding = Pad(self.pads, "zeros")(x), [0] * len(padding)
        weight = kernel.view(len(kernel), -1, *self.reading.kernel_size).to(x.dtype)
        y: Tensor = CONVOLVE[len(padding)](x, weight, bias.to(x.dtype), 1, padding, 1, self.reading.groups)
        return y


def _by_batch(norm: Any) -> bool:
    return bool(norm.training) or norm.running_mean is None


def _of_all(shift: Tensor, norm: Any) -> Tensor:
    """One constant for all processes that a norm takes the statistics of."""
    if _over_processes(norm):
        dist.all_reduce(shift, group=norm.process_group)
        shift = shift / dist.get_world_size(norm.process_group)
    return shift


def _of_all_processes(mean: Tensor, variance: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of all processes together, from those of each: first the mean, so that no digits are lost."""
    from torch.distributed.nn.functional import all_reduce

    group = dist.group.WORLD if group is None else group
    *sums, total = all_reduce(torch.cat([count * mean, torch.full_like(mean[:1], count)]), group=group)
    everywhere = torch.stack(sums) / total
    spread = all_reduce(count * (variance + (mean - everywhere).square()), group=group)
    return everywhere, spread / total, total[0]


def _track(norm: Any, mean: Tensor, variance: Tensor, count: int | Tensor) -> None:
    """Update running statistics as torch's norms do."""
    if not (norm.training and norm.track_running_stats):
        return
    with torch.no_grad():
        momentum = 0.0 if norm.momentum is None else norm.momentum
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                momentum = norm.num_batches_tracked.to(norm.running_mean.dtype).reciprocal()
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), momentum)


def full_precision(x: Tensor) -> torch.autocast:
    """Without autocast, on the device of a tensor."""
    return torch.autocast(x.device.type, enabled=False)


def sum_of(branches: Sequence[Branch], reading: Reading, x: Tensor) -> Tensor:
    """The sum of branches that end with norms, as one conv."""
    with full_precision(x):
        made = Composition(x, reading, [branch.norm for branch in branches])
        kernels, biases = made.normed_branches(branches)
        kernel, bias = kernels.sum(0), biases.sum(0)
    return made.convolved(kernel, bias)
