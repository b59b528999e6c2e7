"""The commands: text in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from torch import Tensor, fx, nn

import structrep
from structrep import files, registry, testing
from structrep.cli import models
from structrep.cli.app import Refused, Working, app, outcome, show
from structrep.cli.arguments import (
    DEFAULTS,
    Arguments,
    AsJson,
    Device,
    Download,
    Dtype,
    Entry,
    Settings,
    Shapes,
    Source,
    Trusted,
    Weights,
    autocast_of,
    device_of,
    dtype_named,
    examples_of,
    keywords_of,
    planning,
    size_of,
)
from structrep.convert.options import Options
from structrep.deliver import checkpoint
from structrep.deliver.formats import (
    checksum,
    format_of,
    provenance,
    read,
    said_of_formats,
)
from structrep.errors import BadInput, said
from structrep.prove.latency import latency
from structrep.prove.run import dtype_of
from structrep.prove.verify import verify as compare
from structrep.records.base import Record
from structrep.records.delivery import ExportRecord, Provenance
from structrep.records.latency import LatencyRecord
from structrep.records.plan import plan_tables
from structrep.records.verification import Verification


class RuleRecord(Record):
    """One rule: its pattern is drawn as text."""

    name: str
    kind: str  # "family", from a paper, or "law", which holds for every term
    pattern: str
    source: str


class RulesRecord(Record):
    """The registered rules, in the order in which they are tried."""

    rules: tuple[RuleRecord, ...]


class OverlapRecord(Record):
    """Two rules that one block fits, the example of the first."""

    rule: str
    other: str
    credited: str  # what a plan with both calls it
    because: str


class OverlapsRecord(Record):
    """The pairs of rules of which one matches the example of the other."""

    overlaps: tuple[OverlapRecord, ...]


@app.command("rules")
def rules_(
    overlaps: Annotated[
        bool, typer.Option("--overlaps", help="Show which rules match the example of another, and what is credited.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show all rules: name, pattern and source, in the order in which they are tried."""
    if overlaps:
        return _show_overlaps(as_json)
    record = RulesRecord(
        rules=tuple(
            RuleRecord(
                name=rule.name, kind="law" if rule.law else "family", pattern=str(rule.pattern), source=rule.source
            )
            for rule in registry.resolve(None)
        )
    )
    if as_json:
        print(record.model_dump_json(indent=2))
        return
    table = Table("name", "kind", "pattern", "source", title=f"{len(record.rules)} rules")
    for rule in record.rules:
        table.add_row(rule.name, rule.kind, rule.pattern, rule.source)
    show([table])


def _show_overlaps(as_json: bool) -> None:
    with outcome(as_json) as working, working("planning the examples of all rules"):
        found = testing.overlaps(registry.resolve(None))
    record = OverlapsRecord(
        overlaps=tuple(
            OverlapRecord(
                rule=one.rule,
                other=one.other,
                credited=one.credited,
                because=f"{one.narrower} is narrower, it says" if one.narrower else "it is tried first",
            )
            for one in found
        )
    )
    if as_json:
        print(record.model_dump_json(indent=2))
        return
    table = Table("example of", "matched by", "credited", "because", title=f"{len(found)} overlaps")
    for pair in record.overlaps:
        table.add_row(pair.rule, pair.other, pair.credited, pair.because)
    show([table])


@app.command()
@planning
def explain(
    source: Source,
    weights: Weights = None,
    entry: Entry = None,
    arg: Arguments = None,
    shape: Shapes = None,
    settings: Settings = DEFAULTS,
    download: Download = False,
    trusted: Trusted = False,
    why: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="LAYER LAYER", help="Say of two layers, by name, why they do not merge."),
    ] = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="Show how forwards are edited, as a patch for git apply.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what convert would merge in a model, and of the rest why not."""
    with outcome(as_json) as working:
        Options.of(**settings)
        given = _prepare(working, source, weights, entry, arg, shape, download, trusted)
        with working("looking for merges"):
            plan = structrep.plan(given.model, given.inputs, **settings)
            plan.prove()
            answer = plan.why(*why) if why else None
    if as_json:
        print((answer or plan.record).model_dump_json(indent=2))
    elif answer:
        print(answer)
    elif diff:
        print(plan.diff(), end="")
    else:
        show(plan_tables(plan.record))


