"""RepVGG (arXiv:2101.03697) by other hands."""

import functools
import operator

import torch
import torch.nn.functional as F
from torch import nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def conv_bn(c1, c2, k, stride=1, padding=0, groups=1, **more):
    seq = nn.Sequential()
    seq.add_module("conv", nn.Conv2d(c1, c2, k, stride, padding, groups=groups, bias=False, **more))
    seq.add_module("bn", nn.BatchNorm2d(c2))
    return seq


class Official(nn.Module):
    """In the manner of the paper's own code: attributes asked for with hasattr, None where there is no identity."""

    def __init__(self, c1, c2, stride=1, groups=1, deploy=False):
        super().__init__()
        self.deploy, self.groups, self.in_channels = deploy, groups, c1
        self.nonlinearity = nn.ReLU()
        self.se = nn.Identity()
        if deploy:
            self.rbr_reparam = nn.Conv2d(c1, c2, 3, stride, 1, groups=groups)
        else:
            self.rbr_identity = nn.BatchNorm2d(c1) if c1 == c2 and stride == 1 else None
            self.rbr_dense = conv_bn(c1, c2, 3, stride, 1, groups)
            self.rbr_1x1 = conv_bn(c1, c2, 1, stride, 0, groups)

    def forward(self, inputs):
        if hasattr(self, "rbr_reparam"):
            return self.nonlinearity(self.se(self.rbr_reparam(inputs)))
        id_out = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        return self.nonlinearity(self.se(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out))


class Summed(nn.Module):
    """Branches in a ModuleList, added with the builtin sum."""

    def __init__(self, c, dims=2, k=3, dilation=1):
        super().__init__()
        pad = dilation * (k - 1) // 2
        self.paths = nn.ModuleList(
            [
                nn.Sequential(CONV[dims](c, c, k, padding=pad, dilation=dilation), NORM[dims](c)),
                nn.Sequential(CONV[dims](c, c, 1, bias=False), NORM[dims](c)),
                NORM[dims](c),
            ]
        )

    def forward(self, x):
        return sum(path(x) for path in self.paths)


class Accumulated(nn.Module):
    """out = 0, then out += branch(x), then the skip, as MobileOne does."""

    def __init__(self, c1, c2, stride=1):
        super().__init__()
        self.n = 1
        for i in range(self.n):
            setattr(self, f"kxk_{i}", conv_bn(c1, c2, 3, stride, 1))
        self.scale = conv_bn(c1, c2, 1, stride)
        self.skip = nn.BatchNorm2d(c1) if c1 == c2 and stride == 1 else None

    def forward(self, x):
        out = 0
        for i in range(self.n):
            out += getattr(self, f"kxk_{i}")(x)
        out += self.scale(x)
        if self.skip is not None:
            out += self.skip(x)
        return torch.relu(out)


class Functional(nn.Module):
    """No submodules at all: parameters, buffers and torch.nn.functional."""

    def __init__(self, c):
        super().__init__()
        self.w3, self.w1 = nn.Parameter(torch.zeros(c, c, 3, 3)), nn.Parameter(torch.zeros(c, c, 1, 1))
        for n in "abc":
            self.register_parameter(f"{n}_gamma", nn.Parameter(torch.ones(c)))
            self.register_parameter(f"{n}_beta", nn.Parameter(torch.zeros(c)))
            self.register_buffer(f"{n}_mean", torch.zeros(c))
            self.register_buffer(f"{n}_var", torch.ones(c))

    def norm(self, x, n):
        stats = (getattr(self, f"{n}_{what}") for what in ("mean", "var", "gamma", "beta"))
        return F.batch_norm(x, *stats, training=self.training, momentum=0.1, eps=1e-3)

    def forward(self, x):
        y = self.norm(F.conv2d(x, self.w3, padding=1), "a")
        y = y + self.norm(F.conv2d(x, self.w1), "b") + self.norm(x, "c")
        return F.relu(y, inplace=True)


class FrozenNorm(nn.Module):
    """Batch norm as arithmetic on buffers, as detection code has it."""

    def __init__(self, c, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight_scale", torch.ones(c))
        self.register_buffer("bias_shift", torch.zeros(c))
        self.register_buffer("running_mean", torch.zeros(c))
        self.register_buffer("running_var", torch.ones(c))

    def forward(self, x):
        w = self.weight_scale.reshape(1, -1, 1, 1)
        b = self.bias_shift.reshape(1, -1, 1, 1)
        rv = self.running_var.reshape(1, -1, 1, 1)
        rm = self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + self.eps).rsqrt()
        return x * scale + (b - rm * scale)


