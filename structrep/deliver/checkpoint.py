"""Saved checkpoints of training-time models, made into those of deploy models.

structrep.convert_checkpoint("last.ckpt", "deploy.ckpt", structrep.expand(model, "repvgg"), norms="keep")
"""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from structrep import files
from structrep.blocks.places import expand_layers, plain_name
from structrep.convert.calls import plan
from structrep.errors import BadInput, StructrepError, listed, said
from structrep.modules.arguments import Example
from structrep.modules.copies import own_copy
from structrep.modules.wrappers import unwrapped
from structrep.records.delivery import CheckpointRecord
from structrep.records.plan import PlanRecord

# what a checkpoint holds of the run that wrote it, and what fits the training-time model's parameters only
OF_TRAINING = {
    "amp_scaler", "callbacks", "grad_scaler", "loops", "lr_scheduler", "lr_schedulers", "optim", "optimizer",
    "optimizer_state", "optimizer_states", "optimizers", "opt_state", "scaler", "scheduler",
}  # fmt: skip
COUNTER = "num_batches_tracked"  # of a norm: how often it has run in training mode


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
    DistributedDataParallel (`module.`), `torch.compile` and FSDP. It is taken where torch would load it strictly (norms
    need no counters), where weights that are tied are there once, and with the counts of thop in it. Integers that were
    saved in half precision are integers again.

    Args:
        train_ckpt: a .safetensors file; a torch file; the index of several, `model.safetensors.index.json`, or the
            folder with it; or a folder of `torch.distributed.checkpoint`, whose metadata torch unpickles: read only
            those that you trust.
        out: a .safetensors file, which holds one state dict without a prefix; or a torch file (.pt, .pth, .ckpt, .bin,
            .tar) with all that the checkpoint held, but the deploy models' weights in the place of the training-time
            ones, and without optimizers, schedulers and the like, which fit those no longer.
        model: the training-time model, with any weights; it is not changed, and may be in training mode.
        example_inputs, norms, verify: as for `structrep.reparameterize`.
        entry: the one state dict that is wanted, bare: "state_dict_ema", "state_dict.model". Needed where there are
            several and `out` holds one.
        force: whether `out` may be replaced.
        trusted: whether a torch file may hold any Python object, which can run code as it is read.

    Warns where the statistics of a norm are of several processes, its mean of one and its variance of another.

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
        files.safetensors(writes=True)
    model = unwrapped(model)
    content = read(source, model, trusted or source.is_dir())
    found = weights_in(content, model, source)
    bare = entry is not None or target.suffix == ".safetensors" or source.is_dir()
    if bare:
        found = [chosen(found, entry, source)]
    records: dict[str, PlanRecord] = {}
    converted: list[Weights] = []
    for one in found:
        twin = own_copy(model)
        twin.eval()
        load(twin, one, source)
        planned = plan(twin, example_inputs, norms=norms)
        planned = planned.proved() if verify else planned
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


def read(source: Path, model: nn.Module, trusted: bool = False) -> Any:
    """What a checkpoint holds: a file, an index of several, or a folder with one, or of `torch.distributed.checkpoint`.

    Args:
        model: whose names say which tensors of such a folder are read.
        trusted: whether a torch file may hold any Python object, and a folder's metadata be unpickled.

    Raises:
        BadInput: it cannot be read, with why.
    """
    if not source.is_dir():
        return files.read(source, trusted)
    if (source / ".metadata").is_file():
        if not trusted:
            raise BadInput(
                f"{source} is a folder of torch.distributed.checkpoint, and reading its metadata could run any code: "
                f"say --trusted if you know who wrote it"
            )
        return _distributed(source, model)
    for pattern in (f"*.safetensors{files.INDEX}", "*.safetensors", f"*{files.INDEX}"):
        found = sorted(source.glob(pattern))
        if len(found) > 1:
            raise BadInput(f"{source} has {len(found)} of {pattern}: give one, {listed(path.name for path in found)}")
        if found:
            return files.read(found[0], trusted)
    raise BadInput(
        f"{source} is no folder of torch.distributed.checkpoint, with .metadata in it, and has no weights as "
        f"transformers writes them, model.safetensors or model.safetensors{files.INDEX}"
    )


Found = list[tuple[tuple[str, ...], dict[str, Any]]]  # mappings with tensors in them, and the keys that lead there


