"""The deploy model in a file, with what is known of it written into it, and the model that a file holds.

By suffix: `.safetensors` and `.pt`, a state dict; `.pt2`, a program of `torch.export`; `.onnx`, of `torch.onnx`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from structrep import files
from structrep.errors import BadInput, said
from structrep.modules.arguments import Example, as_arguments
from structrep.records.delivery import Provenance
from structrep.records.plan import PlanRecord
from structrep.records.verification import Verification

KEY = "structrep"  # of the record in a file's own metadata
BATCH = "batch"  # what a program calls the size of dim 0, if it is left open
ONNX = "pip install 'structrep[onnx]'"


def provenance(model: nn.Module, plan: PlanRecord, source: str = "", proof: Verification | None = None) -> Provenance:
    """What a file is to say of the deploy model in it.

    Args:
        model: the training-time model.
        source: where that came from, in the user's words.
        proof: the comparison of the two.
    """
    return Provenance(
        source=source,
        model=plan.model,
        weights_sha256=checksum(model),
        rules=dict(Counter(" + ".join(merge.rules) for merge in plan.merges)),
        refusals=len(plan.refusals),
        versions={"structrep": version("structrep"), "torch": torch.__version__},
        verification=proof,
    )


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def checksum(model: nn.Module) -> str:
    """SHA-256 of a state dict: of each name, dtype, shape and number, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            plain = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update((ctypes.c_char * len(plain)).from_address(plain.data_ptr()) if len(plain) else b"")
    return digest.hexdigest()


class Format:
    """What a deploy model can be written to: one a suffix."""

    suffix: ClassVar[str]
    holds: ClassVar[str]
    program: ClassVar[bool] = False  # it runs by itself, and is made from example inputs
    runtime: ClassVar[str] = ""  # that runs it on the CPU, in the dtype it has, where that is not torch
    writers: ClassVar[tuple[str, ...]] = ()  # packages that write it
    checkers: ClassVar[tuple[str, ...]] = ()  # that what is written is compared with
    remedy: ClassVar[str] = ""  # how to come by these

    def demand(self) -> None:
        """Raises BadInput where a package is missing that writes it."""
        for package in self.writers:
            files.imported(package, self.remedy)

    def encoded(self, deploy: nn.Module, example_inputs: Example | None, record: str) -> bytes:
        """A deploy model as the content of a file; of a program, its batch, dim 0 of all inputs, is left open where the
        model allows it.

        Raises:
            BadInput: it is a program, and there are no example inputs, or it cannot be made.
        """
        raise NotImplementedError

    def decoded(self, path: Path) -> tuple[Any, str]:
        """A state dict, or a module that runs the program, and the record in the file, "" for none.

        Raises:
            BadInput: the file is damaged, or another one.
        """
        raise NotImplementedError

    def loaded(self, content: bytes) -> nn.Module:
        """The program that a file's content is.

        Raises:
            BadInput: it is none.
        """
        raise NotImplementedError


class Safetensors(Format):
    suffix = ".safetensors"
    holds = "its state dict"
    writers = ("safetensors", "numpy")
    remedy = files.WEIGHTS

    def encoded(self, deploy: nn.Module, example_inputs: Example | None, record: str) -> bytes:
        return files.as_safetensors(files.plain(deploy.state_dict()), **{KEY: record})

    def decoded(self, path: Path) -> tuple[Any, str]:
        content = files.read(path)
        with files.safetensors().safe_open(path, "pt") as file:
            return content, (file.metadata() or {}).get(KEY, "")


class Torch(Format):
    suffix = ".pt"
    holds = "its state dict"

    def encoded(self, deploy: nn.Module, example_inputs: Example | None, record: str) -> bytes:
        state: Any = deploy.state_dict()
        told = {**state._metadata, KEY: {"record": record}}  # versions of modules; what torch reads nothing into
        for name, value in files.plain(state).items():
            state[name] = value
        state._metadata = told
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    def decoded(self, path: Path) -> tuple[Any, str]:
        content = files.read(path)
        told: Mapping[str, Mapping[str, str]] = getattr(content, "_metadata", {})
        return content, told.get(KEY, {}).get("record", "")


class Exported(Format):
    suffix = ".pt2"
    holds = "a program of torch.export"
    program = True

    def encoded(self, deploy: nn.Module, example_inputs: Example | None, record: str) -> bytes:
        file = io.BytesIO()

        def export(args: Any, kwargs: Any, shapes: Any) -> Any:
            return torch.export.export(deploy, args, kwargs, dynamic_shapes=shapes)

        torch.export.save(_with_open_batch(export, example_inputs), file, extra_files={f"{KEY}.json": record})
        return file.getvalue()

    def decoded(self, path: Path) -> tuple[Any, str]:
        with _named(path):
            return _exported(path.read_bytes())

    def loaded(self, content: bytes) -> nn.Module:
        return _exported(content)[0]


