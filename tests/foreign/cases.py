"""Every foreign implementation with what is expected of it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from tests.foreign import acnet, diracnet, doconv, expandnet, networks, repvgg


@dataclass(frozen=True)
class Case:
    """One model, and what its deploy form runs.

    Args:
        rules: names of which each must be in the plan.
        channels, dims: of its one input.
        after: convs, linears, norms and additions that one call of the deploy model runs; None where not counted.
        sizes: spatial sizes to try; those that the training-time model rejects are left out.
    """

    name: str
    make: Callable[[], nn.Module]
    rules: tuple[str, ...]
    channels: int
    after: dict[str, int]
    dims: int = 2

    def __str__(self) -> str:
        return self.name

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        if not self.dims:
            return [()]
        return [(n, n + 1, n + 2)[: self.dims] for n in (7, 1, 2, 4)] + [(9, 3, 5)[: self.dims], (1, 8, 2)[: self.dims]]


ONE_CONV = {"conv": 1, "linear": 0, "norm": 0, "add": 0}


def _case(family: str, rule: str | tuple[str, ...]):
    def case(name, make, channels=4, dims=2, **after):
        rules = (rule,) if isinstance(rule, str) else rule
        return Case(f"{family}-{name}", make, rules, channels, {**ONE_CONV, **after}, dims)

    return case


_rep = _case("repvgg", "repvgg")
_ac = _case("acnet", "acb")
_dirac = _case("diracnet", "diracnet")
_do = _case("doconv", "doconv")
_cl = _case("expandnet", "expandnet")
_ck = _case("expandnet-ck", "expandnet_ck")
_fc = _case("expandnet-fc", "expandnet_fc")

BLOCKS = [
    _rep("official", lambda: repvgg.Official(4, 4)),
    _rep("official-stride2", lambda: repvgg.Official(4, 6, stride=2)),
    _rep("official-widening", lambda: repvgg.Official(4, 6)),
    _rep("official-groups2", lambda: repvgg.Official(4, 4, groups=2)),
    _rep("official-groups4-stride2", lambda: repvgg.Official(8, 4, stride=2, groups=4), 8),
    _rep("official-depthwise", lambda: repvgg.Official(4, 4, groups=4)),
    _rep("sum-1d", lambda: repvgg.Summed(3, dims=1, k=5), 3, 1),
    _rep("sum-2d", lambda: repvgg.Summed(3), 3),
    _rep("sum-2d-dilated", lambda: repvgg.Summed(3, k=3, dilation=2), 3),
    _rep("sum-3d", lambda: repvgg.Summed(2, dims=3), 2, 3),
    _rep("accumulated", lambda: repvgg.Accumulated(4, 4)),
    _rep("accumulated-stride2", lambda: repvgg.Accumulated(4, 5, 2)),
    _rep("functional", lambda: repvgg.Functional(4)),
    _rep("frozen-norm-arithmetic", lambda: repvgg.Frozen(4)),
    _rep("subclassed", lambda: repvgg.Subclassed(4, 4)),
    _rep("subclassed-groups", lambda: repvgg.Subclassed(4, 8, 2, 2)),
    _rep("torch-add", lambda: repvgg.TorchAdd(4)),
    _rep("torch-add-groups", lambda: repvgg.TorchAdd(4, g=2)),
    _rep("post-norm", lambda: repvgg.PostNorm(4)),
    _rep("cropped", lambda: repvgg.Cropped(4)),
    _rep("reflected", lambda: repvgg.Reflected(4)),
    _rep("unfolded-rectangular", lambda: repvgg.Unfolded(4, 5)),
    _rep("with-se", lambda: repvgg.WithSE(4), conv=3),
    _ac("official", lambda: acnet.Official(4, 5, 3, padding=1)),
    _ac("official-stride2-groups", lambda: acnet.Official(4, 6, 3, 2, 1, groups=2, relu=True)),
    _ac("official-no-padding", lambda: acnet.Official(4, 5, 3)),
    _ac("official-5x5-crop", lambda: acnet.Official(4, 5, 5, padding=1)),
    _ac("official-over-padded", lambda: acnet.Official(4, 4, 3, padding=2)),
    _ac("official-depthwise", lambda: acnet.Official(4, 4, 5, padding=2, groups=4)),
    _ac("official-reflect", lambda: acnet.Official(4, 4, 3, padding=1, padding_mode="reflect")),
    _ac("official-no-affine", lambda: acnet.Official(4, 4, 3, padding=1, affine=False)),
    _ac("sliced", lambda: acnet.Sliced(4, 5)),
    _ac("sliced-ellipsis", lambda: acnet.EllipsisSliced(4, 5)),
    _ac("rectangular", lambda: acnet.Rectangular(4, 5)),
    _ac("rectangular-even", lambda: acnet.Rectangular(4, 5, (2, 4))),
    _ac("padded", lambda: acnet.Padded(4, 5)),
    _dirac("1d", lambda: diracnet.Inherited1d(4, 6, 3, padding=1), dims=1),
    _dirac("2d", lambda: diracnet.Inherited2d(4, 4, 3, padding=1)),
    _dirac("2d-even", lambda: diracnet.Inherited2d(6, 4, 4, padding=1, bias=False), 6),
    _dirac("3d", lambda: diracnet.Inherited3d(2, 3, 3, padding=1), 2, 3),
    _dirac("divided", lambda: diracnet.Divided(4, 6, 3, padding=1)),
    _dirac("by-hand", lambda: diracnet.ByHand(4, 6, 3, stride=2)),
    _dirac("runtime-delta", lambda: diracnet.RuntimeDelta(4, 6)),
    _dirac("before-norm", lambda: diracnet.BeforeNorm(4)),
    _dirac("dict-net", lambda: diracnet.DictNet(), conv=2, linear=1),
    _do("official", lambda: doconv.Official(4, 6, 3, padding=1)),
    _do("official-stride-dilation", lambda: doconv.Official(4, 6, 3, 2, 2, 2)),
    _do("official-groups", lambda: doconv.Official(4, 6, 3, padding=1, groups=2)),
    _do("official-depthwise", lambda: doconv.Official(4, 8, 3, padding=1, groups=4, bias=False)),
    _do("official-wide-D", lambda: doconv.Official(4, 6, 3, padding=1, D_mul=13)),
    _do("official-circular", lambda: doconv.Official(4, 4, 3, padding=1, mode="circular")),
    _do("official-rectangular", lambda: doconv.Official(4, 4, (3, 1), padding=(1, 0))),
    _do("inherited", lambda: doconv.Inherited(4, 6, 3, padding=1, padding_mode="replicate")),
    _do("bmm", lambda: doconv.Bmm(4, 6, 3, padding=1, groups=2)),
    _do("depthwise", lambda: doconv.Depthwise(4, stride=2)),
    _do("1d", lambda: doconv.Line(4, 3), dims=1),
    _do("3d-norm", lambda: doconv.Volume(2, 3), 2, 3),
    _do("composed-apart", lambda: doconv.Cached(4, 5)),
    _cl("sequential", lambda: expandnet.expand_cl(4, 5)),
    _cl("stride2", lambda: expandnet.expand_cl(4, 5, stride=2)),
    _cl("1d", lambda: expandnet.expand_cl(3, 4, 5, padding=2, dims=1), 3, 1),
    _cl("3d", lambda: expandnet.expand_cl(2, 3, 3, padding=1, dims=3, rate=2), 2, 3),
    _cl("depthwise", lambda: expandnet.expand_cl(4, 4, groups=4)),
    _cl("middle-no-bias", lambda: expandnet.expand_cl(4, 5, bias=False, where="middle")),
    _cl("named", lambda: expandnet.Named(3, 4), 3),
    _ck("7x7", lambda: expandnet.expand_ck(3, 4), 3),
    _ck("5x5-stride2", lambda: expandnet.expand_ck(3, 4, 2, padding=2, stride=2, bias=False), 3),
    _ck("looped", lambda: expandnet.Looped(3, 4), 3),
    _fc("sequential", lambda: nn.Sequential(nn.Linear(6, 24), nn.Linear(24, 20), nn.Linear(20, 5)), 6, 0,
        conv=0, linear=1),
    _fc("dense", lambda: expandnet.Dense(12), 12, 0, conv=0, linear=1),
]  # fmt: skip

_net = lambda name, make, *rules, **after: Case(f"net-{name}", make, rules, 3, {**ONE_CONV, **after})  # noqa: E731

NETWORKS = [
    _net("stages", networks.Stages, "repvgg", conv=8, linear=1, add=2),
    _net("all-five", networks.AllFive, "repvgg", "acb", "diracnet", "doconv", "expandnet", "expandnet_fc",
         conv=5, linear=1),
    _net("tiny-cifar", expandnet.TinyCifar, "expandnet", "expandnet_ck", "expandnet_fc", conv=3, linear=1),
    _net("pyramid", networks.Pyramid, "repvgg", conv=3 + 3 + 3 * 2, add=2),
]  # fmt: skip
