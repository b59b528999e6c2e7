"""ACNet (arXiv:1908.03930) by other hands."""

import torch.nn.functional as F
from torch import nn


class Cropping(nn.Module):
    def __init__(self, rows, cols):
        super().__init__()
        self.rows, self.cols = rows, cols

    def forward(self, input):
        h, w = self.rows, self.cols
        if h and w:
            return input[:, :, h:-h, w:-w]
        return input[:, :, h:-h, :] if h else input[:, :, :, w:-w] if w else input


class Official(nn.Module):
    """Square, vertical and horizontal; the asymmetric ones behind a cropping layer where the padding is small."""

    def __init__(self, c1, c2, k, stride=1, padding=0, groups=1, padding_mode="zeros", affine=True, relu=False):
        super().__init__()
        self.square_conv = nn.Conv2d(c1, c2, k, stride, padding, groups=groups, bias=False, padding_mode=padding_mode)
        self.square_bn = nn.BatchNorm2d(c2, affine=affine)
        crop = k // 2 - padding
        over = max(-crop, 0)
        self.ver_conv_crop_layer = Cropping(0, crop) if crop > 0 else nn.Identity()
        self.hor_conv_crop_layer = Cropping(crop, 0) if crop > 0 else nn.Identity()
        ver_pad, hor_pad = ((padding, 0), (0, padding)) if crop > 0 else ((padding, over), (over, padding))
        more = dict(stride=stride, groups=groups, bias=False, padding_mode=padding_mode)
        self.ver_conv = nn.Conv2d(c1, c2, (k, 1), padding=ver_pad, **more)
        self.hor_conv = nn.Conv2d(c1, c2, (1, k), padding=hor_pad, **more)
        self.ver_bn, self.hor_bn = nn.BatchNorm2d(c2, affine=affine), nn.BatchNorm2d(c2, affine=affine)
        self.nonlinear = nn.ReLU() if relu else None

    def forward(self, input):
        if hasattr(self, "fused_conv"):
            return self.fused_conv(input)
        square = self.square_bn(self.square_conv(input))
        vertical = self.ver_bn(self.ver_conv(self.ver_conv_crop_layer(input)))
        horizontal = self.hor_bn(self.hor_conv(self.hor_conv_crop_layer(input)))
        result = square + vertical + horizontal
        return result if self.nonlinear is None else self.nonlinear(result)


class Sliced(nn.Module):
    """Crops written as slices in the forward itself."""

    def __init__(self, c1, c2, k=5, padding=1):
        super().__init__()
        self.c = k // 2 - padding
        self.sq = nn.Sequential(nn.Conv2d(c1, c2, k, padding=padding), nn.BatchNorm2d(c2))
        self.v = nn.Sequential(nn.Conv2d(c1, c2, (k, 1), padding=(padding, 0)), nn.BatchNorm2d(c2))
        self.h = nn.Sequential(nn.Conv2d(c1, c2, (1, k), padding=(0, padding)), nn.BatchNorm2d(c2))

    def forward(self, x):
        c = self.c
        y = self.h(x[:, :, c:-c, :])
        y += self.v(x[:, :, :, c:-c])
        y += self.sq(x)
        return y


class EllipsisSliced(nn.Module):
    """Crops as x[..., c:-c] and as slices that stop at a computed size."""

    def __init__(self, c1, c2):
        super().__init__()
        self.sq = nn.Sequential(nn.Conv2d(c1, c2, 3), nn.BatchNorm2d(c2))
        self.v = nn.Sequential(nn.Conv2d(c1, c2, (3, 1)), nn.BatchNorm2d(c2))
        self.h = nn.Sequential(nn.Conv2d(c1, c2, (1, 3)), nn.BatchNorm2d(c2))

    def forward(self, x):
        return self.sq(x) + self.v(x[..., 1:-1]) + self.h(x[..., 1:-1, :])


class Rectangular(nn.Module):
    """A 3x5 skeleton, "same" padding, branches zipped."""

    def __init__(self, c1, c2, kernel=(3, 5)):
        super().__init__()
        shapes = [kernel, (kernel[0], 1), (1, kernel[1])]
        self.convs = nn.ModuleList(nn.Conv2d(c1, c2, s, padding="same") for s in shapes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c2) for _ in shapes)

    def forward(self, x):
        total = 0
        for conv, norm in zip(self.convs, self.norms, strict=True):
            total = total + norm(conv(x))
        return F.relu(total)


class Padded(nn.Module):
    """Every pad and crop by F.pad, negative where it crops."""

    def __init__(self, c1, c2):
        super().__init__()
        self.k3, self.k31, self.k13 = nn.Conv2d(c1, c2, 3), nn.Conv2d(c1, c2, (3, 1)), nn.Conv2d(c1, c2, (1, 3))
        self.n3, self.n31, self.n13 = nn.BatchNorm2d(c2), nn.BatchNorm2d(c2), nn.BatchNorm2d(c2)

    def forward(self, x):
        padded = F.pad(x, (1, 1, 1, 1))
        return (
            self.n3(self.k3(padded))
            + self.n31(self.k31(F.pad(x, (0, 0, 1, 1))))
            + self.n13(self.k13(F.pad(padded, [0, 0, -1, -1])))
        )
