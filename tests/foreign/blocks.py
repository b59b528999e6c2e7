"""Blocks of newer families as other people write them: one each, with other names and what is odd about it."""

import torch
import torch.nn.functional as F
from torch import nn


def with_frame(y, value):
    """A frame of one pixel that is assigned, side by side."""
    y = F.pad(y, (1, 1, 1, 1), "constant", 0)
    value = value.view(1, -1, 1, 1)
    y[:, :, 0:1, :] = value
    y[:, :, -1:, :] = value
    y[:, :, :, 0:1] = value
    y[:, :, :, -1:] = value
    return y


SOBEL = [[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]


class MaskedSeq(nn.Module):
    """A 1x1 whose weights are held apart from any layer, and a fixed filter with a scale per channel."""

    def __init__(self, c):
        super().__init__()
        first = nn.Conv2d(c, c, 1)
        self.k0, self.b0 = first.weight, first.bias
        self.scale = nn.Parameter(torch.randn(c, 1, 1, 1))
        self.bias = nn.Parameter(torch.randn(c))
        self.mask = nn.Parameter(torch.tensor(SOBEL).expand(c, 1, 3, 3).clone(), requires_grad=False)

    def forward(self, x):
        y = with_frame(F.conv2d(input=x, weight=self.k0, bias=self.b0), self.b0)
        return F.conv2d(input=y, weight=self.scale * self.mask, bias=self.bias, groups=len(self.scale))


class EDBB(nn.Module):
    """Of EFDN: the branches of ECBSR and a 1x1."""

    def __init__(self, c=4, skip=True):
        super().__init__()
        self.rep_conv, self.conv1x1 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 1)
        self.sbx, self.lpl = MaskedSeq(c), MaskedSeq(c)
        self.with_idt, self.act = skip, nn.PReLU(c)

    def forward(self, x):
        y = self.rep_conv(x) + self.conv1x1(x) + self.sbx(x) + self.lpl(x)
        if self.with_idt:
            y += x
        return self.act(y)


class RRRB(nn.Module):
    """Of FMEN: two residuals, one within the other, added in place."""

    def __init__(self, c=4, ratio=2):
        super().__init__()
        self.expand_conv = nn.Conv2d(c, c * ratio, 1)
        self.fea_conv = nn.Conv2d(c * ratio, c * ratio, 3)
        self.reduce_conv = nn.Conv2d(c * ratio, c, 1)

    def forward(self, x):
        out = self.expand_conv(x)
        identity = out
        out = self.fea_conv(with_frame(out, self.expand_conv.bias)) + identity
        out = self.reduce_conv(out)
        out += x
        return out


class DEConv(nn.Module):
    """Of DEA-Net: five layers hold the kernels, which are put together tap by tap."""

    def __init__(self, c=4):
        super().__init__()
        self.central, self.angular, self.plain = (nn.Conv2d(c, c, 3, padding=1) for _ in range(3))
        self.across, self.down = nn.Conv1d(c, c, 3, padding=1), nn.Conv1d(c, c, 3, padding=1)

    def forward(self, x):
        w = self.central.weight.flatten(2)
        central = torch.zeros_like(w)
        central[:, :, :] = w
        central[:, :, 4] = w[:, :, 4] - w.sum(2)
        a = self.angular.weight.flatten(2)
        angular = a - a[:, :, [3, 0, 1, 6, 4, 2, 7, 8, 5]]
        across, down = torch.zeros_like(w), torch.zeros_like(w)
        across[:, :, [0, 3, 6]] = self.across.weight
        across[:, :, [2, 5, 8]] = -self.across.weight
        down[:, :, [0, 1, 2]] = self.down.weight
        down[:, :, [6, 7, 8]] = -self.down.weight
        kernel = (central + angular + across + down).view(self.plain.weight.shape) + self.plain.weight
        layers = (self.central, self.angular, self.across, self.down, self.plain)
        return F.conv2d(x, kernel, sum(layer.bias for layer in layers), padding=1)


class ScaleLayer(nn.Module):
    """A vector that the input is multiplied by, viewed along the channels at each call."""

    def __init__(self, c):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c))

    def forward(self, x):
        return x * self.weight.view(1, -1, 1, 1)


class LinearAdd(nn.Module):
    """RepOptimizer's block of the hyper-search."""

    def __init__(self, c1=4, c2=4, stride=1):
        super().__init__()
        self.conv, self.scale_conv = nn.Conv2d(c1, c2, 3, stride, 1, bias=False), ScaleLayer(c2)
        self.conv_1x1, self.scale_1x1 = nn.Conv2d(c1, c2, 1, stride, bias=False), ScaleLayer(c2)
        if c1 == c2 and stride == 1:
            self.scale_identity = ScaleLayer(c2)
        self.bn, self.relu = nn.BatchNorm2d(c2), nn.ReLU()

    def forward(self, x):
        out = self.scale_conv(self.conv(x)) + self.scale_1x1(self.conv_1x1(x))
        if hasattr(self, "scale_identity"):
            out += self.scale_identity(x)
        return self.relu(self.bn(out))


