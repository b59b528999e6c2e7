"""Saved checkpoints of training-time models, made into those of deploy models.

structrep.convert_checkpoint("last.ckpt", "deploy.ckpt", structrep.expand(model, "repvgg"), norms="keep")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from structrep import files
from structrep.driver import plan
from structrep.errors import BadInput, listed, said
from structrep.expand import plain_name
from structrep.report import CheckpointRecord, PlanRecord
from structrep.trace import Example, own_copy
from structrep.wrappers import unwrapped

# what a checkpoint holds of the run that wrote it, and what fits the training-time model's parameters only
OF_TRAINING = {
    "amp_scaler", "callbacks", "grad_scaler", "loops", "lr_scheduler", "lr_schedulers", "optim", "optimizer",
    "optimizer_state", "optimizer_states", "optimizers", "opt_state", "scaler", "scheduler",
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """The state dict of a model, somewhere in a checkpoint."""

    at: tuple[str, ...]  # the keys that lead to the mapping it is in
    prefix: str  # before each of its names there
    state: dict[str, Tensor]

    @property
    def entry(self) -> str:
        return ".".join((*self.at, *filter(None, [self.prefix.rstrip(".")]))) or "(all)"


def convert_checkpoint(
    train_ckpt: str | Path,
    out: str | Path,
    model: nn.Module,
    example_inputs: Example | None = None,
    *,
    entry: str | None = None,
    norms: Literal["fold", "keep"] = "fold",
    verify: bool = True,
    force: bool = False,
    trusted: bool = False,
) -> CheckpointRecord:
    """Reparameterize what a checkpoint holds of a model, weights and moving averages (EMA) alike, into a new file.

    Every state dict that is the model's is found by its names, under whatever key and behind whatever prefix: bare
    ones, Lightning's (`state_dict`, `model.`), timm's (`state_dict`, `state_dict_ema`), those of `AveragedModel` or
    DistributedDataParallel (`module.`), `torch.compile` and FSDP.

    Args:
        train_ckpt: a .safetensors file, a torch file, or a folder of `torch.distributed.checkpoint`, whose metadata
            torch unpickles: read only those that you trust.
        out: a .safetensors file, which holds one state dict without a prefix; or a torch file (.pt, .pth, .ckpt, .bin,
            .tar) with all that the checkpoint held, but the deploy models' weights in the place of the training-time
            ones, and without optimizers, schedulers and the like, which fit those no longer.
        model: the training-time model, with any weights; it is not changed, and may be in training mode.
        example_inputs, norms, verify: as for `structrep.reparameterize`.
        entry: the one state dict that is wanted, bare: "state_dict_ema", "state_dict.model". Needed where there are
            several and `out` holds one.
        force: whether `out` may be replaced.
        trusted: whether a torch file may hold any Python object, which can run code as it is read.

    Raises:
        BadInput: the checkpoint cannot be read, holds no state dict of the model, or several where one is wanted;
            `out` is there already, or of another suffix; there is nothing to merge. No file was written then.
        VerificationError and others: as for `structrep.reparameterize`.
    """
    source, target = Path(train_ckpt), Path(out)
    suffixes = (".safetensors", *files.TORCH_SUFFIXES)
    if target.suffix not in suffixes:
        raise BadInput(f"{target} has the suffix {target.suffix!r}: {', '.join(suffixes)} are supported")
    write = files.writer(target, force)
    if target.suffix == ".safetensors":
        files.safetensors()
    model = unwrapped(model)
    content = _sharded(source, model) if source.is_dir() else files.read(source, trusted)
    found = weights_in(content, model, source)
    bare = entry is not None or target.suffix == ".safetensors" or source.is_dir()
    if bare:
        found = [chosen(found, entry, source)]
    records: dict[str, PlanRecord] = {}
    converted: list[Weights] = []
    for one in found:
        twin = own_copy(model).eval()
        load(twin, one, source)
        planned = plan(twin, example_inputs, norms=norms)
        if not planned.merges:
            raise BadInput(f"there is nothing to merge in {one.entry} of {source}{planned.record.reasons}")
        deploy = planned.reparameterize(example_inputs, verify=verify)
        records[one.entry] = planned.record
        converted.append(replace(one, state=files.plain(deploy.state_dict())))
    if target.suffix == ".safetensors":
        write(files.save_bytes, files.as_safetensors(converted[0].state))
    else:
        write(torch.save, converted[0].state if bare else _exchanged(content, found, converted))
    left = () if bare or not isinstance(content, Mapping) else tuple(sorted(OF_TRAINING.intersection(content)))
    return CheckpointRecord(source=str(source), out=str(target), entries=records, left=left)


def weights_in(content: Any, model: nn.Module, path: Path) -> list[Weights]:
    """Every state dict in a checkpoint that has the model's very names.

    Raises:
        BadInput: there is none; what the nearest has too much, too little, or in another shape.
    """
    expected = set(model.state_dict())
    states = list(_mappings(content))
    found = [
        Weights(at, prefix, {name: named[prefix + name] for name in expected})
        for at, named in states
        for prefix in _whole(named, expected)
    ]
    if found:
        return found
    near = [
        (len(expected & _under(named, prefix)), Weights(at, prefix, {}), named)
        for at, named in states
        for prefix in {"", *_prefixes(named, expected)}
    ]
    if not near:
        raise BadInput(
            f"{path} holds an object of type {type(content).__name__} but no state dict: save one with "
            f"torch.save(model.state_dict(), FILE)"
        )
    _, nearest, named = max(near, key=lambda one: one[0])
    state = {name: named[nearest.prefix + name] for name in _under(named, nearest.prefix)}
    files.fit(model, state, path)
    raise AssertionError("a state dict that fits has the model's names")


def chosen(found: list[Weights], entry: str | None, path: Path) -> Weights:
    """The one state dict that is wanted.

    Raises:
        BadInput: there is none of that name, or several and none is named.
    """
    entries = [one.entry for one in found]
    if entry is not None and entry not in entries:
        raise BadInput(f"{path} has no state dict of the model at {entry!r}: there is {listed(entries)}")
    if entry is None and len(found) > 1:
        raise BadInput(f"{path} holds {len(found)} state dicts of the model: name an entry, {' or '.join(entries)}")
    return found[0 if entry is None else entries.index(entry)]


def load(model: nn.Module, weights: Weights, path: Path) -> None:
    """Load weights into a model, which takes on their dtypes.

    Raises:
        BadInput: their shapes differ, or numbers stand where there are none of their kind.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(given := weights.state.get(name), Tensor):
            if tensor.is_floating_point() != given.is_floating_point():
                raise BadInput(f"{path} has {name} as {given.dtype}, and the model as {tensor.dtype}")
            tensor.data = tensor.data.to(given.dtype)
    files.fit(model, weights.state, path)


