"""Runtimes and graph optimisers behind one interface: a model in, something to call and a count of its nodes out.

Counted is what is left in the runtime's own graph once it has optimised it. An addition is one of two activations: a
branch or a skip, not a bias; one that a runtime computes within the node of a convolution counts as an addition still.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = ("convolutions", "additions", "norms", "nodes")
BIASED = 3  # inputs of a convolution in onnxruntime: value, kernel, bias; a fourth one is added to what comes out


@dataclass(frozen=True)
class Built:
    """A model as a runtime runs it.

    Args:
        run: to be called under `torch.no_grad()`, with a batch of any size.
        counts: by kind, of `KINDS`; what was counted in an eager run has "scales", "average pools" and
            "concatenations" besides.
    """

    run: Callable[[Tensor], Tensor]
    counts: Counter[str]


@dataclass(frozen=True)
class Failed:
    """Why a runtime does not take a model."""

    reason: str


def build(name: str, model: nn.Module, x: Tensor) -> Built | Failed:
    """A model in eval mode, and an input with a batch of more than one, in a runtime or past an optimiser, by name."""
    make = {**RUNTIMES, **OPTIMISERS, **CUDA}[name]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return make(model, x)
    except Exception as error:  # a reason is all that can be had of an exporter that gives up
        lines = str(error).strip().splitlines() or [""]
        return Failed(f"{type(error).__name__}: {lines[0][:200]}")


# --- counting -------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts what one forward pass runs, by kind."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.strip("_")
        both = [one for one in args[:2] if isinstance(one, Tensor)]
        self.counts.update(
            {
                "nodes": not func.is_view,
                "convolutions": "convolution" in name,
                "norms": "batch_norm" in name,
                "additions": name == "add" and len(both) == 2 and both[0].ndim > 1 and both[0].shape == both[1].shape,
                "scales": name in ("mul", "div")
                and len(both) == 2
                and any(_per_channel(*pair) for pair in (both, both[::-1])),
                "average pools": name == "avg_pool2d",
                "concatenations": name == "cat",
            }
        )
        return func(*args, **(kwargs or {}))


def _per_channel(activation: Any, factor: Any) -> bool:
    """Whether a value is multiplied with, or has subtracted, one number for each channel, or a single one."""
    return activation.ndim == 4 and factor.numel() in (1, activation.shape[1]) and len(factor.shape) < 5


def executed(run: Callable[[Tensor], Tensor], x: Tensor) -> Counter[str]:
    """What a call runs, counted."""
    with torch.no_grad(), Operations() as operations:
        run(x)
    counts: Counter[str] = +operations.counts
    return counts


def _eager(model: nn.Module, x: Tensor) -> Built:
    return Built(model, executed(model, x))


# --- torch ----------------------------------------------------------------------------------------


def _compiled(freezing: bool) -> Callable[[nn.Module, Tensor], Built]:
    def make(model: nn.Module, x: Tensor) -> Built:
        import torch._dynamo
        import torch._inductor.config as inductor
        from torch._inductor.compile_fx import compile_fx

        seen: set[torch.Size] = set()
        counts: Counter[str] = Counter()

        def backend(
            graph: fx.GraphModule, inputs: list[Tensor]
        ) -> Any:  # its own, or code is shared with other settings
            return compile_fx(graph, inputs)

        compiled = torch.compile(model, dynamic=False, backend=backend)

        def count(graph: fx.Graph) -> None:  # of each piece that the model is compiled in, for the first shape
            if len(seen) == 1:
                counts.update(_lowered(graph))

        def run(x: Tensor) -> Tensor:
            if x.shape in seen:
                result: Tensor = compiled(x)
                return result
            seen.add(x.shape)
            # A form that another one has been compiled from before is a recompilation of the same code.
            torch._dynamo.config.recompile_limit = 64
            with inductor.patch(freezing=freezing, post_grad_custom_pre_pass=count, fx_graph_cache=False):
                first: Tensor = compiled(x)
                return first

        run(x)
        return Built(run, counts)

    return make


def _lowered(graph: fx.Graph) -> Counter[str]:
    """Inductor's graph, past its passes over constants and before it fuses what is done per element: there a norm is
    written out, and starts with a mean per channel that is subtracted."""
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op != "call_function" or getattr(node.target, "is_view", False):
            continue
        counts["nodes"] += 1
        counts["convolutions"] += "convolution" in str(node.target)
        values = [one.meta["val"] for one in node.args[:2] if isinstance(one, fx.Node) and "val" in one.meta]
        if len(values) == 2:
            same = values[0].ndim > 1 and values[0].shape == values[1].shape
            counts["additions"] += node.target is torch.ops.aten.add.Tensor and same
            counts["norms"] += node.target is torch.ops.aten.sub.Tensor and not same and _per_channel(*values)
    return counts


def exported(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    """A program with an open batch."""
    return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _export(model: nn.Module, x: Tensor) -> Built:
    program = exported(model, x).module()
    return Built(program, executed(program, x))


def _fx_fuse(model: nn.Module, x: Tensor) -> Built:
    from torch.fx.experimental.optimization import fuse

    return _eager(fuse(model), x)


def _fuse_fx(model: nn.Module, x: Tensor) -> Built:
    from torch.ao.quantization.quantize_fx import fuse_fx

    return _eager(fuse_fx(model), x)


def _torchscript(model: nn.Module, x: Tensor) -> Built:
    script = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(model, x)))
    counts: Counter[str] = Counter()
    for node in _script_nodes(script.inlined_graph):
        kind = node.kind()
        if "Constant" in kind:
            continue
        counts["nodes"] += 1
        counts["convolutions"] += "convolution" in kind
        counts["norms"] += "batch_norm" in kind
        if kind in ("aten::add", "aten::add_"):
            counts["additions"] += not any("Constant" in one.node().kind() for one in list(node.inputs())[:2])
    return Built(script, counts)


def _script_nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _script_nodes(inner)


def _pt2e(model: nn.Module, x: Tensor) -> Built:
    """What is made ready for a quantizer that quantizes nothing."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
    from torchao.quantization.pt2e.quantizer import Quantizer

    class Nothing(Quantizer):  # type: ignore[misc]
        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            return model

        def validate(self, model: fx.GraphModule) -> None:
            return None

    prepared = prepare_pt2e(exported(model, x).module(), Nothing())
    return Built(prepared, executed(prepared, x))


