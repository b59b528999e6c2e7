"""What runtimes and graph optimisers make of a training-time network, and what they make of the deploy one.

    python -m benchmarks.runtimes                    # all of it; writes docs/runtimes.md
    python -m benchmarks.runtimes --only graphs      # nodes left in each graph, latency, errors
    python -m benchmarks.runtimes --only int8        # post-training quantization of trained networks
    python -m benchmarks.runtimes --quick            # a small part of both; nothing is written

Both forms go through each runtime of benchmarks/engines.py. Errors are the largest of an output, relative to the
largest output, against a float64 run of the training-time model.

Post-training quantization wants networks whose norms and weights were trained, so small ones are: that of
examples/accuracy, plain and expanded, on the digits of scikit-learn. Each is quantized as it was trained and as it
was merged, by onnxruntime, with the same training images to calibrate.
"""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import structrep
from benchmarks import engines, measure, plain
from examples.accuracy.run import PLAIN, REGIMES, Regime, images, plain_net, train, training_set
from structrep.prove.run import relative_error

PAGE = measure.ROOT / "docs" / "runtimes.md"
FORMS = ("training-time", "deploy")
BATCHES = (1, 8)
WARM = 3
QUICK_SIZE = 32  # of images


def _timm(name: str) -> Callable[[], nn.Module]:
    return partial(plain.timm_model, name)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "repvgg_a0": (_timm("repvgg_a0"), plain.IMAGE),
    "mobileone_s0": (_timm("mobileone_s0"), plain.IMAGE),
    "mobileone_s1": (_timm("mobileone_s1"), plain.IMAGE),
    "repghostnet_100": (_timm("repghostnet_100"), plain.IMAGE),
    "fastvit_t8": (_timm("fastvit_t8"), plain.IMAGE),
    "repvit_m1": (_timm("repvit_m1"), plain.IMAGE),
    "dbb_stack": (plain.CASES["dbb_stack"].training, plain.FEATURES),
}

# --- graphs ---------------------------------------------------------------------------------------


def through_runtimes(name: str, names: list[str], rounds: int, size: int) -> Iterator[dict[str, Any]]:
    """Both forms of a model in each runtime: nodes, errors, and samples where it is one to run models in.

    Args:
        size: of an image; 0 for what the model is made for.
    """
    make, shape = MODELS[name]
    shape = (shape[0], size, size) if size else shape
    torch.manual_seed(0)
    training = make()

    def image(batch: int) -> Tensor:
        return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))

    x = image(BATCHES[-1])
    forms = {"training-time": training, "deploy": structrep.reparameterize(training, image(1))}
    with torch.no_grad():
        truth = copy.deepcopy(training).double()(x.double())
        noise = relative_error(training(x), truth)
    for engine in names:
        built = {form: engines.build(engine, model, x) for form, model in forms.items()}
        runs = {form: one.run for form, one in built.items() if isinstance(one, engines.Built)}
        with torch.no_grad():
            found: dict[str, Any] = {
                "model": name,
                "engine": engine,
                "counts": {form: dict(one.counts) for form, one in built.items() if isinstance(one, engines.Built)},
                "failed": {form: one.reason for form, one in built.items() if isinstance(one, engines.Failed)},
                "errors": {form: relative_error(run(x), truth) for form, run in runs.items()},
                "noise": noise,
                "seconds": {},
            }
            for batch in BATCHES if engine in engines.RUNTIMES and len(runs) == len(FORMS) else ():
                taken = {form: partial(run, image(batch)) for form, run in runs.items()}
                found["seconds"][f"{batch}"] = measure.in_turn(taken, rounds, WARM)
        yield found
        del built, runs
        torch._dynamo.reset()
        gc.collect()


COLUMNS = (
    "model", "through", "convolutions", "additions", "norms", "nodes", "training-time / deploy, batch 1", "batch 8",
    "error / eager training-time error",
)  # fmt: skip


