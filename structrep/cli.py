"""The command line: which rules there are, what they find in a model, and the merged weights in a file.

What was asked for goes to stdout, all else to stderr. A model is made by name or by the user's own code, and gets its
weights from a file: nothing is downloaded, and a file can do no more than give tensors.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import structrep
from structrep import checkpoint, files, registry
from structrep.errors import BadInput, StructrepError, TrainingMode, Uninitialized, UnknownRule, said, some
from structrep.report import Record, counted, plan_tables

HELP = (
    "Merges multi-branch training-time networks into plain deploy-time ones, exactly, and proves it.\n\n"
    "Exit codes: 0 done; 1 refused, or the proof failed; 2 wrong usage, or input that cannot be used. "
    "After 1 and 2 the reason is on stderr, and no file was written or changed."
)

REFUSED, UNUSABLE = 1, 2
UNUSABLE_INPUT = (BadInput, TrainingMode, Uninitialized, UnknownRule)

FORMS = "timm:NAME, torchvision:NAME or package.module:callable"
FETCHING = (
    "pretrained", "pretrained_backbone", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "weights",
    "weights_backbone",
)  # fmt: skip
PAGE = 160  # columns of a table that no terminal shows


class Refused(Exception):
    """There is nothing to convert, or the proof failed."""


class RuleRecord(Record):
    """One rule: its pattern is drawn as text."""

    name: str
    kind: str  # "family", from a paper, or "law", which holds for every term
    pattern: str
    source: str


class RulesRecord(Record):
    """The registered rules, in the order in which they are tried."""

    rules: tuple[RuleRecord, ...]


app = typer.Typer(name="structrep", help=HELP, no_args_is_help=True, pretty_exceptions_enable=False)

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help=f"{FORMS}; a callable gives an nn.Module or is one, and is looked for in the current folder too.",
        show_default=False,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Trained weights: a state dict or a training checkpoint, in a .safetensors file or one that "
        "torch.load(weights_only=True) reads.",
        show_default=False,
    ),
]
Entry = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Which of a checkpoint's state dicts to take: state_dict_ema, say.",
        show_default=False,
    ),
]
Arguments = Annotated[
    list[str] | None,
    typer.Option(
        "--arg",
        metavar="K=V",
        help="A keyword for the model's constructor; V is a Python literal. Repeatable.",
        show_default=False,
    ),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NxCxHxW",
        help="Size of an example input, 1x3x224x224 say, filled with seeded random numbers. Repeat it for a model of "
        "several inputs.",
        show_default=False,
    ),
]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rules", metavar="NAME", help="Use this rule instead of all. Repeatable; see structrep rules.",
        show_default=False,
    ),
]  # fmt: skip
AsJson = Annotated[bool, typer.Option("--json", help="Print the record as JSON.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(_version())
        raise typer.Exit


@app.callback()
def structrep_(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@app.command("rules")
def rules_(as_json: AsJson = False) -> None:
    """Show all rules: name, pattern and source, in the order in which they are tried."""
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
    _show([table])


@app.command()
def explain(
    source: Source,
    weights: Weights = None,
    entry: Entry = None,
    arg: Arguments = None,
    shape: Shapes = None,
    rules: Rules = None,
    why: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="LAYER LAYER", help="Say of two layers, by name, why they do not merge."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what convert would merge in a model, and of the rest why not."""
    with _outcome():
        model, inputs = _prepare(source, weights, entry, arg, shape)
        with _working("looking for merges"):
            plan = structrep.plan(model, inputs, rules=rules or None)
            plan.prove()
            answer = plan.why(*why) if why else None
    if as_json:
        print((answer or plan.record).model_dump_json(indent=2))
    elif answer:
        print(answer)
    else:
        _show(plan_tables(plan.record))


@app.command()
def convert(
    source: Source,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Where the merged state dict goes: a .safetensors or a .pt file.", show_default=False
        ),
    ],
    weights: Weights = None,
    entry: Entry = None,
    arg: Arguments = None,
    shape: Shapes = None,
    rules: Rules = None,
    verify: Annotated[
        bool,
        typer.Option(
            help="Prove every merge in float64 on its own and, with --shape, compare the whole models' outputs."
        ),
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if there is one.")] = False,
) -> None:
    """Merge a model and write its state dict.

    The file fits structrep.reparameterize(model): load it into that. It is written whole or not at all.
    """
    with _outcome():
        save = _saver(out)
        write = files.writer(out, force)
        model, inputs = _prepare(source, weights, entry, arg, shape)
        with _working("merging"):
            plan = structrep.plan(model, inputs, rules=rules or None)
            if verify:
                plan.prove()
            _demand_merges(plan)
            deploy = plan.apply()
        proof = "not proved"
        if verify:
            proof = "every merge proved on its own; give --shape to compare the whole models"
        if verify and inputs is not None:
            with _working("comparing the models"):
                found = structrep.verify(model, deploy, inputs)
            if not found.ok:
                raise Refused(f"the merged model differs from the original by more than rounding\n{found}")
            proof = (
                f"outputs compared on {found.device}, {found.dtype}: relative error {found.error:.1e}, "
                f"rounding noise of the original {found.noise:.1e}"
            )
        state = deploy.state_dict()
        with _working("writing"):
            write(save, files.plain(state))
    print(f"{counted(len(plan.merges), 'merge')}, {counted(len(plan.refusals), 'refusal')} in {type(model).__name__}")
    print(proof)
    print(f"{counted(len(state), 'tensor')} in {out}")


# --- how it ends ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _outcome() -> Iterator[None]:
    """Say what went wrong on stderr, and exit with its code."""
    try:
        yield
    except UNUSABLE_INPUT as error:
        _end(UNUSABLE, error)
    except (Refused, StructrepError) as error:
        _end(REFUSED, error)


