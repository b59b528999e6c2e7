"""DiracNet (arXiv:1706.00388) by other hands."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn


class DiracConv(nn.Module):
    """What the layers share; a delta in a buffer, alpha and beta learned."""

    def setup(self):
        delta = torch.zeros(self.weight.shape)
        middle = tuple(k // 2 for k in self.kernel_size)
        for i in range(min(self.in_channels, self.out_channels)):
            delta[(i, i, *middle)] = 1.0
        self.register_buffer("delta", delta)
        self.alpha = nn.Parameter(torch.ones(self.out_channels))
        self.beta = nn.Parameter(torch.full((self.out_channels,), 0.1))
        self.v = (-1,) + (1,) * (self.weight.dim() - 1)

    def transform_weight(self):
        return self.alpha.view(*self.v) * self.delta + self.beta.view(*self.v) * self.normed(self.weight)

    def normed(self, w):
        return F.normalize(w.flatten(1)).view_as(w)


class Inherited1d(nn.Conv1d, DiracConv):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.setup()

    def forward(self, input):
        return F.conv1d(input, self.transform_weight(), self.bias, self.stride, self.padding, self.dilation)


class Inherited2d(nn.Conv2d, DiracConv):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.setup()

    def forward(self, input):
        return F.conv2d(input, self.transform_weight(), self.bias, self.stride, self.padding, self.dilation)


class Inherited3d(nn.Conv3d, DiracConv):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.setup()

    def forward(self, input):
        return F.conv3d(input, self.transform_weight(), self.bias, self.stride, self.padding, self.dilation)


class Divided(Inherited2d):
    """w / w.norm, and the convolution through the parent's own _conv_forward."""

    def normed(self, w):
        return w / w.view(w.size(0), -1).norm(2, 1).view(-1, 1, 1, 1).clamp(min=1e-12)

    def forward(self, input):
        return self._conv_forward(input, self.transform_weight(), self.bias)


class ByHand(Inherited2d):
    """The norm from squares, in one line."""

    def normed(self, w):
        return w * w.pow(2).sum((1, 2, 3), keepdim=True).rsqrt()


class RuntimeDelta(nn.Module):
    """dirac_ in every forward, parameters under other names, linalg norm."""

    def __init__(self, c1, c2, k=3):
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(c2, c1, k, k))
        self.a, self.b = nn.Parameter(torch.ones(c2, 1, 1, 1)), nn.Parameter(torch.ones(c2, 1, 1, 1))
        self.pad = k // 2

    def forward(self, x):
        eye = nn.init.dirac_(torch.empty_like(self.kernel))
        w = self.kernel / torch.linalg.vector_norm(self.kernel, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, self.a * eye + self.b * w, padding=self.pad)


class BeforeNorm(nn.Module):
    """norm(conv(relu(x))), as the paper orders them."""

    def __init__(self, c):
        super().__init__()
        self.dirac = Inherited2d(c, c, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(c)

    def forward(self, x):
        return self.bn(self.dirac(F.relu(x)))


class DictNet(nn.Module):
    """A functional network whose parameters lie in dicts; conv(relu(x)), norm, pool, fc."""

    def __init__(self, widths=(4, 6, 6), classes=5):
        super().__init__()
        self.params, self.stats = nn.ParameterDict(), {}
        pairs = list(itertools.pairwise(widths))
        for i, (c1, c2) in enumerate(pairs):
            self.params[f"conv{i}_w"] = nn.Parameter(torch.zeros(c2, c1, 3, 3))
            self.params[f"conv{i}_alpha"] = nn.Parameter(torch.ones(c2))
            self.params[f"conv{i}_beta"] = nn.Parameter(torch.ones(c2))
            self.params[f"bn{i}_weight"] = nn.Parameter(torch.ones(c2))
            self.params[f"bn{i}_bias"] = nn.Parameter(torch.zeros(c2))
            self.register_buffer(f"bn{i}_mean", torch.zeros(c2))
            self.register_buffer(f"bn{i}_var", torch.ones(c2))
            self.register_buffer(f"delta{i}", nn.init.dirac_(torch.zeros(c2, c1, 3, 3)))
        self.params["fc_w"], self.params["fc_b"] = (
            nn.Parameter(torch.zeros(classes, widths[-1])),
            nn.Parameter(torch.zeros(classes)),
        )
        self.depth = len(pairs)

    def block(self, x, i):
        p = self.params
        w = p[f"conv{i}_w"]
        w = p[f"conv{i}_beta"].view(-1, 1, 1, 1) * F.normalize(w.reshape(w.shape[0], -1)).view_as(w)
        w = w + p[f"conv{i}_alpha"].view(-1, 1, 1, 1) * getattr(self, f"delta{i}")
        y = F.conv2d(F.relu(x), w, padding=1)
        return F.batch_norm(
            y, getattr(self, f"bn{i}_mean"), getattr(self, f"bn{i}_var"), p[f"bn{i}_weight"], p[f"bn{i}_bias"], False
        )

    def forward(self, x):
        for i in range(self.depth):
            x = self.block(x, i)
        x = F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1)
        return F.linear(x, self.params["fc_w"], self.params["fc_b"])