def row(found: dict[str, Any]) -> list[str]:
    cells = [found["model"], found["engine"]]
    counts = [found["counts"].get(form) for form in FORMS]
    for kind in engines.KINDS:
        cells.append(" → ".join("fails" if one is None else f"{one.get(kind, 0)}" for one in counts))
    for batch in BATCHES:
        seconds = found["seconds"].get(f"{batch}")
        cells.append(str(measure.ratio(seconds, *FORMS)) if seconds else "-")
    errors = [found["errors"].get(form) for form in FORMS]
    cells.append(" → ".join("fails" if one is None else f"{one / found['noise']:,.1f}" for one in errors))
    return cells


def graphs_text(record: dict[str, Any]) -> str:
    of = record["machine"]
    versions = ", ".join(f"{name} {of[name]}" for name in ("torch", *engines.PACKAGES))
    failed = [
        f"* {one['model']}, {form}, {one['engine']}: `{reason}`"
        for one in record["rows"]
        for form, reason in one["failed"].items()
    ]
    return "\n\n".join(
        [
            f"{of['cpu']}, {of['threads']} threads; {versions}. Ratios of neighbouring runs: the median and the middle "
            f"half of {record['rounds']}.",
            measure.markdown(COLUMNS, map(row, record["rows"])),
            *(["What could not be run:", "\n".join(failed)] if failed else []),
        ]
    )


def nothing_quantized_text(record: dict[str, Any]) -> str:
    rows = [
        [one["model"], *(f"{100 * one['errors'][form]:.5f} %" if form in one["errors"] else "fails" for form in FORMS)]
        for one in record["rows"]
        if one["engine"] == "torchao prepare_pt2e"
    ]
    return measure.markdown(("model", *(f"{form}: the output is off by" for form in FORMS)), rows)


# --- INT8 -----------------------------------------------------------------------------------------

FAMILIES = ("plain", "repvgg", "mobileone", "dbb", "acb")
REGIME, SEEDS = "digits", 3
CALIBRATION = 256  # training images
# torchao's X86InductorQuantizer is left out: it stops with an assertion at MobileOne's `0 + branch`
QUANTIZERS = ("a scale per tensor", "a scale per channel")


def trained(family: str, seed: int, regime: Regime) -> nn.Module:
    """The network of examples/accuracy, plain or expanded, trained from the seed's weights, in eval mode."""
    torch.manual_seed(seed)
    net: nn.Module = plain_net()
    if family != PLAIN[0]:
        net = structrep.expand(net, family, init="paper")
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on a CPU
    train(net, *training_set(regime, seed), regime, seed)
    return net.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)  # type: ignore[call-overload,no-any-return]


class Images:
    """Calibration images as onnxruntime asks for them."""

    def __init__(self, name: str, x: Tensor) -> None:
        self.batches = iter([{name: part.numpy()} for part in x.split(64)])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


def by_onnxruntime(model: Path, shown: Tensor, per_channel: bool) -> Callable[[Tensor], Tensor]:
    from onnxruntime.quantization import QuantFormat, QuantType, quant_pre_process, quantize_static

    with tempfile.TemporaryDirectory() as folder:
        prepared, quantized = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(model, prepared, skip_symbolic_shape=True)
        name = engines.session(model).get_inputs()[0].name
        quantize_static(
            prepared,
            quantized,
            Images(name, shown),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=per_channel,
        )
        found = engines.session(quantized)
    return lambda x: torch.from_numpy(found.run(None, {name: x.numpy()})[0])