def _cuda_graph(model: nn.Module, x: Tensor) -> Built:
    captured: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def run(x: Tensor) -> Tensor:
        if x.shape not in captured:
            held, graph, stream = x.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # what is set up in a first pass cannot be captured
                    model(held)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                result = model(held)
            captured[x.shape] = graph, held, result
        graph, held, result = captured[x.shape]
        held.copy_(x)
        graph.replay()
        return result

    run(x)
    return Built(run, executed(model, x))


# --- ONNX and what reads it -----------------------------------------------------------------------


@contextlib.contextmanager
def onnx_file(model: nn.Module, x: Tensor, *, optimize: bool = True) -> Iterator[Path]:
    """The model as torch's exporter writes it, past the optimiser of onnxscript or not, with an open batch."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        program = torch.onnx.export(exported(model, x), dynamo=True, verbose=False, optimize=optimize)
        if program is None:
            raise RuntimeError("torch.onnx.export gave no program")
        program.save(path, external_data=False)
        yield path


def session(path: Path, *, optimize: bool = True, written: Path | None = None) -> Any:
    """An onnxruntime session with torch's number of threads.

    Args:
        optimize: let it optimise the graph, as it does by default.
        written: where it is to write the optimised graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # that a written graph is for this processor alone
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or one session waits on the cores of another
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if written is not None:
        options.optimized_model_filepath = str(written)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _onnxruntime(optimize: bool) -> Callable[[nn.Module, Tensor], Built]:
    """onnxruntime as it comes; or, without its optimiser, what onnxscript's left."""

    def make(model: nn.Module, x: Tensor) -> Built:
        with onnx_file(model, x) as path:
            written = path.with_name("optimised.onnx")
            found = session(path, optimize=optimize, written=written)
            counts = _onnx_counts(written)
        name = found.get_inputs()[0].name

        def run(x: Tensor) -> Tensor:
            return torch.from_numpy(found.run(None, {name: x.numpy()})[0])

        return Built(run, counts)

    return make


