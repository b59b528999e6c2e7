"""Where the models of `benchmarks.published` come from: repositories of papers, how each builds its model and converts
it itself. Everything is imported by name when it is used, from a folder with clones of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

Shape = tuple[int, ...]
Convert = Callable[[Any], "nn.Module | None"]  # in place, or a new model
SMALL = {"num_blocks": [2, 2, 2, 1], "num_classes": 10, "width_multiplier": [0.25, 0.25, 0.25, 0.25]}
METHODS = (
    "switch_to_deploy",
    "fuse_model",
    "merge_kernel",
    "merge_dilated_branches",
    "reparameterize",
    "update_params",
)


@dataclass(frozen=True)
class Published:
    """One model of a repository.

    Args:
        folder: of the clone, and in it, that its imports are relative to.
        make: the model.
        theirs: the repository's own conversion, if it has one.
        shape: of an input.
        absent: modules that it imports and that no forward calls.
    """

    folder: str
    make: Callable[[], Any]
    theirs: Convert | None
    shape: Shape = (1, 3, 64, 64)
    absent: tuple[str, ...] = ()


def of(module: str, name: str, *args: Any, **settings: Any) -> Callable[[], Any]:
    """What makes a model by a function or class of a module."""
    return lambda: getattr(import_module(module), name)(*args, **settings)


def each(*names: str) -> Convert:
    """Calls, of each part that has one, the method by the first of these names."""

    def convert(model: nn.Module) -> None:
        for part in list(model.modules()):
            name = next((name for name in names or METHODS if hasattr(part, name)), None)
            if name is not None:
                getattr(part, name)()

    return convert


def whole(name: str) -> Convert:
    return lambda model: getattr(model, name)()


def by(module: str, name: str) -> Convert:
    return lambda model: getattr(import_module(module), name)(model)


def fused(model: nn.Module) -> None:
    """`fuse` of each part, which gives what takes its place, as LeViT's descendants do it."""
    for name, child in model.named_children():
        if hasattr(child, "fuse"):
            child = child.fuse()
            setattr(model, name, child)
        fused(child)


def _dyrep(nested: bool) -> Any:
    blocks = import_module("lib.models.utils.dbb.dbb_block")
    model = nn.Sequential(*(blocks.DiverseBranchBlock(8, 8, 3, padding=1, branches=[1] * 7) for _ in range(2)))
    if nested:
        for part in list(model.modules()):
            if hasattr(part, "dbb_kxk"):
                part.dbb_kxk.conv = blocks.DiverseBranchBlock(8, 8, 3, padding=1, branches=[1] * 7)
    return model


def _dbb(kind: str, arch: str) -> Any:
    utils = import_module("convnet_utils")
    utils.switch_conv_bn_impl(kind)
    return utils.build_model(arch)


def _qarep(block: str) -> Any:
    module = import_module("repvgg")
    return module.RepVGG(**SMALL, block_cls=getattr(module, block))


def _repmlp() -> Any:
    net = import_module("repmlpnet").RepMLPNet
    return net(num_class=10, num_blocks=(1, 1, 1, 1), channels=(16, 24, 32, 48), hs=(16, 8, 4, 2), ws=(16, 8, 4, 2),
               sharesets_nums=(1, 4, 8, 16), reparam_conv_k=(1, 3))  # fmt: skip


def _ecbsr(**settings: Any) -> Any:
    usual = {"module_nums": 3, "channel_nums": 8, "with_idt": False, "act_type": "prelu", "scale": 2, "colors": 1}
    return import_module("models.ecbsr").ECBSR(**usual | settings)


def _doconv() -> Any:
    DOConv2d = import_module("do_conv_pytorch_1_10").DOConv2d
    norm = nn.BatchNorm2d
    return nn.Sequential(
        DOConv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(), DOConv2d(8, 8, 3, padding=1, groups=2), norm(8)
    )


def _ligru(kind: str, **settings: Any) -> Any:
    return getattr(import_module("speechbrain.nnet.RNN"), kind)(
        hidden_size=8, input_shape=(4, 10, 6), num_layers=2, **settings
    )


ESR = "NTIRE2025_ESR"
_esr = lambda team, name, **settings: of(f"models.{team}", name, **settings)  # noqa: E731
_qa = {
    f"QARepVGG:{block}": Published("QARepVGG", lambda block=block: _qarep(block), each("switch_to_deploy"))
    for block in ("RepVGGBlock", "GRERepVGGBlock", "GRERepVGGBlockV0", "QARepVGGBlock", "QARepVGGBlockV1",
                  "QARepVGGBlockV2", "QARepVGGBlockV3", "QARepVGGBlockV4", "QARepVGGBlockV5", "QARepVGGBlockV8",
                  "QARepVGGBlockV10", "QARepVGGBlockV11", "GRERepVGGBlockV2")
}  # fmt: skip