def ranges(model: Path, shown: Tensor) -> dict[str, float]:
    """What a scale per tensor makes of the model, norms folded: for weights, and for what convolutions, additions and
    norms give on the calibration images, the largest number over the root mean square, and the error of eight bits; in
    the worst layer."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(model)
    held = {one.name: numpy_helper.to_array(one) for one in graph.graph.initializer}
    layers = [node for node in graph.graph.node if node.op_type in ("Conv", "Gemm")]
    weights = [held[node.input[1]] for node in layers]
    given = [n.output[0] for n in graph.graph.node if n.op_type in ("Conv", "Gemm", "Add", "BatchNormalization")]
    known = {one.name for one in graph.graph.output}
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in given if name not in known)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "all.onnx"
        onnx.save(graph, path)
        found = engines.session(path, optimize=False)
    activations = found.run(given, {found.get_inputs()[0].name: shown.numpy()})
    spread = {"weights": [_spread(w, -_largest(w), _largest(w)) for w in weights]}
    spread["activations"] = [_spread(a, min(float(a.min()), 0.0), max(float(a.max()), 0.0)) for a in activations]
    return {
        f"{what}: {name}": max(one[index] for one in found)
        for what, found in spread.items()
        for index, name in enumerate(("largest / rms", "error"))
    }


def _largest(values: Any) -> float:
    return float(np.abs(values).max())


def _spread(values: Any, low: float, high: float) -> tuple[float, float]:
    """The largest value over the root mean square, and the error of 255 even steps from `low` to `high` over it."""
    rms = float(np.sqrt(np.square(values).mean()))
    step = (high - low) / 255
    lost = float(np.sqrt(np.square(np.round(values / step) * step - values).mean()))
    return _largest(values) / rms, lost / rms


def quantized(family: str, seed: int, regime: Regime) -> Iterator[dict[str, Any]]:
    """One trained network, in each form, in float32 and past each quantizer: test images that are right, and how far
    the logits moved, root mean square over root mean square."""
    net = trained(family, seed, regime)
    shown = training_set(regime, seed)[0][:CALIBRATION]
    _, _, x, y = images(regime.source)
    forms = {"training-time": net}
    if family != PLAIN[0]:
        forms["deploy"] = structrep.reparameterize(net, x[:8])
    for form, model in forms.items():
        with torch.no_grad(), engines.onnx_file(model, x[:2]) as path:
            runs: dict[str, Callable[[Tensor], Tensor]] = {
                "float32": model,
                QUANTIZERS[0]: by_onnxruntime(path, shown, per_channel=False),
                QUANTIZERS[1]: by_onnxruntime(path, shown, per_channel=True),
            }
            logits = {name: run(x) for name, run in runs.items()}
            spread = ranges(path, shown)
        yield {
            "family": family,
            "seed": seed,
            "form": form,
            "tested": len(y),
            "correct": {name: int((given.argmax(1) == y).sum()) for name, given in logits.items()},
            "moved": {
                name: float(
                    (given - logits["float32"]).square().mean().sqrt() / logits["float32"].square().mean().sqrt()
                )
                for name, given in logits.items()
            },
            "ranges": spread,
        }


def _of(rows: list[dict[str, Any]]) -> Mapping[tuple[str, str], list[dict[str, Any]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in rows:
        found.setdefault((one["family"], one["form"]), []).append(one)
    return found


ACCURACY = ("family", "form", "float32", *QUANTIZERS, *(f"logits moved: {name}" for name in QUANTIZERS))
SPREAD = ("weights: largest / rms", "weights: error", "activations: largest / rms", "activations: error")


def accuracy_rows(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Mean accuracies, what eight bits change in points (from the smallest to the largest of the seeds), and how far
    the logits moved."""
    for (family, form), runs in _of(rows).items():
        cells = [family, "" if family == PLAIN[0] else form]
        cells.append(f"{100 * mean(one['correct']['float32'] / one['tested'] for one in runs):.2f} %")
        for name in QUANTIZERS:
            change = [100 * (one["correct"][name] - one["correct"]["float32"]) / one["tested"] for one in runs]
            cells.append(f"{mean(change):+.2f} ({min(change):+.2f} to {max(change):+.2f})")
        cells += [f"{100 * median(one['moved'][name] for one in runs):.1f} %" for name in QUANTIZERS]
        yield cells


