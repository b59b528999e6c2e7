"""Small whole networks that mix the families, in the manners that real code has."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from tests.foreign import acnet, diracnet, doconv, expandnet, repvgg


class Stages(nn.Module):
    """A RepVGG: stem, stages in a ModuleList of ModuleLists, SE in the last, residuals, a dict out."""

    def __init__(self, widths=(4, 6, 8), classes=5):
        super().__init__()
        self.stem = repvgg.Official(3, widths[0], stride=2)
        self.stages = nn.ModuleList()
        for c1, c2 in itertools.pairwise(widths):
            self.stages.append(nn.ModuleList([repvgg.Official(c1, c2, 2), repvgg.Official(c2, c2, groups=2)]))
        self.last = repvgg.WithSE(widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def forward_features(self, x):
        kept = [self.stem(x)]
        for down, block in self.stages:
            y = down(kept[-1])
            kept.append(y + block(y))
        return kept

    def forward(self, x):
        kept = self.forward_features(x)
        y = self.last(kept[-1])
        return {"logits": self.head(y.mean((-2, -1))), "features": tuple(kept)}


class AllFive(nn.Module):
    """One block of every family, in a Sequential with names."""

    def __init__(self, classes=4):
        super().__init__()
        self.body = nn.Sequential()
        self.body.add_module("stem", doconv.Official(3, 8, 3, padding=1, stride=2))
        self.body.add_module("stem_act", nn.ReLU(inplace=True))
        self.body.add_module("rep", repvgg.Subclassed(8, 8))
        self.body.add_module("rep_act", nn.ReLU(inplace=True))
        self.body.add_module("ac", acnet.Official(8, 8, 3, padding=1, relu=True))
        self.body.add_module("dirac", diracnet.BeforeNorm(8))
        self.body.add_module("expand", expandnet.expand_cl(8, 6))
        self.classifier = expandnet.Dense(6, classes)

    def forward(self, x):
        return self.classifier(F.adaptive_avg_pool2d(self.body(x), 1))


class TwoInputs(nn.Module):
    """An image and a guide, keyword-only flags, a dataclass-free tuple out."""

    def __init__(self):
        super().__init__()
        self.image, self.guide = repvgg.Accumulated(3, 4), acnet.Sliced(2, 4, 5, 1)
        self.fuse = repvgg.TorchAdd(4)

    def forward(self, image, guide, mask=None, *, scale=1.0, return_guide=False):
        y, g = self.image(image), self.guide(guide)
        g = F.interpolate(g, size=y.shape[-2:], mode="nearest")
        z = self.fuse(torch.sigmoid(g) * y)
        if mask is not None:
            z = z.masked_fill(mask, 0.0)
        z = z * scale
        return (z, g) if return_guide else (z,)


class Pyramid(nn.Module):
    """Features of several levels, upsampled, concatenated, with a shared head on each."""

    def __init__(self, c=4):
        super().__init__()
        self.downs = nn.ModuleList([repvgg.Official(3 if i == 0 else c, c, 2) for i in range(3)])
        self.lateral = nn.ModuleList([repvgg.ConvBN(c, c, 1) for _ in range(3)])
        self.head = nn.Sequential(repvgg.Summed(c), nn.ReLU(), nn.Conv2d(c, 2, 1))

    def forward(self, x):
        levels = []
        for down, lateral in zip(self.downs, self.lateral, strict=True):
            x = down(x)
            levels.append(lateral(x))
        top = [levels.pop()]
        while levels:
            below = levels.pop()
            top.insert(0, below + F.interpolate(top[0], size=below.shape[2:]))
        return [self.head(level) for level in top]
