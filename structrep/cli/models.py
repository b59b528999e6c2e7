"""Models by the names that users have for them.

Nothing is downloaded, and a file can do no more than give tensors, unless the user says so.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from structrep.deliver.formats import read
from structrep.errors import BadInput, said
from structrep.files import demand, imported

FORMS = "timm:NAME, torchvision:NAME, hf:PATH, package.module:callable, a .pt2 file or a saved module"
PLACES = ("timm:", "torchvision:", "hf:")
FETCHING = (
    "pretrained", "pretrained_backbone", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "weights",
    "weights_backbone",
)  # fmt: skip
SAVED = (".pt", ".pth", ".bin")


def named(source: str, keywords: dict[str, Any], download: bool = False, trusted: bool = False) -> nn.Module:
    """The model of that name.

    Args:
        source: see `FORMS`; the path of `hf:` is a configuration, or a folder with one and perhaps with weights.
        keywords: for what makes it.
        download: whether weights, and configurations by their name on a hub, may be fetched.
        trusted: whether a file may hold a saved module, which runs code as it is read.

    Raises:
        BadInput: there is no such model, it cannot be made, or would be fetched.
    """
    if not source.partition(":")[2]:
        if (path := Path(source)).suffix in (".pt2", *SAVED):
            return _saved(path, keywords, trusted)
        raise BadInput(f"{source!r} names no model: write {FORMS}")
    place, _, name = source.partition(":")
    if not (place and name):
        raise BadInput(f"{source!r} names no model: write {FORMS}")
    if place == "hf":
        return _hugging_face(name, keywords, download)
    if place in ("timm", "torchvision") and not download:
        fetching = sorted(key for key in FETCHING if keywords.pop(key, None))
        if fetching:
            raise BadInput(
                f"--arg {fetching[0]} would download weights: allow that, --download, or fetch them yourself and give "
                f"--weights FILE"
            )
    make = {"timm": _timm, "torchvision": _torchvision}.get(place)
    found = make(name) if make else _found(place, name)
    if isinstance(found, nn.Module):
        if keywords:
            raise BadInput(f"{source} is a module already, so it takes no --arg {next(iter(keywords))}")
        return found
    if not callable(found):
        raise BadInput(f"{source} is {_a(found)}: neither an nn.Module nor a callable that gives one")
    try:
        model = found(**keywords)
    except (Exception, SystemExit) as error:
        raise BadInput(f"{source} could not be made: {said(error)}") from error
    if not isinstance(model, nn.Module):
        raise BadInput(f"{source} gave {_a(model)}, not an nn.Module")
    return model


def _saved(path: Path, keywords: dict[str, Any], trusted: bool) -> nn.Module:
    """A program of `torch.export`, or a module as `torch.save` writes it."""
    if keywords:
        raise BadInput(f"{path} is a module already, so it takes no --arg {next(iter(keywords))}")
    if path.suffix == ".pt2":
        found = read(path).content
        assert isinstance(found, nn.Module)
        return found
    demand(path)
    if not trusted:
        raise BadInput(
            f"{path} would have to hold a whole module, and reading that could run any code: say --trusted if you know "
            f"who wrote it; if it holds weights alone, name the model and give --weights {path}"
        )
    _look_here()
    try:
        found = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise BadInput(f"{path} cannot be read: {said(error)}") from error
    if not isinstance(found, nn.Module):
        raise BadInput(f"{path} holds {_a(found)}, not an nn.Module: name the model and give --weights {path}")
    return found


def names(place: str) -> list[str]:
    """The models that `timm:` or `torchvision:` has, by name; none where that package is not installed."""
    listing = {
        "timm:": lambda: _imported_timm().list_models(),
        "torchvision:": lambda: _imported_models().list_models(),
    }
    try:
        return list(listing[place]()) if place in listing else []
    except BadInput:
        return []


def _imported_timm() -> Any:
    return imported("timm", "pip install 'structrep[timm]'")


def _imported_models() -> Any:
    return imported("torchvision", "pip install torchvision").models


def _hugging_face(path: str, keywords: dict[str, Any], download: bool) -> nn.Module:
    transformers = imported("transformers", "pip install 'structrep[transformers]'")
    where = Path(path)
    if not where.exists() and not download:
        raise BadInput(f"{path} is not there: give a folder, a config.json, or allow a download, --download")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=not download, **keywords)
        names = config.architectures or []
        kind = getattr(transformers, names[0], None) if names else None
        if where.is_file() or not (download or any(where.glob("*.safetensors")) or any(where.glob("*.bin"))):
            model: nn.Module = kind(config) if kind else transformers.AutoModel.from_config(config)
        else:
            model = (kind or transformers.AutoModel).from_pretrained(path, config=config, local_files_only=not download)
    except Exception as error:
        raise BadInput(f"transformers makes no model of {path}: {said(error)}") from error
    return model


def _timm(name: str) -> Callable[..., Any]:
    timm = _imported_timm()
    if not timm.is_model(name):
        raise BadInput(f"timm has no model named {name!r}{_near(name, timm.list_models())}")
    return lambda **keywords: timm.create_model(name, **{"pretrained": False, **keywords})


def _torchvision(name: str) -> Callable[..., Any]:
    models = _imported_models()
    if name not in models.list_models():
        raise BadInput(f"torchvision has no model named {name!r}{_near(name, models.list_models())}")
    builder = models.get_model_builder(name)
    taken = inspect.signature(builder).parameters
    # of a detection model, the backbone's weights are fetched unless told not to
    none = {key: None for key in ("weights", "weights_backbone") if key in taken}
    return lambda **keywords: builder(**{**none, **keywords})


def _found(place: str, name: str) -> Any:
    """What a module calls `name`, dots and all."""
    if place.endswith(".py") or not all(part.isidentifier() for part in place.split(".")):
        raise BadInput(f"{place!r} is no module's name: write package.module:callable, without .py or slashes")
    _look_here()
    found = imported(place, "is it in the current folder, or installed?")
    for part in name.split("."):
        if not hasattr(found, part):
            raise BadInput(f"{place} has nothing named {name!r}{_near(part, dir(found))}")
        found = getattr(found, part)
    return found


def _look_here() -> None:
    """Have modules in the current folder found, and those that were written just now."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()


def _a(value: Any) -> str:
    return f"an object of type {type(value).__name__}"


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, 3)
    return f": did you mean {' or '.join(near)}?" if near else ""