def spread_rows(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Medians over the seeds, each of the worst layer."""
    for (family, form), runs in _of(rows).items():
        middle = [median(one["ranges"][name] for one in runs) for name in SPREAD]
        shown = (
            f"{value:.1f}" if "rms" in name else f"{100 * value:.2f} %"
            for name, value in zip(SPREAD, middle, strict=True)
        )
        yield [family, "" if family == PLAIN[0] else form, *shown]


def int8_text(record: dict[str, Any]) -> str:
    of = record["machine"]
    tested = record["rows"][0]["tested"]
    return "\n\n".join(
        [
            f"{record['regime']}, {record['seeds']} seeds, {tested} test images; torch {of['torch']}, onnxruntime "
            f"{of['onnxruntime']}. Accuracy in float32, and what eight bits change in "
            "percentage points: the mean, and the smallest and the largest of the seeds. How far the logits moved is "
            "the median over the seeds, root mean square.",
            measure.markdown(ACCURACY, accuracy_rows(record["rows"])),
            "Weights and activations of the worst layer with one scale per tensor, medians over the seeds.",
            measure.markdown(("family", "form", *SPREAD), spread_rows(record["rows"])),
        ]
    )


# --- both -----------------------------------------------------------------------------------------


def graphs(names: list[str], through: list[str], rounds: int, size: int, written: bool) -> None:
    record: dict[str, Any] = {"machine": measure.machine(*engines.PACKAGES), "rounds": rounds, "rows": []}
    for name in track(names, "runtimes", console=Console(stderr=True)):
        able = [one for one in through if name in plain.COMPILED or not one.startswith("torch.compile")]
        for found in through_runtimes(name, able, rounds, size):
            record["rows"].append(found)
            if written:
                measure.save("runtimes", record)  # each time: a runtime may take the process down
                measure.write(PAGE, "benchmarks/runtimes.py: graphs", graphs_text(record))
                measure.write(PAGE, "benchmarks/runtimes.py: nothing quantized", nothing_quantized_text(record))
    measure.show("training-time → deploy", COLUMNS, map(row, record["rows"]))
    for one in record["rows"]:
        for form, reason in one["failed"].items():
            print(f"{one['model']}, {form}, {one['engine']}: {reason}")


def int8(families: tuple[str, ...], regime: Regime, written: bool) -> None:
    rows: list[dict[str, Any]] = []
    record: dict[str, Any] = {"machine": measure.machine(*engines.PACKAGES), "regime": REGIME, "rows": rows}
    for seed in track(range(regime.seeds), "seeds", console=Console(stderr=True)):
        rows += [found for family in families for found in quantized(family, seed, regime)]
        if written:
            record["seeds"] = seed + 1
            measure.save("int8", record)
            measure.write(PAGE, "benchmarks/runtimes.py: int8", int8_text(record))
    measure.show("INT8", ACCURACY, accuracy_rows(rows))
    measure.show("in the worst layer, a scale per tensor", ("family", "form", *SPREAD), spread_rows(rows))


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A small part, on small images; nothing is written.")] = False,
    only: Annotated[Literal["graphs", "int8", "both"], typer.Option()] = "both",
    model: Annotated[list[str], typer.Option(help="Only these models; of INT8, families.")] = [],  # noqa: B006
    engine: Annotated[list[str], typer.Option(help="Only these runtimes and optimisers.")] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="How often each form counts.")] = 20,
    threads: Annotated[int, typer.Option(help="Of every runtime.")] = 2,
) -> None:
    torch.set_num_threads(threads)
    every = (*engines.RUNTIMES, *engines.OPTIMISERS)
    for given, known in ((model, (*MODELS, *FAMILIES)), (engine, every)):
        if unknown := set(given) - set(known):
            raise typer.BadParameter(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    written = not (quick or model or engine)
    names = [name for name in model or (["repghostnet_100"] if quick else MODELS) if name in MODELS]
    families = tuple(name for name in model or (("repvgg",) if quick else FAMILIES) if name in FAMILIES)
    light = [name for name in every if not name.startswith("torch.compile")]  # which compile for minutes
    if only != "int8":
        graphs(names, engine or (light if quick else list(every)), 3 if quick else rounds, QUICK_SIZE * quick, written)
    if only != "graphs":
        regime = replace(REGIMES[REGIME], seeds=SEEDS)
        int8(families, replace(REGIMES["digits"], epochs=3, seeds=1) if quick else regime, written)


if __name__ == "__main__":
    typer.run(main)
