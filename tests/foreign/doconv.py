"""DO-Conv (arXiv:2006.12030) by other hands."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Official(nn.Module):
    """No convolution layer inside: W, D and a frozen diagonal, contracted by einsum; own _conv_forward."""

    def __init__(self, c1, c2, k=3, stride=1, padding=0, dilation=1, groups=1, D_mul=None, bias=True, mode="zeros"):
        super().__init__()
        self.in_channels, self.out_channels, self.groups = c1, c2, groups
        self.kernel_size = (k, k) if isinstance(k, int) else k
        self.stride, self.padding, self.dilation, self.padding_mode = stride, padding, dilation, mode
        taps = math.prod(self.kernel_size)
        self.D_mul = taps if D_mul is None or taps <= 1 else D_mul
        self.W = nn.Parameter(torch.zeros(c2, c1 // groups, self.D_mul))
        if taps > 1:
            self.D = nn.Parameter(torch.zeros(c1, taps, self.D_mul))
            eye = torch.eye(taps).reshape(1, taps, taps)
            times = self.D_mul // taps
            eye = eye.repeat(c1, 1, times)
            if self.D_mul % taps:
                eye = torch.cat([eye, torch.zeros(c1, taps, self.D_mul % taps)], dim=2)
            self.d_diag = nn.Parameter(eye, requires_grad=False)
        if bias:
            self.bias = nn.Parameter(torch.zeros(c2))
        else:
            self.register_parameter("bias", None)

    def _conv_forward(self, input, weight):
        if self.padding_mode != "zeros":
            p = self.padding
            input = F.pad(input, (p, p, p, p), mode=self.padding_mode)
            return F.conv2d(input, weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def forward(self, input):
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        if math.prod(self.kernel_size) > 1:
            D = self.D + self.d_diag
            W = torch.reshape(self.W, (self.out_channels // self.groups, self.in_channels, self.D_mul))
            DoW = torch.reshape(torch.einsum("ims,ois->oim", D, W), shape)
        else:
            DoW = torch.reshape(self.W, shape)
        return self._conv_forward(input, DoW)


class Inherited(nn.Conv2d):
    """Inherits nn.Conv2d, keeps its weight as W; matmul per input channel."""

    def __init__(self, c1, c2, k, **more):
        super().__init__(c1, c2, k, **more)
        taps = k * k
        self.depth_kernel = nn.Parameter(torch.zeros(c1 // self.groups, taps, taps))
        self.register_buffer("eye", torch.eye(taps)[None])

    def composed(self):
        w = self.weight.flatten(2).transpose(0, 1)  # (I/g, O, taps)
        return ((w @ (self.depth_kernel + self.eye)).transpose(0, 1)).reshape(self.weight.shape)

    def forward(self, x):
        return self._conv_forward(x, self.composed(), self.bias)


class Bmm(Inherited):
    def composed(self):
        w = self.weight.flatten(2).permute(1, 0, 2)
        return torch.bmm(w, self.depth_kernel + self.eye).permute(1, 0, 2).contiguous().view_as(self.weight)


class Depthwise(nn.Module):
    """DO-DConv: groups == channels, a multiplier of 2."""

    def __init__(self, c, k=3, times=2, stride=1):
        super().__init__()
        self.c, self.k, self.stride = c, k, stride
        self.W = nn.Parameter(torch.zeros(c, times, k * k))
        self.D = nn.Parameter(torch.zeros(c, k * k, k * k))

    def forward(self, x):
        eye = torch.eye(self.k * self.k, device=x.device, dtype=self.D.dtype)
        w = torch.matmul(self.W, (self.D + eye).transpose(1, 2))
        return F.conv2d(x, w.reshape(-1, 1, self.k, self.k), None, self.stride, self.k // 2, 1, self.c)


class Line(nn.Module):
    """One spatial dim."""

    def __init__(self, c1, c2, k=5):
        super().__init__()
        self.w, self.d = nn.Parameter(torch.zeros(c2, c1, k)), nn.Parameter(torch.zeros(c1, k, k))

    def forward(self, x):
        return F.conv1d(x, torch.einsum("ois,ims->oim", self.w, self.d), padding="same")


class Volume(nn.Module):
    """Three spatial dims, followed by a norm."""

    def __init__(self, c1, c2, k=2):
        super().__init__()
        self.k = k
        self.w, self.d = nn.Parameter(torch.zeros(c2, c1, k**3 + 1)), nn.Parameter(torch.zeros(c1, k**3, k**3 + 1))
        self.norm = nn.BatchNorm3d(c2)

    def forward(self, x):
        w = torch.einsum("ois,ims->oim", self.w, self.d).unflatten(2, (self.k,) * 3)
        return self.norm(F.conv3d(x, w, padding=1, stride=2))


class Cached(nn.Module):
    """A helper module makes the kernel, another convolves with it."""

    class Compose(nn.Module):
        def __init__(self, c, k):
            super().__init__()
            self.D = nn.Parameter(torch.zeros(c, k * k, k * k))

        def forward(self, w):
            return torch.einsum("ois,ims->oim", w.flatten(2), self.D).view_as(w)

    def __init__(self, c1, c2, k=3):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, padding=1)
        self.compose = Cached.Compose(c1, k)

    def forward(self, x):
        w = self.compose(self.conv.weight)
        return F.conv2d(x, w, bias=self.conv.bias, padding=self.conv.padding, stride=self.conv.stride)
