"""How long the forms of a network take: training-time, deploy, written plain by hand, and timm's own deploy form.

    python -m benchmarks.latency                     # CPU, all cases, batch 1 and 8; writes docs/runtimes.md
    python -m benchmarks.latency --device cuda       # float32, float16 and bfloat16, channels last too, CUDA graphs
    python -m benchmarks.latency --quick             # one small case, few rounds; nothing is written

Cases are those of benchmarks/plain.py. The forms run in turn, in one process, and a ratio is one run over the run
beside it. Each form, in each runtime, is first compared with a float64 run of the training-time model.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

from benchmarks import engines, measure, plain
from structrep.prove.run import relative_error

PAGE = measure.ROOT / "docs" / "runtimes.md"
PAIRS = (("training-time", "plain"), ("deploy", "plain"), ("deploy", "timm's deploy"))
ON_CPU = ("eager", "torch.compile", "torch.compile, freezing", "onnxruntime", "OpenVINO")
ON_CUDA = tuple(engines.CUDA)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WARM = 3

# Training-time over plain that this is held to in float32, by model, runtime and batch. That of RepVGG-B0 is from the
# paper's own ablation on a GPU (arXiv:2101.03697): 1810 images a second against 1061.
AIMS_ON_CUDA = {("repvgg_b0", "eager", 128): 1.71}
AIMS_ON_CPU = {
    ("repvgg_a0", "eager", 1): 1.66,
    ("repvgg_a0", "onnxruntime", 1): 1.16,
    ("mobileone_s1", "eager", 1): 1.89,
    ("mobileone_s1", "onnxruntime", 1): 1.15,
    ("fastvit_t8", "eager", 1): 1.48,
    ("fastvit_t8", "onnxruntime", 1): 1.33,
    ("repvit_m1", "eager", 1): 1.32,
    ("repvit_m1", "onnxruntime", 1): 1.17,
    ("acb_stack", "eager", 1): 2.4,
    ("acb_stack", "onnxruntime", 1): 1.7,
    ("dbb_stack", "eager", 1): 5.0,
    ("dbb_stack", "onnxruntime", 1): 8.4,
    ("expandnet_stack", "eager", 1): 12.8,
    ("expandnet_stack", "onnxruntime", 1): 17.0,
}


def aim(found: dict[str, Any], device: str) -> float | None:
    """What a row is held to."""
    if (found["dtype"], found["channels_last"]) != ("float32", False):
        return None
    aims = AIMS_ON_CUDA if device == "cuda" else AIMS_ON_CPU
    return aims.get((found["model"], found["engine"], found["batch"]))


def settings(device: str, compiled: bool) -> list[tuple[str, bool]]:
    """Dtype, and whether the memory format is channels last."""
    if device == "cpu":
        return [("float32", False)]
    if compiled:  # it takes long
        return [("float32", False), ("float16", True)]
    return [(dtype, last) for dtype in DTYPES for last in (False, True)]


def is_compiled(engine: str) -> bool:
    return engine.startswith("torch.compile")


def measured(
    case: plain.Case, names: list[str], batches: list[int], rounds: int, device: str
) -> Iterator[dict[str, Any]]:
    """Samples of all forms of a case, for each setting, runtime and batch."""
    forms = case.forms()
    small = case.input(2)
    with torch.no_grad():
        truth = copy.deepcopy(forms["training-time"]).double()(small.double())
    for dtype, channels_last in settings(device, any(map(is_compiled, names))):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        like: dict[str, Any] = {"device": device, "dtype": DTYPES[dtype], "memory_format": layout}
        moved = {name: copy.deepcopy(form).to(**like) for name, form in forms.items()}
        for engine in names:
            built = {name: engines.build(engine, form, small.to(**like)) for name, form in moved.items()}
            found = {"model": case.name, "engine": engine, "dtype": dtype, "channels_last": channels_last}
            failed = {name: one.reason for name, one in built.items() if isinstance(one, engines.Failed)}
            runs = {name: one.run for name, one in built.items() if isinstance(one, engines.Built)}
            with torch.no_grad():
                errors = {
                    name: relative_error(run(small.to(**like)).cpu().double(), truth) for name, run in runs.items()
                }
                for batch in batches:
                    x = case.input(batch).to(**like)
                    seconds = measure.in_turn({name: partial(run, x) for name, run in runs.items()}, rounds, WARM)
                    yield found | {"batch": batch, "seconds": seconds, "errors": errors, "failed": failed}
            del built, runs
            torch._dynamo.reset()
            gc.collect()


COLUMNS = (
    "model", "runtime", "batch", "deploy, ms", "training-time / plain", "aim", "deploy / plain",
    "deploy / timm's deploy",
)  # fmt: skip


def row(found: dict[str, Any], device: str) -> list[str]:
    engine = found["engine"]
    if found["dtype"] != "float32" or found["channels_last"]:
        engine += f", {found['dtype']}{', channels last' if found['channels_last'] else ''}"
    seconds = found["seconds"]

    def over(of: str, to: str) -> str:
        if {of, to} <= seconds.keys():
            return str(measure.ratio(seconds, of, to))
        return "fails" if {of, to} & found["failed"].keys() else "-"

    ratios = [over(of, to) for of, to in PAIRS]
    held = aim(found, device)
    milliseconds = f"{1e3 * median(seconds['deploy']):.2f}" if "deploy" in seconds else "fails"
    return [
        found["model"],
        engine,
        f"{found['batch']}",
        milliseconds,
        ratios[0],
        f"{held:.2f}" if held else "",
        *ratios[1:],
    ]


def table(record: dict[str, Any]) -> str:
    of = record["machine"]
    return (
        f"{of['cpu']}, {of['threads']} threads, torch {of['torch']}, onnxruntime {of['onnxruntime']}, OpenVINO "
        f"{of['openvino']}, timm {of['timm']}; float32. Ratios of neighbouring runs: the median and the middle half of "
        f"{record['rounds']}.\n\n" + measure.markdown(COLUMNS, [row(found, "cpu") for found in record["rows"]])
    )


def main(
    quick: Annotated[bool, typer.Option("--quick", help="One small case, few rounds; nothing is written.")] = False,
    model: Annotated[list[str], typer.Option(help="Only these cases.")] = [],  # noqa: B006
    engine: Annotated[list[str], typer.Option(help="Only these runtimes.")] = [],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Images at a time; 1 and 8, on CUDA 1, 8 and 128.")] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="How often each form counts.")] = 30,
    threads: Annotated[int, typer.Option(help="Of every runtime on the CPU.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    torch.set_num_threads(threads)
    every = ON_CUDA if device == "cuda" else ON_CPU
    if unknown := set(engine) - set(every):
        raise typer.BadParameter(f"there is no {', '.join(sorted(unknown))} on {device}; there are {', '.join(every)}")
    names = engine or list(("eager", "onnxruntime") if quick and device == "cpu" else every)
    batches = batch or ([1] if quick else [1, 8, 128] if device == "cuda" else [1, 8])
    cases = plain.chosen(model or (["acb_stack"] if quick else []))
    written = not (quick or model or engine or batch)
    record: dict[str, Any] = {"machine": measure.machine(*engines.PACKAGES), "rounds": rounds, "rows": []}
    rows: list[dict[str, Any]] = record["rows"]
    jobs = [(case, [name for name in names if not is_compiled(name)]) for case in cases]
    jobs += [(case, list(filter(is_compiled, names))) for case in cases if case.name in plain.COMPILED]
    for case, some in track(jobs, "cases", console=Console(stderr=True)):
        for found in measured(case, some, batches, 3 if quick else rounds, device):
            rows.append(found)
            if written:
                measure.save(f"latency-{device}", record)  # each time: a runtime may take the process down
    measure.show("ratios: median (middle half)", COLUMNS, [row(found, device) for found in rows])
    for found in rows:
        for form, reason in found["failed"].items():
            print(f"{found['model']}, {form}, {found['engine']}: {reason}")
    if written and device == "cpu":
        measure.write(PAGE, "benchmarks/latency.py", table(record))


if __name__ == "__main__":
    typer.run(main)
