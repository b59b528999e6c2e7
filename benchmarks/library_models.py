"""Where the models of `benchmarks.libraries` come from: how each library names and builds them, and converts them
itself. Everything is imported by name when it is used, for none of these libraries has to be there."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

LARGEST = 150_000_000  # parameters
Shape = tuple[int, ...]
Way = tuple[str, nn.Module, list[Shape]]  # what of a model runs, and shapes of inputs to try


@dataclass(frozen=True)
class Library:
    names: Callable[[], list[str]]
    ways: Callable[[str], Iterator[Way]]
    theirs: Callable[[Any], nn.Module] | None = None
    needs: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()  # what it imports and no model here calls


def stand_in(name: str) -> None:
    """A module of nothing, for compiled operations and formats that the models do without."""
    module: Any = ModuleType(name)
    module.__spec__, module.__path__, module.__all__ = ModuleSpec(name, None), [], []
    module.__getattr__ = lambda attribute: _nothing(attribute)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)


def _nothing(attribute: str) -> type:
    if attribute.startswith("__"):
        raise AttributeError(attribute)
    return type(attribute, (), {})


def ultralytics_names() -> list[str]:
    configs = Path(str(import_module("ultralytics").__file__)).parent / "cfg" / "models"
    larger = re.compile(r"yolov10[smblx]|yolov9[sm]$|rtdetr-x|101|11-cls-resnet")
    return [*sorted(one.stem for one in configs.rglob("*.yaml") if not larger.search(one.stem)), "mobile_sam", "sam2_t"]


def ultralytics_ways(name: str) -> Iterator[Way]:
    if "sam" in name:
        build = import_module("ultralytics.models.sam.build")
        yield "image encoder", getattr(build, f"build_{name}")().image_encoder, [(1, 3, 1024, 1024)]
    else:
        quiet = {} if "rtdetr" in name else {"verbose": False}
        kind = "RTDETR" if "rtdetr" in name else "YOLO"
        yield "", getattr(import_module("ultralytics"), kind)(f"{name}.yaml", **quiet).model, [(1, 3, 128, 128)]


def pytorchcv_names() -> list[str]:
    families: dict[str, str] = {}
    for name, make in import_module("pytorchcv.model_provider")._models.items():
        families.setdefault(make.__module__, name)
    return list(families.values())


def pytorchcv_ways(name: str) -> Iterator[Way]:
    model: Any = import_module("pytorchcv.model_provider").get_model(name)
    high, wide = getattr(model, "in_size", (224, 224))
    channels = getattr(model, "in_channels", 3)
    sizes = [(high // by, wide // by) for by in ((4, 2, 1) if high * wide > 300 * 300 else (1,))]
    yield "", model, [*((1, channels, *size) for size in sizes), (1, channels, 64), (1, 16), (1, 3, 16)]


def _configs(package: str) -> Path:
    return Path(str(import_module(package).__file__)).parent / ".mim" / "configs"


def _config(package: str, name: str) -> Any:
    config = import_module("mmengine").Config.fromfile(_configs(package) / f"{name}.py").get("model", {})
    return config.get("detector", config)


def mmpretrain_names() -> list[str]:
    """The smallest classifier of each folder of configurations, with a backbone that none before it has."""
    hub = import_module("mmpretrain.apis.model").ModelHub
    smallest: dict[str, Any] = {}
    for name in import_module("mmpretrain.apis").list_models():
        found = hub._models_dict[name.lower()]
        size, folder = found.metadata.parameters or LARGEST, Path(str(found.config)).parent.name
        if size < smallest.get(folder, (LARGEST,))[0]:
            smallest[folder] = (size, name)
    backbones: dict[str, str] = {}
    for _, name in sorted(smallest.values()):
        try:
            config = hub.get(name).config.model
        except RuntimeError:  # of two styles of configurations, mixed: mmengine refuses that
            continue
        if config.type == "ImageClassifier":
            backbones.setdefault(config.backbone.type, name)
    return [*sorted(backbones.values()), "RepLKNet-31B"]


def mmpretrain_ways(name: str) -> Iterator[Way]:
    if name == "RepLKNet-31B":  # its configurations are of those
        model = import_module("mmpretrain.registry").MODELS.build({"type": "RepLKNet", "arch": "31B"})
    else:
        model = import_module("mmpretrain.apis").get_model(name, pretrained=False, device="cpu")
    yield "", model, [(1, 3, size, size) for size in (224, 256, 192, 32)]


def mmdet_names() -> list[str]:
    """The shortest name of each folder of configurations, if no other has the same kinds of parts."""
    folders = [one for one in _configs("mmdet").iterdir() if one.name not in ("_base_", "common")]
    found = [
        [f"{one.parent.name}/{one.stem}" for one in folder.glob("*_*.py") if "_tta" not in one.stem]
        for folder in folders
    ]
    kinds: dict[tuple[str, ...], str] = {}
    for name in sorted(min(names, key=lambda name: ("101" in name, len(name), name)) for names in found if names):
        try:
            config = _config("mmdet", name)
        except FileNotFoundError:  # some are made of others that are not shipped
            continue
        parts = [config.get(part) or {} for part in ("backbone", "neck", "bbox_head", "mask_head", "rpn_head")]
        kinds.setdefault(tuple(str(one.get("type") if isinstance(one, dict) else len(one)) for one in parts), name)
    return list(kinds.values())


def mmseg_names() -> list[str]:
    return sorted(f"_base_/models/{one.stem}" for one in (_configs("mmseg") / "_base_" / "models").glob("*.py"))


def mm_ways(package: str, name: str) -> Iterator[Way]:
    """A whole model; else its backbone and neck, where its head calls operations that are not there."""
    registry = import_module(f"{package}.registry").MODELS
    import_module("mmengine.registry").init_default_scope(package)
    model = import_module("mmengine.model").revert_sync_batchnorm(registry.build(_config(package, name)))
    shapes: list[Shape] = [(1, 3, size, size) for size in (128, 256, 300, 512, 640)]
    yield "", model, shapes
    parts = [getattr(model, part) for part in ("backbone", "neck") if getattr(model, part, None) is not None]
    yield "backbone and neck", nn.Sequential(*parts), shapes


def mm_theirs(model: nn.Module) -> nn.Module:
    parts: list[Any] = list(model.modules())
    for part in parts:
        if hasattr(part, "switch_to_deploy"):
            part.switch_to_deploy()
    fused: nn.Module = import_module("mmcv.cnn.utils.fuse_conv_bn").fuse_conv_bn(model)
    return fused


SPANDREL: dict[str, dict[str, Any]] = {
    "SPAN": {"num_in_ch": 3, "num_out_ch": 3}, "MMRealSR": {"num_in_ch": 3, "num_out_ch": 3}, "SAFMN": {"dim": 36},
    "SAFMNBCIE": {"dim": 36}, "SwinIR": {"img_size": 56}, "Swin2SR": {"img_size": 56},
    "AuraSR": {"dim": 16, "image_size": 64, "input_image_size": 32},
}  # fmt: skip


def spandrel_names() -> list[str]:
    folder = Path(str(import_module("spandrel.architectures").__file__)).parent
    packages = sorted(one.parent.name for one in folder.glob("[A-Z]*/__init__.py"))
    return [
        f"{package}.{name}"
        for package in packages
        for name in import_module(f"spandrel.architectures.{package}").__all__
        if not name.endswith("Arch")
    ]


def spandrel_ways(name: str) -> Iterator[Way]:
    package, _, kind = name.partition(".")
    model = getattr(import_module(f"spandrel.architectures.{package}"), kind)(**SPANDREL.get(kind, {}))
    yield "", model, [(1, channels, size, size) for size in (64, 128, 256, 512) for channels in (3, 1, 4)]


# The module, what it is given, and the shape of an input.
SPEECHBRAIN: dict[str, tuple[str, dict[str, Any], Shape]] = {
    "Cnn14": ("Cnn14", {"mel_bins": 64, "emb_dim": 128}, (1, 96, 64)),
    "ECAPA_TDNN": ("ECAPA_TDNN", {"input_size": 80, "lin_neurons": 192}, (1, 60, 80)),
    "Xvector": ("Xvector", {"device": "cpu"}, (1, 40, 40)),
    "ResNet": ("ResNet", {}, (1, 64, 80)),
    "CRDNN": ("CRDNN", {"input_shape": (1, 16, 60)}, (1, 16, 60)),
    "ContextNet": ("ContextNet", {"input_shape": (1, 48, 40)}, (1, 48, 40)),
    "EnhanceResnet": ("EnhanceResnet", {}, (1, 8000)),
    "ESPnetVGG": ("ESPnetVGG", {"input_shape": (1, 40, 60)}, (1, 40, 60)),
    "VanillaNN": ("VanillaNN", {"input_shape": (1, 40, 60)}, (1, 40, 60)),
    "ConvolutionFrontEnd": ("convolution", {"input_shape": (1, 30, 10)}, (1, 30, 10)),
    "HifiganGenerator": ("HifiGAN", {
        "in_channels": 80, "out_channels": 1, "resblock_type": "1", "resblock_dilation_sizes": [[1, 3, 5]] * 3,
        "resblock_kernel_sizes": [3, 7, 11], "upsample_kernel_sizes": [16, 16, 4, 4],
        "upsample_initial_channel": 64, "upsample_factors": [8, 8, 2, 2],
    }, (1, 80, 16)),
    "Conv2dEncoder_v2": ("PIQ", {}, (1, 64, 128)),
    "ConvolutionModule": ("transformer.Conformer", {"input_size": 32}, (1, 20, 32)),
    "EnhancementGenerator": ("MetricGAN", {}, (1, 20, 257)),
}  # fmt: skip


def speechbrain_ways(name: str) -> Iterator[Way]:
    module, given, shape = SPEECHBRAIN[name]
    yield "", getattr(import_module(f"speechbrain.lobes.models.{module}"), name)(**given), [shape]


OPENMMLAB = ("mmcv._ext", "mmpretrain.models.multimodal")
LIBRARIES = {
    "ultralytics": Library(ultralytics_names, ultralytics_ways, lambda model: model.fuse(verbose=False)),
    "mmpretrain": Library(mmpretrain_names, mmpretrain_ways, mm_theirs, ("mmcv",), OPENMMLAB),
    "pytorchcv": Library(pytorchcv_names, pytorchcv_ways),
    "mmseg": Library(mmseg_names, lambda name: mm_ways("mmseg", name), mm_theirs, ("mmcv",), OPENMMLAB),
    "mmdet": Library(mmdet_names, lambda name: mm_ways("mmdet", name), mm_theirs, ("mmcv",), OPENMMLAB),
    "spandrel": Library(spandrel_names, spandrel_ways),
    "speechbrain": Library(lambda: list(SPEECHBRAIN), speechbrain_ways, absent=("torchaudio", "torchaudio.transforms")),
}