def _mappings(content: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """All mappings of a checkpoint with tensors in them, by the keys that lead there, without the wrappers' names."""
    if not isinstance(content, Mapping):
        return
    if any(isinstance(value, Tensor) for value in content.values()):
        named = {key: value for key, value in content.items() if _of_module(key, value)}
        if len(set(map(plain_name, named))) < len(named):
            raise BadInput(f"names under {'.'.join(at) or 'no key'} are the same but for wrappers: {listed(named)}")
        yield at, {plain_name(key): value for key, value in named.items()}
    for key, value in content.items():
        if isinstance(key, str) and key not in OF_TRAINING:
            yield from _mappings(value, (*at, key))


def _of_module(key: Any, value: Any) -> bool:
    """Whether a module's state dict has such an entry."""
    return isinstance(key, str) and (isinstance(value, Tensor) or key.endswith("_extra_state"))


def _prefixes(names: Iterable[str], expected: set[str]) -> list[str]:
    """What stands, in names, before a name of the model."""
    known = min(expected, default="")
    return [name.removesuffix(known) for name in names if known and f".{name}".endswith(f".{known}")]


def _whole(names: Iterable[str], expected: set[str]) -> list[str]:
    """The prefixes behind which the model's names stand, all of them and no others but those of a longer prefix."""
    left, found = set(names), []
    for prefix in sorted(_prefixes(left, expected), key=len, reverse=True):
        if _under(left, prefix) == expected:
            found.append(prefix)
            left -= {prefix + name for name in expected}
    return found[::-1]


def _under(names: Iterable[str], prefix: str) -> set[str]:
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def _sharded(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """The model's weights in a folder of `torch.distributed.checkpoint`, whole.

    Raises:
        BadInput: it is no such folder.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load as load_sharded

    try:
        known = FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:
        raise BadInput(f"{folder} is no folder of torch.distributed.checkpoint: {said(error)}") from error
    sizes = {name: entry for name, entry in known.items() if isinstance(entry, TensorStorageMetadata)}
    expected = set(model.state_dict())
    of_weights = {prefix + name for prefix in _prefixes(map(plain_name, sizes), expected) for name in expected}
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in sizes.items()
        if plain_name(name) in of_weights
    }
    try:
        load_sharded(state, checkpoint_id=folder, no_dist=True)
    except Exception as error:
        raise BadInput(f"{folder} is damaged: {said(error)}") from error
    return state


def _exchanged(content: Any, before: list[Weights], after: list[Weights], at: tuple[str, ...] = ()) -> Any:
    """A checkpoint with other weights in the place of those that were found in it."""
    if not any(one.at[: len(at)] == at for one in before):
        return content
    here = [one for one in before if one.at == at]
    gone = {one.prefix + name for one in here for name in one.state}
    new = {
        key: _exchanged(value, before, after, (*at, key))
        for key, value in content.items()
        if plain_name(str(key)) not in gone and (at or key not in OF_TRAINING)
    }
    for one in after:
        if one.at == at:
            new |= {one.prefix + name: value for name, value in one.state.items()}
    return new