PUBLISHED: dict[str, Published] = {
    "DyRep:block": Published("image_classification_sota", lambda: _dyrep(False), None, (1, 8, 12, 12)),
    "DyRep:nested": Published("image_classification_sota", lambda: _dyrep(True), None, (1, 8, 12, 12)),
    "RepMLP:RepMLPNet": Published("RepMLP", _repmlp, each("locality_injection")),
    "RepLKNet:31B": Published(
        "RepLKNet-pytorch",
        of(
            "replknet",
            "RepLKNet",
            large_kernel_sizes=[13, 11, 9, 7],
            layers=[1, 1, 2, 1],
            channels=[16, 32, 48, 64],
            drop_path_rate=0.1,
            small_kernel=5,
            num_classes=10,
        ),
        whole("structural_reparam"),
    ),
    "UniRepLKNet:A": Published(
        "UniRepLKNet",
        of("unireplknet", "UniRepLKNet", depths=(2, 2, 6, 2), dims=(16, 32, 64, 96), num_classes=10),
        whole("reparameterize_unireplknet"),
    ),
    "MobileOne:s0": Published(
        "ml-mobileone", of("mobileone", "mobileone", 10, variant="s0"), by("mobileone", "reparameterize_model")
    ),
    "MobileOne:s4": Published(
        "ml-mobileone", of("mobileone", "mobileone", 10, variant="s4"), by("mobileone", "reparameterize_model")
    ),
    **{
        f"FastViT:{name}": Published(
            "ml-fastvit",
            of("models.fastvit", f"fastvit_{name}"),
            by("models.modules.mobileone", "reparameterize_model"),
            absent=("mmdet", "mmseg"),
        )
        for name in ("t8", "sa12")
    },
    **_qa,
    "RepViT:m0_6": Published("RepViT/model", of("repvit", "repvit_m0_6", num_classes=10), fused),
    "RepViT:m0_9 distilled": Published(
        "RepViT/model", of("repvit", "repvit_m0_9", num_classes=10, distillation=True), fused
    ),
    **{
        f"RepNeXt:{name}": Published("RepNeXt/model", of("repnext", f"repnext_{name}", num_classes=10), fused)
        for name in ("m0", "m1")
    },
    **{
        f"RepGhost:{name}": Published(
            "RepGhost", of("model.repghost", f"repghostnet_{name}"), by("model.repghost", "repghost_model_convert")
        )
        for name in ("0_5x", "repid_0_5x", "norep_0_5x", "wo_0_5x")
    },
    "ECBSR": Published("ECBSR", lambda: _ecbsr(colors=1), None, (1, 1, 16, 16)),
    "ECBSR:identity": Published("ECBSR", lambda: _ecbsr(with_idt=True, colors=1), None, (1, 1, 16, 16)),
    "SPAN": Published(
        "SPAN/basicsr/archs",
        of("span_arch", "SPAN", 3, 3, feature_channels=16),
        each("update_params"),
        (1, 3, 16, 16),
        ("basicsr.utils", "basicsr.utils.registry"),
    ),
    "ACNet:block": Published(
        "ACNet",
        lambda: nn.Sequential(*(import_module("acnet.acb").ACBlock(4, 4, 3, padding=1) for _ in range(3))),
        each("switch_to_deploy"),
        (1, 4, 16, 16),
        ("base_config", "builder"),
    ),
    **{
        f"DBB:{kind} {arch}": Published(
            "DiverseBranchBlock", lambda kind=kind, arch=arch: _dbb(kind, arch), each("switch_to_deploy")
        )
        for kind, arch in (("DBB", "ResNet-18"), ("DBB", "MobileNet"), ("base", "ResNet-18"))
    },
    **{
        f"OREPA:{kind} {arch}": Published(
            "OREPA_CVPR2022", lambda kind=kind, arch=arch: _dbb(kind, arch), each("switch_to_deploy")
        )
        for kind, arch in (("OREPA", "ResNet-18"), ("DBB", "ResNet-18"), ("OREPA_VGG", "RepVGG-A0"))
    },
    "DO-Conv": Published("DO-Conv", _doconv, None, (1, 3, 16, 16)),
    "RepVGG:A0": Published("RepVGG", of("repvgg", "RepVGG", **SMALL), each("switch_to_deploy")),
    "RepVGG:SE": Published("RepVGG", of("repvgg", "RepVGG", **SMALL, use_se=True), each("switch_to_deploy")),
    "RepVGG:checkpoint": Published(
        "RepVGG", of("repvgg", "RepVGG", **SMALL, use_checkpoint=True), each("switch_to_deploy")
    ),
    "RepVGG:plus": Published(
        "RepVGG",
        of(
            "repvggplus",
            "RepVGGplus",
            num_blocks=[2, 2, 2, 1],
            num_classes=10,
            width_multiplier=[0.25] * 4,
            deploy=False,
            use_post_se=True,
        ),
        whole("switch_repvggplus_to_deploy"),
    ),
    **{
        f"RMNet:{name}": Published("RMNet", of(f"models.{module}", name), lambda model: model.deploy(merge_bn=True))
        for module, name in (("resnet2vgg", "rmnet20"), ("resnet2vgg", "rmnet18"))
    },
    "RMNet:repvgg": Published("RMNet", of("models.rmrepvgg", "rmrep_21", num_classes=10), whole("deploy")),
    "RepOptimizers:ghost": Published(
        "RepOptimizers", of("repoptimizer.repoptghostnet_model", "repoptghostnet_0_5x"), None
    ),
    "speechbrain:LiGRU": Published("speechbrain", lambda: _ligru("LiGRU"), None, (4, 10, 6), ("torchaudio",)),
    "speechbrain:LiGRU both ways": Published(
        "speechbrain", lambda: _ligru("LiGRU", bidirectional=True), None, (4, 10, 6), ("torchaudio",)
    ),
    "speechbrain:SLiGRU": Published("speechbrain", lambda: _ligru("SLiGRU"), None, (4, 10, 6), ("torchaudio",)),
    "ARRLFN": Published(ESR, _esr("team30_ARRLFN", "ARRLFN"), whole("fuse_model"), (1, 3, 40, 40)),
    "ARRLFN:2": Published(ESR, _esr("team30_ARRLFN", "ARRLFN", scale=2), whole("fuse_model"), (1, 3, 40, 40)),
    "RepRLFN": Published(
        ESR, _esr("team25_RepRLFN", "RepRLFN", deploy=False), each("switch_to_deploy"), (1, 3, 40, 40)
    ),
}
warnings.filterwarnings("ignore", category=FutureWarning)  # of timm, for names that repositories import
