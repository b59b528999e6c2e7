"""Weights in files: reading them runs no code, and one that is written is at every moment the old one or the new."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pickle
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from structrep.errors import BadInput, listed, said

Save = Callable[[Any, BinaryIO], object]
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
INDEX = ".index.json"  # which says of each tensor which of several files it is in
WEIGHTS = "pip install 'structrep[weights]'"


def imported(name: str, remedy: str) -> Any:
    """A module that is imported only where it is used.

    Raises:
        BadInput: it is not there, with the remedy, or fails as it is imported.
    """
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            raise BadInput(f"there is no module named {missing!r}: {remedy}") from error
        hint = ""
        if "torchvision::" in str(error):
            hint = f"; torchvision's build is for another torch than {torch.__version__}: install both from one index"
        raise BadInput(f"{name} is there but cannot be imported: {said(error)}{hint}") from error


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: Path, trusted: bool = False) -> Any:
    """What a .safetensors or torch file holds, on the CPU; or all files of an index, as transformers writes them.

    Args:
        path: a file, or an index: model.safetensors.index.json, say.
        trusted: whether a torch file may hold any Python object: reading those can run any code.

    Raises:
        BadInput: there is no such file, it is damaged, or holds more than tensors, numbers and texts.
    """
    demand(path)
    if path.name.endswith(INDEX):
        return _indexed(path, trusted)
    kind = "safetensors" if path.suffix == ".safetensors" else "torch"
    try:
        if kind == "safetensors":
            return safetensors().load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts keep their arguments so
            return torch.load(path, map_location="cpu", weights_only=not trusted)
    except BadInput:
        raise
    except pickle.UnpicklingError as error:
        # torch's own message goes on to advise weights_only=False
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None:
            raise BadInput(f"{path} is damaged, or no torch file") from error
        raise BadInput(
            f"{path} holds more than tensors: it asks for {wanted[1]}, and reading that could run any code. "
            f"Save a plain state dict, torch.save(model.state_dict(), FILE), or say --trusted, trusted=True, if you "
            f"know who wrote it"
        ) from error
    except Exception as error:
        raise BadInput(f"{path} is damaged, or no {kind} file: {said(error)}") from error


def _indexed(index: Path, trusted: bool) -> dict[str, Any]:
    """The tensors that an index names, each from its file beside it."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(file): [name for name, at in places.items() if at == file] for file in places.values()}
    except Exception as error:
        raise BadInput(f"{index} is damaged, or no index of weights: {said(error)}") from error
    state: dict[str, Any] = {}
    for file, there in names.items():
        shard = index.parent / file
        if shard.name != file or not file.endswith((".safetensors", *TORCH_SUFFIXES)):
            raise BadInput(f"{index} names {file!r}, which is no file of weights beside it")
        if not shard.is_file():
            raise BadInput(f"{index} names {file}, which is not there: it would hold {listed(there)}")
        content = read(shard, trusted)
        if lost := [name for name in there if not (isinstance(content, Mapping) and name in content)]:
            raise BadInput(f"{shard} does not hold what {index.name} says: {listed(lost)}")
        state |= {name: content[name] for name in there}
    return state


def demand(path: Path) -> None:
    """Raises BadInput where there is no file."""
    if not path.is_file():
        raise BadInput(f"{path} is {'a folder' if path.is_dir() else 'not there'}: give a file")


def fit(model: nn.Module, state: Any, path: Path) -> None:
    """Load a state dict into a model, if torch loads it strictly.

    Raises:
        BadInput: their keys or shapes differ, with which. The model may have been changed then.
    """
    if not (isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values())):
        raise BadInput(f"{path} holds no state dict, whose values are all tensors")
    own = model.state_dict()
    differing = [
        f"{key} {_sized(own[key])} in the model, {_sized(value)} in the file"
        for key, value in state.items()
        if isinstance(own.get(key), Tensor) and not nn.parameter.is_lazy(own[key]) and own[key].shape != value.shape
    ]
    missing, unexpected = [key for key in own if key not in state], [key for key in state if key not in own]
    if not differing:
        try:  # modules may do without some, or take others: norms their counters, weight norm its old names
            missing, unexpected = model.load_state_dict(dict(state), strict=False)
        except Exception as error:
            raise BadInput(f"{path} does not fit {type(model).__name__}: {said(error)}") from error
    told = [
        f"\n  {what}: {listed(names)}"
        for what, names in (
            ("only in the model", missing),
            ("only in the file", unexpected),
            ("of another shape", differing),
        )
        if names
    ]
    if told:
        raise BadInput(f"{path} does not fit {type(model).__name__}{''.join(told)}")
    loaded = model.state_dict()
    lost = [key for key, value in state.items() if key in loaded and not _same(loaded[key], value)]
    if lost:
        raise BadInput(
            f"{path} does not fit {type(model).__name__}, where other names are tied to the weights of {listed(lost)}: "
            f"the file has other numbers for those"
        )


def _same(loaded: Tensor, given: Tensor) -> bool:
    given = given.to(loaded)
    if loaded.is_floating_point() and loaded.itemsize == 1:  # torch has next to no kernels for float8
        loaded, given = loaded.float(), given.float()
    return torch.equal(loaded.nan_to_num(), given.nan_to_num())


def safetensors(writes: bool = False) -> Any:
    """The package for such files, which needs numpy to write one.

    Raises:
        BadInput: one of the two is not there.
    """
    found = imported("safetensors.torch", WEIGHTS)
    if writes:
        imported("numpy", WEIGHTS)
    return found


def as_safetensors(state: Mapping[str, Tensor], **told: str) -> bytes:
    """A safetensors file of a plain state dict, with texts by name in its metadata."""
    content: bytes = safetensors(writes=True).save(dict(state), {"format": "pt", **told})
    return content


def save_bytes(content: bytes, file: BinaryIO) -> None:
    file.write(content)


# --- writing ----------------------------------------------------------------------------------------------------------


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of tensors of their own: no tied weights, views or odd strides, none of which safetensors takes."""
    return {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
        for key, value in state.items()
    }


def writer(out: Path, force: bool) -> Callable[[Save, Any], None]:
    """A function that writes what is given to it to `out`; what would stop it is found out now.

    It writes a new file beside `out` and then renames it.

    Raises:
        BadInput: `out` is a folder, exists and `force` is not given, or cannot be written.
    """
    target = Path(os.path.realpath(out))  # a link goes on pointing where it did
    if target.is_dir():
        raise BadInput(f"{out} is a folder: give a file in it")
    if not target.parent.is_dir():
        raise BadInput(f"{out}: there is no folder {target.parent}")
    if not os.access(target.parent, os.W_OK):
        raise BadInput(f"{out}: the folder {target.parent} is not yours to write in")

    def free() -> None:
        if target.exists() and not force:
            raise BadInput(f"{out} exists: force its replacement (--force, force=True), or give another name")

    def write(save: Save, content: Any) -> None:
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        try:
            with partial.open("xb") as file:
                save(content, file)
                file.flush()
                os.fsync(file.fileno())
            free()
            os.replace(partial, target)
        except BadInput:
            raise
        except Exception as error:
            raise BadInput(f"{out} could not be written: {said(error)}") from error
        finally:
            partial.unlink(missing_ok=True)

    free()
    return write


def _sized(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