def weights_in(content: Any, model: nn.Module, path: Path) -> list[Weights]:
    """Every state dict in a checkpoint that the model takes.

    Weights that are tied in the model may be there once, and what thop has counted is passed over. Otherwise torch's
    own strict loading decides: norms need no counters, say.

    Raises:
        BadInput: there is none; what the nearest has too much, too little, or in another shape, and whether it is that
            of a deploy form.
    """
    states = list(_mappings(content))
    if found := _fitting(states, model):
        return found
    if not states:
        raise BadInput(
            f"{path} holds an object of type {type(content).__name__} but no state dict: save one with "
            f"torch.save(model.state_dict(), FILE)"
        )
    own = model.state_dict(keep_vars=True)
    near = [(count, prefix, named) for _, named in states for prefix, count in _prefixes(named, own).items()]
    _, prefix, named = max(near, key=lambda one: one[0], default=(0, "", states[0][1]))
    try:
        load(own_copy(model), Weights((), prefix, _under(named, prefix, own)), path)
    except BadInput as error:
        raise BadInput(f"{error}{_other_form(states, model)}") from error
    raise AssertionError("a state dict that fits was found before")


def _fitting(states: Found, model: nn.Module) -> list[Weights]:
    return [Weights(at, prefix, state) for at, named in states for prefix, state in _whole(named, model).items()]


def _other_form(states: Found, model: nn.Module) -> str:
    """Of weights that do not fit a training-time model, whether they fit what becomes of it, or was before it."""
    forms: list[tuple[Literal["keep", "fold"], str]] = [
        ("fold", "of the deploy form already: load them into structrep.reparameterize(model)")
    ]
    if expand_layers(model):
        forms.append(("keep", "of the plain model, which has no blocks: load them before expand"))
    for norms, told in forms:
        with contextlib.suppress(StructrepError):
            if _fitting(states, plan(own_copy(model).eval(), norms=norms).reparameterize(verify=False)):
                return f"\n  these are the weights {told}"
    if any("reparam" in name for _, named in states for name in named.keys() - model.state_dict().keys()):
        return "\n  by their names, these are the weights of a deploy form already"
    return ""


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
    """Load weights into a model, which takes on their dtypes; integers stay what they are in the model.

    Raises:
        BadInput: their shapes differ, or numbers stand where there are none of their kind.
    """
    state = dict(weights.state)
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        if not isinstance(given := state.get(name), Tensor):
            continue
        if given.is_floating_point() and not tensor.is_floating_point():
            state[name] = _as_integers(given, tensor, name, path)
        elif tensor.is_floating_point() != given.is_floating_point():
            raise BadInput(f"{path} has {name} as {given.dtype}, and the model as {tensor.dtype}")
        else:
            tensor.data = tensor.data.to(given.dtype)
    files.fit(model, state, path)


def _as_integers(given: Tensor, own: Tensor, name: str, path: Path) -> Tensor:
    """Integers that were saved as floating-point numbers, as `{name: value.half()}` saves them.

    Raises:
        BadInput: the dtype that they were saved in has rounded them. How often a norm has run makes no difference.
    """
    whole = given.to(own.dtype)
    if name.endswith(COUNTER):
        return whole if given.isfinite().all() else own.detach().clone()
    exact = 2 / torch.finfo(given.dtype).eps  # below, each integer is a number of that dtype
    if not (torch.equal(whole.to(given.dtype), given) and (given.abs() < exact).all()):
        raise BadInput(f"{path} has {name} as {given.dtype}, and the model as {own.dtype}: it was rounded")
    return whole