@app.command()
@planning
def convert(
    source: Source,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help=f"Where the deploy model goes: {said_of_formats()}",
            show_default=False,
        ),
    ],
    weights: Weights = None,
    entry: Entry = None,
    arg: Arguments = None,
    shape: Shapes = None,
    settings: Settings = DEFAULTS,
    download: Download = False,
    trusted: Trusted = False,
    verify: Annotated[
        bool,
        typer.Option(
            help="Prove every merge in float64 on its own and, with --shape, compare the whole models' outputs: also "
            "those of the program that is written."
        ),
    ] = True,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report, an HTML page, there.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Merge a model and write the deploy model.

    A state dict fits structrep.reparameterize(model): load it into that. A file is written whole or not at all; it says
    what was merged, by which rules and versions, from which weights, and how it was verified.
    """
    with outcome(as_json) as working:
        form = format_of(out)
        form.demand()
        Options.of(**settings)
        write = files.writer(out, force)
        if report and report.resolve() == out.resolve():
            raise BadInput(f"--out and --report are the same file, {out}")
        write_report = files.writer(report, force) if report else None
        given = _prepare(working, source, weights, entry, arg, shape, download, trusted)
        model, inputs = given.model, given.inputs
        if inputs is None and form.program:
            raise BadInput(f"{out} is made from an example input: give its --shape, 1x3x224x224 say")
        with working("merging"):
            plan = structrep.plan(model, inputs, **settings)
            if verify:
                plan.prove()
            _demand_merges(plan)
            deploy = plan.apply()
        proof = None
        if verify and inputs is not None:
            with working("comparing the models"):
                proof = plan.verify(inputs, deploy)
            _demand(proof, "the merged model")
        with working("writing"):
            record = provenance(model, plan.record, source, proof)
            content = form.encoded(deploy, inputs, record.model_dump_json())
            runs = None
            if verify and inputs is not None and form.program:
                runs = compare(model, form.loaded(content), inputs, device="cpu")
                _demand(runs, f"the program for {out}")
            compared = proof or (plan.verify(inputs, deploy) if report and inputs is not None else None)
            shown = plan.page(deploy, inputs, compared) if report else b""
            write(files.save_bytes, content)
            if write_report:
                write_report(files.save_bytes, shown)
    done = ExportRecord(
        out=str(out),
        bytes=len(content),
        merges=len(plan.merges),
        provenance=record,
        proved=verify,
        runtime=runs,
    )
    print(done.model_dump_json(indent=2) if as_json else done)


@app.command()
@planning
def verify(
    source: Source,
    shape: Shapes = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What convert has written of this model with these weights: compare that, instead of merging anew.",
            show_default=False,
        ),
    ] = None,
    weights: Weights = None,
    entry: Entry = None,
    arg: Arguments = None,
    settings: Settings = DEFAULTS,
    download: Download = False,
    trusted: Trusted = False,
    device: Device = None,
    dtype: Dtype = None,
    autocast: Annotated[str | None, typer.Option(help="Run both under autocast to this dtype.")] = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Run both in that memory format.")] = False,
    tf32: Annotated[bool, typer.Option("--tf32", help="Let CUDA multiply float32 in TensorFloat-32.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare a model's deploy form with it: both against the float64 truth, on an example input."""
    with outcome(as_json) as working:
        if not shape:
            raise BadInput("the models are compared on an example input: give its --shape, 1x3x224x224 say")
        Options.of(**settings)
        if file is not None and (runtime := format_of(file).runtime):
            asked = {
                "--device": device not in (None, "cpu"), "--dtype": dtype, "--autocast": autocast,
                "--channels-last": channels_last, "--tf32": tf32,
            }  # fmt: skip
            if given_for_torch := [option for option, value in asked.items() if value]:
                raise BadInput(
                    f"{file} is a program that {runtime} runs on the CPU, in the dtype it was written in, so "
                    f"{given_for_torch[0]} says nothing of it: leave that out, or verify a .pt2 file"
                )
            device = "cpu"
        where = device_of(device)
        how: dict[str, Any] = {
            "device": where, "dtype": dtype_named(dtype), "autocast": autocast_of(autocast, where),
            "channels_last": channels_last, "tf32": tf32,
        }  # fmt: skip
        with working("reading the file"):
            written = read(file) if file is not None else None
        given = _prepare(working, source, weights, entry, arg, shape, download, trusted)
        model, inputs = given.model, given.inputs
        assert inputs is not None
        with working("comparing the models"):
            if file is not None and written is not None:
                _demand_weights(written.record, model, file)
            if written is not None and isinstance(written.content, nn.Module):
                found = compare(model, written.content, inputs, **how)
            else:
                plan = structrep.plan(model, inputs, **settings)
                _demand_merges(plan)
                deploy = plan.apply()
                if file is not None and written is not None:
                    files.fit(deploy, written.content, file)
                found = plan.verify(inputs, deploy, **how)
        print(found.model_dump_json(indent=2) if as_json else found, end="\n" if as_json else "")
        _demand(found, str(file or "the merged model"))