def _end(code: int, error: Exception) -> NoReturn:
    word = "refused" if code == REFUSED else "error"
    message = Text.assemble((f"{word}:", "bold red"), f" {error}")
    Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(message)
    raise typer.Exit(code) from error


@contextlib.contextmanager
def _working(what: str) -> Iterator[None]:
    """A spinner, on a terminal. What the model's own code prints meanwhile goes to stderr."""
    with Console(stderr=True, markup=False).status(what), contextlib.redirect_stdout(sys.stderr):
        yield


def _show(tables: Iterable[Table]) -> None:
    # cells are text as it stands: a pattern draws an optional part as [x], which is no markup
    console = Console(width=None if sys.stdout.isatty() else PAGE, markup=False, emoji=False, highlight=False)
    for table in tables:
        console.print(table)


def _demand_merges(plan: structrep.Plan) -> None:
    if plan.merges:
        return
    reasons = [f"{refusal.where}, {refusal.what}: {refusal.reason}" for refusal in plan.refusals]
    raise Refused("\n  ".join(["there is nothing to merge in this model", *some(reasons)]))


def _version() -> str:
    try:
        return metadata.version("structrep")
    except metadata.PackageNotFoundError:
        return "unknown: structrep is not installed as a package"


# --- models -----------------------------------------------------------------------------------------------------------


def _prepare(
    source: str,
    weights: Path | None,
    entry: str | None,
    arguments: Sequence[str] | None,
    shapes: Sequence[str] | None,
) -> tuple[nn.Module, tuple[Tensor, ...] | None]:
    """The model in eval mode, with its weights, and example inputs for it."""
    keywords = _keywords(arguments or [])
    sizes = [_size(shape) for shape in shapes or []]
    with _working(f"making {source}"):
        model = _model(source, keywords)
        if weights is not None:
            found = checkpoint.weights_in(files.read(weights), model, weights)
            checkpoint.load(model, checkpoint.chosen(found, entry, weights), weights)
        return model.eval(), tuple(_examples(sizes)) or None


def _keywords(arguments: Sequence[str]) -> dict[str, Any]:
    keywords: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not (equals and name.isidentifier()):
            raise BadInput(f"--arg {argument!r} is no keyword: write --arg name=value")
        if name in keywords:
            raise BadInput(f"--arg gives {name!r} twice")
        try:
            keywords[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise BadInput(
                f"--arg {argument!r} is no Python literal: numbers, True, None, (1, 2) are, and text is in quotes, "
                f"\"{name}='text'\""
            ) from None
    return keywords


def _size(shape: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d{0,17}(x[1-9]\d{0,17})*", shape, re.ASCII):
        raise BadInput(f"--shape {shape!r} is no size: write positive numbers with x between, 1x3x224x224 say")
    return tuple(map(int, shape.split("x")))


def _examples(sizes: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        try:
            yield torch.randn(size, generator=generator)
        except (RuntimeError, TypeError, ValueError, OverflowError):
            shape = "x".join(map(str, size))
            raise BadInput(f"--shape {shape} has {math.prod(size):,} numbers, which memory does not hold") from None


def _model(source: str, keywords: dict[str, Any]) -> nn.Module:
    place, _, name = source.partition(":")
    if not (place and name):
        raise BadInput(f"{source!r} names no model: write {FORMS}")
    if place in ("timm", "torchvision"):
        fetching = sorted(key for key in FETCHING if keywords.pop(key, None))
        if fetching:
            raise BadInput(f"--arg {fetching[0]} would download weights: fetch them yourself and give --weights FILE")
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


def _timm(name: str) -> Callable[..., Any]:
    timm = files.imported("timm", "pip install 'structrep[timm]'")
    if not timm.is_model(name):
        raise BadInput(f"timm has no model named {name!r}{_near(name, timm.list_models())}")
    return lambda **keywords: timm.create_model(name, pretrained=False, **keywords)


def _torchvision(name: str) -> Callable[..., Any]:
    models = files.imported("torchvision", "pip install torchvision").models
    if name not in models.list_models():
        raise BadInput(f"torchvision has no model named {name!r}{_near(name, models.list_models())}")
    builder = models.get_model_builder(name)
    taken = inspect.signature(builder).parameters
    # of a detection model, the backbone's weights are fetched unless told not to
    none = {key: None for key in ("weights", "weights_backbone") if key in taken}
    return lambda **keywords: builder(**none, **keywords)


def _found(place: str, name: str) -> Any:
    """What a module calls `name`, dots and all."""
    if place.endswith(".py") or not all(part.isidentifier() for part in place.split(".")):
        raise BadInput(f"{place!r} is no module's name: write package.module:callable, without .py or slashes")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    found = files.imported(place, "is it in the current folder, or installed?")
    for part in name.split("."):
        if not hasattr(found, part):
            raise BadInput(f"{place} has nothing named {name!r}{_near(part, dir(found))}")
        found = getattr(found, part)
    return found


SAVERS: dict[str, files.Save] = {".safetensors": files.save_safetensors, ".pt": torch.save}


def _saver(out: Path) -> files.Save:
    if out.suffix not in SAVERS:
        raise BadInput(f"{out} has the suffix {out.suffix!r}: {' and '.join(SAVERS)} are supported")
    if out.suffix == ".safetensors":
        files.safetensors()
    return SAVERS[out.suffix]


# --- words ------------------------------------------------------------------------------------------------------------


def _a(value: Any) -> str:
    return f"an object of type {type(value).__name__}"


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, 3)
    return f": did you mean {' or '.join(near)}?" if near else ""