def _mappings(
    content: Any, at: tuple[str, ...] = (), around: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """All mappings of a checkpoint with tensors in them, by the keys that lead there, without the wrappers' names."""
    if not isinstance(content, Mapping) or any(content is one for one in around):  # which holds itself
        return
    if any(isinstance(value, Tensor) for value in content.values()):
        named = {key: value for key, value in content.items() if _of_module(key, value)}
        if len(set(map(plain_name, named))) < len(named):
            raise BadInput(f"names under {'.'.join(at) or 'no key'} are the same but for wrappers: {listed(named)}")
        yield at, {plain_name(key): value for key, value in named.items()}
    for key, value in content.items():
        if isinstance(key, str) and key not in OF_TRAINING:
            yield from _mappings(value, (*at, key), (*around, content))


def _of_module(key: Any, value: Any) -> bool:
    """Whether a module's state dict has such an entry."""
    return isinstance(key, str) and (isinstance(value, Tensor) or key.endswith("_extra_state"))


def _endings(name: str) -> Iterator[int]:
    """Where a name of a model may begin in a longer one."""
    yield 0
    yield from (dot.end() for dot in re.finditer(r"\.", name))


def _prefixes(names: Iterable[str], own: Mapping[str, Any]) -> Counter[str]:
    """What stands, in names, before names of a state dict, and before how many of them."""
    return Counter(name[:start] for name in names for start in _endings(name) if name[start:] in own)


def _whole(named: dict[str, Any], model: nn.Module) -> dict[str, dict[str, Any]]:
    """The model's state dicts in a mapping, by their prefixes: the names behind one are the model's, and no others.

    Of what is left by those that have its very names, torch is asked whether it loads what has the most of them.
    """
    own, left = model.state_dict(keep_vars=True), dict(named)
    found: dict[str, dict[str, Any]] = {}

    def take(prefix: str, state: dict[str, Any]) -> None:
        found[prefix] = state
        for name in [name for name in left if name.startswith(prefix)]:
            del left[name]

    apart = len({id(value) for value in own.values()})  # tied ones once
    counts = _prefixes(left, own)
    for prefix in sorted(counts, key=len, reverse=True):
        if counts[prefix] >= apart and (state := _under(left, prefix, own)).keys() == own.keys():
            take(prefix, state)
    counts = _prefixes(left, own)
    most = max(counts.values(), default=0)
    nearest = [prefix for prefix in counts if counts[prefix] == most and (not found or 2 * most >= apart)]
    for prefix in sorted(nearest, key=len, reverse=True):
        state = _under(left, prefix, own)
        with contextlib.suppress(BadInput):
            load(own_copy(model), Weights((), prefix, state), Path())
            take(prefix, state)
    return dict(sorted(found.items(), key=lambda one: len(one[0])))


def _under(named: dict[str, Any], prefix: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """What stands behind a prefix: without what thop has counted, and under each of the names that are tied."""
    state = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
    state = {name: value for name, value in state.items() if name in own or not _counted(name)}
    kept = {id(own[name]): value for name, value in state.items() if isinstance(own.get(name), Tensor)}
    return state | {name: kept[id(one)] for name, one in own.items() if name not in state and id(one) in kept}


def _counted(name: str) -> bool:
    """Whether a name is of what thop hangs on every module."""
    return name.rpartition(".")[2] in ("total_ops", "total_params")


def _distributed(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """The model's weights in a folder of `torch.distributed.checkpoint`, whole.

    Raises:
        BadInput: it is no such folder.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        metadata = FileSystemReader(folder).read_metadata()
    except Exception as error:
        raise BadInput(f"{folder} is no folder of torch.distributed.checkpoint: {said(error)}") from error
    known = metadata.state_dict_metadata
    sizes = {name: entry for name, entry in known.items() if isinstance(entry, TensorStorageMetadata)}
    expected = model.state_dict().keys()
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in sizes.items()
        if any(plain_name(name)[start:] in expected for start in _endings(plain_name(name)))
    }
    try:
        _load_alone(state, folder)
    except Exception as error:
        raise BadInput(f"{folder} is damaged: {said(error)}") from error
    if mixed := _of_several_processes(metadata.storage_data, state, model):
        warnings.warn(
            f"{folder} has the means of some norms from one process and their variances from another: {listed(mixed)}. "
            f"That is right only if they were the same in all processes. If not, average them before saving, or save "
            f"those of the first process, with planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True)",
            stacklevel=4,
        )
    return state


def _load_alone(state: dict[str, Tensor], folder: Path) -> None:
    """Read a state from a folder of `torch.distributed.checkpoint`, without waiting for other processes."""
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    if "no_dist" in inspect.signature(state_dict_loader.load).parameters:
        state_dict_loader.load(state, checkpoint_id=folder, no_dist=True)
        return
    with warnings.catch_warnings():  # torch 2.6 may be told so by the older function alone
        warnings.simplefilter("ignore", FutureWarning)
        state_dict_loader.load_state_dict(state, FileSystemReader(folder), no_dist=True)


def _of_several_processes(places: Any, state: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """The norms whose statistics processes wrote in part each, by where `torch.distributed.checkpoint` has put them.

    Each tensor that all processes have is written by one of them, whichever has least to write.
    """
    wrote: dict[str, set[str]] = {}
    for index, place in (places or {}).items():
        if process := re.match(r"__\d+_", str(getattr(place, "relative_path", ""))):
            wrote.setdefault(index.fqn, set()).add(process[0])
    synced = tuple(path for path, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm))
    norms = [name.removesuffix(".running_mean") for name in state if name.endswith(".running_mean")]
    return [
        norm
        for norm in norms
        if wrote.get(f"{norm}.running_mean") != wrote.get(f"{norm}.running_var")
        and not any(f".{plain_name(norm)}".endswith(f".{path}") for path in synced)
    ]


def _exchanged(content: Any, before: list[Weights], after: list[Weights], at: tuple[str, ...] = ()) -> Any:
    """A checkpoint with other weights in the place of those that were found in it."""
    if not any(one.at[: len(at)] == at for one in before):
        return content
    here = [one for one in before if one.at == at]
    gone = {one.prefix + name for one in here for name in one.state}
    new = {
        key: _exchanged(value, before, after, (*at, key))
        for key, value in content.items()
        if plain_name(str(key)) not in gone and (at or key not in OF_TRAINING) and not (here and _counted(str(key)))
    }
    for one in after:
        if one.at == at:
            new |= {one.prefix + name: value for name, value in one.state.items()}
    return new