@app.command()
@planning
def bench(
    source: Source,
    shape: Shapes = None,
    weights: Weights = None,
    entry: Entry = None,
    arg: Arguments = None,
    settings: Settings = DEFAULTS,
    download: Download = False,
    trusted: Trusted = False,
    device: Device = None,
    dtype: Dtype = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile both with torch.compile.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="How often each runs.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Time a model and its deploy form in turn."""
    with outcome(as_json) as working:
        if not shape:
            raise BadInput("the models are timed on an example input: give its --shape, 1x3x224x224 say")
        Options.of(**settings)
        given = _prepare(working, source, weights, entry, arg, shape, download, trusted)
        where, what = device_of(device), dtype_named(dtype)
        with working("merging"):
            plan = structrep.plan(given.model, given.inputs, **settings)
            _demand_merges(plan)
            forms = {"training-time": given.model, "deploy": plan.apply()}
        with working("timing"):
            inputs = tuple(one.to(where, what) for one in given.inputs or ())
            moved: dict[str, nn.Module] = {}
            for name, model in forms.items():
                model.to(where, what)
                if compiled:
                    model.compile()
                moved[name] = model
            try:
                found: LatencyRecord = latency(moved, inputs, rounds)
            except Exception as error:
                raise BadInput(f"{source} does not run on that: {said(error)}") from error
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        show([found.table()])


def _demand_merges(plan: structrep.Plan) -> None:
    if not plan.merges:
        raise Refused(plan.record.nothing)


def _demand_weights(record: Provenance | None, model: nn.Module, file: Path) -> None:
    own = checksum(model)
    if record is not None and record.weights_sha256 != own:
        raise BadInput(
            f"{file} was made of other weights, SHA-256 {record.weights_sha256[:12]}..., and the model has "
            f"{own[:12]}...: give those with --weights"
        )


def _demand(found: Verification, what: str) -> None:
    if not found.ok:
        raise Refused(f"{what} differs from the original by more than rounding\n{found}")


@dataclass(frozen=True)
class Given:
    """What the user gave: a model in eval mode, and example inputs."""

    model: nn.Module
    inputs: tuple[Tensor, ...] | None


def _prepare(
    working: Working,
    source: str,
    weights: Path | None,
    entry: str | None,
    arguments: Sequence[str] | None,
    shapes: Sequence[str] | None,
    download: bool,
    trusted: bool,
) -> Given:
    keywords = keywords_of(arguments or [])
    sizes = [size_of(shape) for shape in shapes or []]
    if entry is not None and weights is None:
        raise BadInput(f"--entry {entry} is of a checkpoint: give it with --weights")
    with working(f"making {source}"):
        model = models.named(source, keywords, download, trusted)
        if weights is not None:
            content = checkpoint.read(weights, model, trusted)
            found = checkpoint.weights_in(content, model, weights)
            checkpoint.load(model, checkpoint.chosen(found, entry, weights), weights)
        if not isinstance(model, fx.GraphModule):  # an exported one has no modes
            model.eval()
    dtype = dtype_of(model)
    return Given(model, tuple(one.to(dtype) for one in examples_of(sizes)) or None)