class Onnx(Format):
    suffix = ".onnx"
    holds = "an ONNX program"
    program = True
    runtime = "onnxruntime"
    writers = ("onnxscript",)
    checkers = ("onnxruntime",)
    remedy = ONNX

    def encoded(self, deploy: nn.Module, example_inputs: Example | None, record: str) -> bytes:
        def export(args: Any, kwargs: Any, shapes: Any) -> Any:
            return torch.onnx.export(deploy, args, kwargs=kwargs, dynamic_shapes=shapes, dynamo=True, verbose=False)

        made = _with_open_batch(export, example_inputs)
        made.model.metadata_props[KEY] = record
        program = made.model_proto
        _name_batch(program.graph)
        content: bytes = program.SerializeToString()
        return content

    def decoded(self, path: Path) -> tuple[Any, str]:
        with _named(path):
            made = OnnxModel(path.read_bytes())
        return made, made.session.get_modelmeta().custom_metadata_map.get(KEY, "")

    def loaded(self, content: bytes) -> nn.Module:
        return OnnxModel(content)


FORMATS: dict[str, Format] = {one.suffix: one for one in (Safetensors(), Torch(), Exported(), Onnx())}


def format_of(path: Path) -> Format:
    """The format of a file, by its suffix.

    Raises:
        BadInput: there is none of that suffix.
    """
    if path.suffix not in FORMATS:
        raise BadInput(f"{path} has the suffix {path.suffix!r}: convert writes {', '.join(FORMATS)}")
    return FORMATS[path.suffix]


def said_of_formats() -> str:
    """What the suffix of a file decides, in a sentence."""
    suffixes: dict[str, list[str]] = {}
    for one in FORMATS.values():
        suffixes.setdefault(f"{one.holds}{', which needs --shape' * one.program}", []).append(one.suffix)
    return "; ".join(f"{' or '.join(names)}, {holds}" for holds, names in suffixes.items())


def _name_batch(graph: Any) -> None:
    """Give the one size that is left open the name that it has for torch.export; torch 2.6 writes its symbol, s0."""
    given, made = (
        [size for value in values for size in value.type.tensor_type.shape.dim if size.dim_param]
        for values in (graph.input, (*graph.output, *graph.value_info))
    )
    symbol = given[0].dim_param if given else BATCH  # other open sizes are those of what is made
    for size in (*given, *made) if symbol != BATCH else ():
        size.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", BATCH, size.dim_param)


def _with_open_batch(export: Callable[[Any, Any, Any], Any], example_inputs: Example | None) -> Any:
    """What `export` makes with the first dim of every tensor open, or else with all dims as they are.

    Raises:
        BadInput: there are no example inputs, or neither can be made.
    """
    if example_inputs is None:
        raise BadInput("a program is made from example inputs: give some (--shape 1x3x224x224, say)")
    args, kwargs = as_arguments(example_inputs)
    sizes = {len(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim}
    batch = torch.export.Dim(BATCH)

    def wide(leaf: Any) -> Any:  # a batch of 1 would be taken for a constant
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == 1 else leaf

    def opened(leaf: Any) -> Any:
        return {0: batch} if isinstance(leaf, Tensor) and leaf.ndim else None

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if len(sizes) == 1:
            with contextlib.suppress(Exception):  # of a model that has to know its batch
                many, more = pytree.tree_map(wide, (args, kwargs))
                return export(many, more, pytree.tree_map(opened, args or kwargs))
        try:
            return export(args, kwargs, None)
        except Exception as error:
            raise BadInput(f"torch makes no such program of the model: {said(error)}") from error


class OnnxModel(nn.Module):
    """An ONNX program, run by onnxruntime on the CPU.

    Args:
        content: of the file.

    Raises:
        BadInput: onnxruntime is not there, or takes no such program.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__()
        runtime = files.imported("onnxruntime", ONNX)
        try:
            self.session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BadInput(f"onnxruntime cannot run it: {said(error)}") from error

    def forward(self, *args: Tensor, **kwargs: Tensor) -> list[Tensor]:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        feed = {one.name: tensor.numpy() for one, tensor in zip(self.session.get_inputs(), given, strict=True)}
        return [torch.from_numpy(value) for value in self.session.run(None, feed)]

    def __deepcopy__(self, memo: Any) -> OnnxModel:
        return self  # it has no state


def _exported(content: bytes) -> tuple[nn.Module, str]:
    """A program of `torch.export`, and what its file says of it."""
    told = {f"{KEY}.json": ""}
    log = logging.getLogger("torch.export")
    level = log.level
    try:
        log.setLevel(logging.CRITICAL)  # it logs the traceback of what it raises
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch.export.load(io.BytesIO(content), extra_files=told).module()
    except Exception as error:
        raise BadInput(f"it is no program of torch.export: {said(error)}") from error
    finally:
        log.setLevel(level)
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.graph.erase_node(node)  # it runs in float64 too, to be compared
    graph.recompile()
    return graph, told[f"{KEY}.json"]


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors that name the file they are about."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error


@dataclass(frozen=True)
class Written:
    """What a file of `convert`'s holds: a state dict or a program, and its record if it has one."""

    content: Any
    record: Provenance | None


def read(path: Path) -> Written:
    """A deploy model's file.

    Raises:
        BadInput: there is no such file, `convert` writes none of that suffix, or it is damaged.
    """
    form = format_of(path)
    files.demand(path)
    content, record = form.decoded(path)
    try:
        return Written(content, Provenance.model_validate_json(record) if record else None)
    except ValueError as error:
        raise BadInput(f"{path} has a record that is damaged: {said(error)}") from error