def _onnx_counts(path: Path) -> Counter[str]:
    import onnx

    graph = onnx.load(path).graph
    held = _held(graph)
    counts: Counter[str] = Counter()
    for node in graph.node:
        counts["nodes"] += node.op_type != "Constant"
        convolution = node.op_type.endswith("Conv")
        counts["convolutions"] += convolution
        counts["additions"] += _adds(node, held) or (convolution and len(node.input) > BIASED and node.input[3] != "")
        counts["norms"] += node.op_type == "BatchNormalization"
    return counts


def _held(graph: Any) -> set[str]:
    """Names of the constants of an ONNX graph."""
    return {one.name for one in graph.initializer} | {n.output[0] for n in graph.node if n.op_type == "Constant"}


def _adds(node: Any, held: set[str]) -> bool:
    return node.op_type == "Add" and not held.intersection(node.input)


def _openvino(model: nn.Module, x: Tensor) -> Built:
    import onnx
    import openvino

    with onnx_file(model, x) as path:
        graph = onnx.load(path).graph
        held = _held(graph)
        kinds = {node.name: "additions" for node in graph.node if _adds(node, held)}
        kinds |= {node.name: "norms" for node in graph.node if node.op_type == "BatchNormalization"}
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(path),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "INFERENCE_PRECISION_HINT": "f32",  # by default bfloat16, on processors that have it
                "PERFORMANCE_HINT": "LATENCY",
            },
        )
    request = compiled.create_infer_request()

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(request.infer([x.numpy()])[0])

    run(x)
    counts: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        told = node.get_rt_info()
        kind = told["layerType"].value
        if kind in ("Const", "Input", "Output"):
            continue
        counts["nodes"] += 1
        counts["convolutions"] += "Convolution" in kind
        origins = {name.split("/")[0] for name in told["originalLayersNames"].value.split(",")}
        for origin in origins:
            became = kinds.get(origin)
            if became == "additions" or (became == "norms" and kind in ("Eltwise", "Subgraph", "MultiplyAdd")):
                counts[became] += 1
                del kinds[origin]
    return Built(run, counts)


# --- which there are ------------------------------------------------------------------------------

RUNTIMES: dict[str, Callable[[nn.Module, Tensor], Built]] = {
    "eager": _eager,
    "torch.compile": _compiled(freezing=False),
    "torch.compile, freezing": _compiled(freezing=True),
    "torch.export": _export,
    "onnxruntime": _onnxruntime(optimize=True),
    "OpenVINO": _openvino,
}
OPTIMISERS: dict[str, Callable[[nn.Module, Tensor], Built]] = {
    "torch.fx fuse": _fx_fuse,
    "torch.ao fuse_fx": _fuse_fx,
    "TorchScript, optimised": _torchscript,
    "onnxscript optimizer": _onnxruntime(optimize=False),
    "torchao prepare_pt2e": _pt2e,
}
CUDA: dict[str, Callable[[nn.Module, Tensor], Built]] = {
    "eager": _eager,
    "torch.compile": RUNTIMES["torch.compile"],
    "CUDA graph": _cuda_graph,
}
PACKAGES = ("timm", "onnx", "onnxscript", "onnxruntime", "openvino", "torchao")  # whose versions count