class Frozen(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c3, self.n3 = nn.Conv2d(c, c, 3, 1, 1, bias=False), FrozenNorm(c)
        self.c1, self.n1 = nn.Conv2d(c, c, 1, bias=False), FrozenNorm(c)
        self.n0 = FrozenNorm(c)

    def forward(self, x):
        return self.n3(self.c3(x)).add(self.n1(self.c1(x))).add_(self.n0(x))


class MyBN(nn.BatchNorm2d):
    """A subclass that changes defaults only."""

    def __init__(self, c):
        super().__init__(c, eps=1e-3, momentum=0.03)


class MyConv(nn.Conv2d):
    def __init__(self, c1, c2, k, **more):
        super().__init__(c1, c2, k, padding=k // 2, bias=False, **more)


class ConvBN(nn.Module):
    def __init__(self, c1, c2, k, s=1, g=1, norm=MyBN):
        super().__init__()
        self.c = MyConv(c1, c2, k, stride=s, groups=g)
        self.b = norm(c2)

    def forward(self, x):
        return self.b(self.c(x))


class Subclassed(nn.Module):
    """One's own layer types, reduced with functools."""

    def __init__(self, c1, c2, s=1, g=1):
        super().__init__()
        self.branches = nn.ModuleDict({"big": ConvBN(c1, c2, 3, s, g), "small": ConvBN(c1, c2, 1, s, g)})
        if c1 == c2 and s == 1:
            self.branches["none"] = MyBN(c1)

    def forward(self, x):
        return functools.reduce(operator.add, [f(x) for f in self.branches.values()])


class SequentialConvBN(nn.Sequential):
    """Itself a Sequential, as LeViT's is."""

    def __init__(self, c1, c2, k=1, s=1, p=0, g=1):
        super().__init__()
        self.add_module("c", nn.Conv2d(c1, c2, k, s, p, groups=g, bias=False))
        self.add_module("bn", nn.BatchNorm2d(c2))


class TorchAdd(nn.Module):
    """torch.add with keywords, a bare residual, the identity first."""

    def __init__(self, c, g=1):
        super().__init__()
        self.conv, self.conv1 = SequentialConvBN(c, c, 3, 1, 1, g), SequentialConvBN(c, c, 1, g=g)

    def forward(self, x):
        return torch.add(x, torch.add(input=self.conv(x), other=self.conv1(x)))


class PostNorm(nn.Module):
    """QARepVGG: a norm after the sum, plain convs and the input inside."""

    def __init__(self, c):
        super().__init__()
        self.d, self.p, self.n = conv_bn(c, c, 3, 1, 1), conv_bn(c, c, 1), nn.BatchNorm2d(c)

    def forward(self, x):
        return F.relu(self.n(self.d(x) + self.p(x) + x))


class Cropped(nn.Module):
    """No padding on the dense conv: the 1x1 reads a cropped input."""

    def __init__(self, c):
        super().__init__()
        self.d, self.p = conv_bn(c, c, 3), conv_bn(c, c, 1)

    def forward(self, x):
        return self.d(x) + self.p(x[:, :, 1:-1, 1:-1])


class Reflected(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.d, self.p = conv_bn(c, c, 3, 1, 1, padding_mode="reflect"), conv_bn(c, c, 1)
        self.i = nn.BatchNorm2d(c, affine=False)

    def forward(self, x):
        return self.d(x) + (self.p(x) + self.i(x))


class Unfolded(nn.Module):
    """Conv and norm kept apart, called one by one with intermediate names; a strange kernel."""

    def __init__(self, c1, c2, stride=(1, 2)):
        super().__init__()
        self.conv_a = nn.Conv2d(c1, c2, (3, 5), stride, (1, 2))
        self.conv_b = nn.Conv2d(c1, c2, 1, stride)
        self.bn_a, self.bn_b = nn.SyncBatchNorm(c2), nn.BatchNorm2d(c2)
        self.act = nn.SiLU(inplace=True)

    def forward(self, feature):
        a = self.conv_a(feature)
        a = self.bn_a(a)
        b = self.conv_b(feature)
        b = self.bn_b(b)
        out = a + b
        out = self.act(out)
        return out


class Stacked(nn.Module):
    """torch.stack(...).sum(0); may be refused."""

    def __init__(self, c):
        super().__init__()
        self.branches = nn.ModuleList([conv_bn(c, c, 3, 1, 1), conv_bn(c, c, 1)])

    def forward(self, x):
        return torch.stack([b(x) for b in self.branches]).sum(0)


class WithSE(nn.Module):
    """Squeeze and excitation between the sum and the activation; the block inside a class of its own."""

    class Squeeze(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.down, self.up = nn.Conv2d(c, 2, 1), nn.Conv2d(2, c, 1)

        def forward(self, x):
            g = F.adaptive_avg_pool2d(x, 1)
            g = torch.sigmoid(self.up(F.relu(self.down(g), inplace=True)))
            return x * g.view(-1, x.shape[1], 1, 1)

    def __init__(self, c):
        super().__init__()
        self.block = Official(c, c)
        self.block.se = WithSE.Squeeze(c)

    def forward(self, x):
        return self.block(x)