class Compacted(nn.Module):
    """ResRep's bottleneck: a compactor behind the norms of the first two convolutions."""

    def __init__(self, c=8, inner=4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.pwc1 = nn.Conv2d(inner, inner, 1, bias=False)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, 2, 1, bias=False), nn.BatchNorm2d(inner)
        self.pwc2 = nn.Conv2d(inner, inner, 1, bias=False)

    def forward(self, x):
        x = F.relu(self.pwc1(self.bn1(self.conv1(x))))
        return F.relu(self.pwc2(self.bn2(self.conv2(x))))


class Adapted(nn.Module):
    """RepAdapter in front of a pointwise convolution, its second layer in groups."""

    def __init__(self, c=8, hidden=2, out=12):
        super().__init__()
        self.conv_A, self.conv_B = nn.Conv2d(c, hidden, 1), nn.Conv2d(hidden, c, 1, groups=2)
        self.dropout, self.scale, self.fc1 = nn.Dropout(0.1), 0.7, nn.Conv2d(c, out, 1)

    def forward(self, x):
        return F.gelu(self.fc1(self.conv_B(self.dropout(self.conv_A(x))) * self.scale + x))


class Implicit(nn.Module):
    """YOLOR's vector, which is added or multiplied by."""

    def __init__(self, c, times):
        super().__init__()
        self.times = times
        self.implicit = nn.Parameter(torch.zeros(1, c, 1, 1))

    def forward(self, x):
        return self.implicit * x if self.times else self.implicit + x


class Head(nn.Module):
    """A detector's, one convolution for each of two scales."""

    def __init__(self):
        super().__init__()
        self.m = nn.ModuleList(nn.Conv2d(c, 6, 1) for c in (4, 8))
        self.ia = nn.ModuleList(Implicit(c, times=False) for c in (4, 8))
        self.im = nn.ModuleList(Implicit(6, times=True) for _ in range(2))

    def forward(self, x, y):
        found = [x, y]
        for i in range(2):
            found[i] = self.im[i](self.m[i](self.ia[i](found[i]))).sigmoid()
        return found


class Vanilla(nn.Module):
    """VanillaNet's, whose activation is an attribute that training moves to 1."""

    def __init__(self, c1=4, c2=8, act_learn=1):
        super().__init__()
        self.act_learn = act_learn
        self.conv1 = nn.Sequential(nn.Conv2d(c1, c1, 1), nn.BatchNorm2d(c1, eps=1e-6))
        self.conv2 = nn.Sequential(nn.Conv2d(c1, c2, 1), nn.BatchNorm2d(c2, eps=1e-6))
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        x = self.conv1(x)
        x = torch.nn.functional.leaky_relu(x, self.act_learn)
        return self.pool(self.conv2(x)).relu()


class ConvLoRA(nn.Module):
    """A convolution and two matrices, whose product is viewed as its kernel."""

    def __init__(self, c1=4, c2=6, k=3, r=2):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, padding=1)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(r * k, c1 * k)), nn.Parameter(torch.randn(c2 * k, r * k))
        self.scaling = 0.5

    def forward(self, x):
        delta = (self.lora_B @ self.lora_A).view(self.conv.weight.shape) * self.scaling
        return self.conv._conv_forward(x, self.conv.weight + delta, self.conv.bias)


class RSBB(nn.Module):
    """RepSPKNet's: a 3x3, a dilated one and a norm, which are a 5x5."""

    def __init__(self, c=4):
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))
        self.dilated = nn.Sequential(nn.Conv2d(c, c, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(c))
        self.identity = nn.BatchNorm2d(c)

    def forward(self, x):
        return F.relu(self.dense(x) + self.dilated(x) + self.identity(x))


class Grown(nn.Module):
    """DyRep's, which grew twice: one of its branches has a block where its convolution was."""

    def __init__(self, c=4):
        super().__init__()
        self.ops = nn.ModuleList(self.branch(c, k, p) for k, p in ((3, 1), (1, 0), ((1, 3), (0, 1))))
        self.inner = nn.ModuleList(self.branch(c, k, p) for k, p in ((3, 1), ((3, 1), (1, 0))))
        self.bn, self.identity = nn.BatchNorm2d(c), nn.BatchNorm2d(c)

    def branch(self, c, k, p):
        return nn.Sequential(nn.Conv2d(c, c, k, padding=p, bias=False), nn.BatchNorm2d(c))

    def forward(self, x):
        out = [op(x) for op in self.ops] + [self.identity(x)]
        out.append(self.bn(sum(op(x) for op in self.inner)))
        return torch.stack(out).sum(0).relu()
