"""The mean and the covariance of what a convolution reads, of all its taps at once.

A kernel q makes of a patch P the number q . P. So, over all patches of a batch, its outputs have mean q . E[P] and
variance q' C q with C the covariance of the patches, whatever q is: one pass over the input serves all kernels.

The products of an image with itself moved by d, summed, are its lags R[d]; a convolution of the image with itself has
them for the gradient of its weight. Taps t and u read pixels that are d = u - t apart, so their products sum to R[d],
less those that only outputs beyond the border would read. Along one dim, with taps 0 to k - 1 and pads lo and hi, the
outputs before the first one read pixel a by tap t if a < t - lo, those behind the last one the pixel e from the end
if e < k - 1 - hi - t. So the products of few lines at each border are taken off; and, of two dims, those of the
corners put back.

Digits are kept where means are large: z = x - r is taken, r a constant of each channel near its mean. A patch then is
P = Z + r U, where U is 1 for taps inside the image and 0 for those in its border of zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

Pair = tuple[int, int]
Pads = tuple[Pair, Pair]  # (before, behind) of rows, and of columns

FAST_WIDTH = 3  # of depthwise kernels for whose weight's gradient oneDNN has fast code
SAMPLES = 8  # rows and columns of each image that are looked at to see where means are large


class Moments(NamedTuple):
    """Of the J = I/groups * taps numbers that an output reads, in the order of a weight's, over all outputs of a batch.

    mean: (groups, J).
    covariance: (groups, J, J).
    outputs: how many they are.
    """

    mean: Tensor
    covariance: Tensor
    outputs: int

    def mean_of(self, kernels: Tensor) -> Tensor:
        """Of the outputs of kernels (groups, R, J): (groups, R)."""
        return (kernels @ self.mean.unsqueeze(-1)).squeeze(-1)

    def variance_of(self, kernels: Tensor) -> Tensor:
        """Of the outputs of kernels (groups, R, J), divided by how many they are: (groups, R)."""
        variance: Tensor = _Quadratic.apply(kernels, self.covariance)[0]  # type: ignore[no-untyped-call]
        return variance


def patch_moments(z: Tensor, shift: Tensor, kernel_size: Pair, pads: Pads, groups: int) -> Moments:
    """The moments of what a conv of stride 1, undilated, padded with zeros, reads of x, less a constant a channel.

    Computed in float32 at least.

    Args:
        z: x less that constant, (N, I, H, W).
        shift: the constant, (I,); `large_means` chooses it so that no digits are lost.
        kernel_size: rows and columns.
        pads: pixels before and behind rows and columns, none negative.
        groups: of the conv.
    """
    outputs = _outputs(z.shape[2], kernel_size[0], pads[0]) * _outputs(z.shape[3], kernel_size[1], pads[1])
    count = len(z) * outputs
    edges = _beyond(kernel_size[0], pads[0]), _beyond(kernel_size[1], pads[1])
    lags, total, rows, columns = _Read.apply(z, kernel_size, edges, groups)  # type: ignore[no-untyped-call]
    products = _products(_with_edges(lags, rows, columns, groups), kernel_size, pads, groups)
    between = _sums_inside(total, kernel_size, pads)
    mixed, inside = between[:-1] / count, between[-1] / outputs  # E[Z_t U_u] and E[U_t U_u]
    mean, mean_inside = mixed.diagonal(dim1=1, dim2=2), inside.diagonal()
    flat = mean.reshape(groups, -1)
    covariance = products / count - flat[:, :, None] * flat[:, None, :]
    if any(map(any, pads)):
        shift = shift.to(lags.dtype)
        half = mixed - mean[:, :, None] * mean_inside
        half = half + shift[:, None, None] * (inside - mean_inside[:, None] * mean_inside) / 2
        half = (half.view(groups, -1, 1, len(inside)) * shift.view(groups, 1, -1, 1)).flatten(2)
        covariance = covariance + half + half.transpose(1, 2)
        mean = mean - shift[:, None] * (1 - mean_inside)  # of the border, which is 0 - shift
    return Moments(mean.reshape(groups, -1), covariance, count)


def _outputs(size: int, k: int, pad: Pair) -> int:
    return size + sum(pad) - k + 1


def _beyond(k: int, pad: Pair) -> int:
    """How many lines at a border are read by outputs that there are not, at the border that has more."""
    return max(k - 1 - min(pad), 0)


def large_means(x: Tensor) -> Tensor:
    """Of channels whose mean is large beside their spread, (I,), about that mean; of others 0, so that zeros stay 0."""
    rows, columns = (slice(None, None, max(1, size // SAMPLES)) for size in x.shape[2:])
    with torch.no_grad():
        sample = x.detach()[:, :, rows, columns].to(_at_least_float32(x))
        mean = sample.mean((0, 2, 3))
        variance = sample.square().mean((0, 2, 3)) - mean.square()
        return torch.where(mean.square() > 4 * variance, mean, 0).to(x.dtype)


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Read(Function):
    """What is read of images: their lags, their sum over the batch, their first and last rows and columns.

    (N, I, H, W) -> (I, I/groups, 2 rows - 1, 2 columns - 1), (I, H, W), (N, I, lines, W), (N, I, H, lines).
    """

    @staticmethod
    def forward(z: Tensor, kernel_size: Pair, edges: Pair, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z = z.to(_at_least_float32(z))
        return _lags(z, kernel_size, groups, len(z)), z.sum(0), _edges(z, 2, edges[0]), _edges(z, 3, edges[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        z, _, _, ctx.groups = inputs
        ctx.save_for_backward(z)

    @staticmethod
    def backward(
        ctx: Any, of_lags: Tensor, of_total: Tensor, of_rows: Tensor, of_columns: Tensor
    ) -> tuple[Tensor, None, None, None]:
        (z,) = ctx.saved_tensors
        with torch.autocast(z.device.type, enabled=False):
            grad = _back(z.to(of_lags.dtype), of_lags, ctx.groups).add_(of_total)
            for dim, lines in ((2, of_rows), (3, of_columns)):
                size, most = z.shape[dim], lines.shape[dim] // 2
                there = min(most, size)
                grad.narrow(dim, 0, there).add_(lines.narrow(dim, 0, there))
                grad.narrow(dim, size - there, there).add_(lines.narrow(dim, 2 * most - there, there))
        return grad.to(z.dtype), None, None, None


def _edges(z: Tensor, dim: int, lines: int) -> Tensor:
    """The first and the last lines of images, so many each, behind each other; lines that there are not are 0."""
    size = z.shape[dim]
    there = min(lines, size)
    pad = (*[0, 0] * (3 - dim), 0, lines - there)
    pad_first = (*pad[:-2], pad[-1], 0)
    first, last = z.narrow(dim, 0, there), z.narrow(dim, size - there, there)
    return torch.cat([F.pad(first, pad), F.pad(last, pad_first)] if there < lines else [first, last], dim)


class _Lags(Function):
    """`_lags`, with a gradient."""

    @staticmethod
    def forward(z: Tensor, kernel_size: Pair, groups: int) -> Tensor:
        return _lags(z, kernel_size, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        z, _, ctx.groups = inputs
        ctx.save_for_backward(z)

    @staticmethod
    def backward(ctx: Any, of_lags: Tensor) -> tuple[Tensor, None, None]:
        with torch.autocast(of_lags.device.type, enabled=False):
            return _back(ctx.saved_tensors[0], of_lags, ctx.groups), None, None


def _back(z: Tensor, of_lags: Tensor, groups: int) -> Tensor:
    """From the gradient of lags to that of images."""
    kernel = of_lags + _reversed(of_lags, groups)
    return F.conv2d(z, kernel, None, 1, [length // 2 for length in of_lags.shape[2:]], 1, groups)


def _lags(z: Tensor, kernel_size: Pair, groups: int, apart: int = 1) -> Tensor:
    """(N, I, H, W) -> (I, I/groups, 2 rows - 1, 2 columns - 1), R_ij[d] the sum of z_i[p] z_j[p + d].

    Those to the right are the gradient of the weight of a conv that reads z and gives z; then R_ij[-d] = R_ji[d].
    `apart` sums are taken before they are added, where groups are single channels: long ones lose digits.
    """
    rows, columns = kernel_size
    ins, width = z.shape[1] // groups, z.shape[3]
    apart = apart if ins == 1 else 1
    z = z.reshape(len(z) // apart, -1, *z.shape[2:])
    read = F.pad(z, (0, columns - 1))
    step = FAST_WIDTH if ins == 1 and z.device.type == "cpu" else columns
    found = []
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        weight = z.new_empty(z.shape[1], ins, 2 * rows - 1, stop - start)
        _, right, _ = torch.ops.aten.convolution_backward(
            z, read[..., start : width + stop - 1], weight, None, [1, 1], [rows - 1, 0], [1, 1], False, [0, 0],
            groups * apart, [False, True, False],
        )  # fmt: skip
        found.append(right)
    whole = torch.cat(found, -1)
    right = whole.view(apart, -1, *whole.shape[1:]).sum(0)
    return torch.cat([_reversed(right[..., 1:], groups), right], -1)


def _reversed(lags: Tensor, groups: int) -> Tensor:
    """Of lags R_ij[d], (I, I/groups, rows, columns), those the other way: R_ji[-d]."""
    turned: Tensor = lags.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(2, 3)
    return turned


def _with_edges(lags: Tensor, rows: Tensor, columns: Tensor, groups: int) -> Tensor:
    """Lags, and beside them, per dim, what pairs of lines at the edges have, the first lines, then the last ones:
    (I, I/groups, lags + pairs, lags + pairs)."""
    high, wide, k = rows.shape[2] // 2, columns.shape[3] // 2, lags.shape[3] // 2 + 1
    if wide:
        beside = _lags_of_lines(columns.transpose(2, 3), lags.shape[2] // 2 + 1, groups)
        lags = torch.cat([lags, beside.transpose(2, 3)], 3)
    if high:
        below = [_lags_of_lines(rows, k, groups)]
        below += [_corners(_edges(rows, 3, wide), groups)] if wide else []
        lags = torch.cat([lags, torch.cat(below, 3)], 2)
    return lags


def _lags_of_lines(lines: Tensor, k: int, groups: int) -> Tensor:
    """Of lines a and b, both of the first ones or both of the last, the sums of z_ia[p] z_jb[p + d]:
    (N, I, lines, pixels) -> (I, I/groups, pairs, 2k - 1)."""
    ins, many = lines.shape[1] // groups, lines.shape[2] // 2
    sides = lines.unflatten(2, (2, many)).unflatten(1, (groups, ins)).transpose(2, 3)
    lags: Tensor = _Lags.apply(sides.flatten(1, 4).unsqueeze(2), (1, k), 2 * groups)  # type: ignore[no-untyped-call]
    pairs = lags.view(groups, 2, ins, many, ins, many, -1).permute(0, 2, 4, 1, 3, 5, 6)
    return pairs.reshape(groups * ins, ins, 2 * many * many, -1)


def _corners(z: Tensor, groups: int) -> Tensor:
    """Of pixels of one corner, the sums of z_i[p] z_j[q] over the batch:
    (N, I, rows, columns) -> (I, I/groups, pairs of rows, pairs of columns)."""
    ins, high, wide = z.shape[1] // groups, z.shape[2] // 2, z.shape[3] // 2
    each = z.view(len(z), groups, ins, 2, high, 2, wide).permute(1, 3, 5, 2, 4, 6, 0).flatten(3, 5).flatten(0, 2)
    products = each.square().sum(2) if each.shape[1] == 1 else each @ each.transpose(1, 2)
    pairs = products.view(groups, 2, 2, ins, high, wide, ins, high, wide).permute(0, 3, 6, 1, 4, 7, 2, 5, 8)
    return pairs.reshape(groups * ins, ins, 2 * high * high, 2 * wide * wide)


def _products(features: Tensor, kernel_size: Pair, pads: Pads, groups: int) -> Tensor:
    """The sums of Z_it Z_ju over all outputs, (groups, J, J), of what `_with_edges` gives."""
    ins = features.shape[1]
    for k, pad in zip(kernel_size, pads, strict=True):
        features = torch.tensordot(features, _pairs(k, pad, features), ([2], [0]))  # columns come next
    pairs = features.view(groups, ins, ins, *(k for k in kernel_size for _ in range(2)))
    return pairs.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)


def _pairs(k: int, pad: Pair, like: Tensor) -> Tensor:
    """Of which lags and pairs of lines the products of taps t and u consist, in one dim: (lags + lines², t, u)."""
    tap, lag, line = (torch.arange(*ends, device=like.device) for ends in ((k,), (1 - k, k), (_beyond(k, pad),)))
    t, u = tap[:, None], tap
    a, b = line[:, None, None, None], line[:, None, None]
    apart = b - a == u - t
    first, last = a < t - pad[0], len(line) - 1 - a < k - 1 - pad[1] - t
    pairs = torch.cat([apart & first, apart & last]).flatten(0, 1)
    whole = lag[:, None, None] == u - t
    return torch.cat([whole.to(like.dtype), -pairs.to(like.dtype)])


def _sums_inside(total: Tensor, kernel_size: Pair, pads: Pads) -> Tensor:
    """Of images summed over a batch, (I, H, W), the sums of Z_t U_u over all outputs, (I + 1, taps, taps); the last are
    those of U_t U_u, of one image."""
    sums = torch.cat([total, torch.ones_like(total[:1])])
    for k, pad in zip(kernel_size, pads, strict=True):
        sums = torch.tensordot(sums, _inside(sums.shape[1], k, pad, total), ([1], [0]))
    return sums.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)


def _inside(size: int, k: int, pad: Pair, like: Tensor) -> Tensor:
    """Whether a pixel is read by tap t of an output whose tap u reads a pixel too, in one dim: (pixels, t, u)."""
    tap = torch.arange(k, device=like.device)
    by_t = torch.arange(size, device=like.device)[:, None, None]
    by_u = by_t + tap - tap[:, None]
    output = by_t - tap[:, None] + pad[0]
    inside = (output >= 0) & (output < _outputs(size, k, pad)) & (by_u >= 0) & (by_u < size)
    return inside.to(like.dtype)


class _Quadratic(Function):
    """q' C q of kernels (groups, R, J) and a symmetric C, (groups, J, J): (groups, R); and C q."""

    @staticmethod
    def forward(kernels: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        product = kernels @ covariance
        return (product * kernels).sum(-1), product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        kernels, covariance, product = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this one may be asked for
            product = kernels @ covariance
        scaled = grad.unsqueeze(-1) * kernels
        return 2 * grad.unsqueeze(-1) * product, kernels.transpose(1, 2) @ scaled
