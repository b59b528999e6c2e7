"""Arguments and options that several commands have."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
import typer
from torch import Tensor

from structrep import registry
from structrep.cli import models
from structrep.errors import BadInput, said


def _sources(incomplete: str) -> list[str]:
    """The places of models; where it is clear which place is meant, all models there."""
    places = [place for place in models.PLACES if place.startswith(incomplete) or incomplete.startswith(place)]
    if len(places) != 1:
        return places
    return [f"{places[0]}{name}" for name in models.names(places[0])] or places


def _rule_names(incomplete: str) -> list[str]:
    return [rule.name for rule in registry.resolve(None)]


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help=f"{models.FORMS}; a callable gives an nn.Module or is one, and is looked for in the current folder too.",
        autocompletion=_sources,
        show_default=False,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Trained weights: a state dict or a training checkpoint, in a .safetensors file or one that "
        "torch.load(weights_only=True) reads; or an index of such files, or the folder with it. With --trusted, files "
        "with any object in them and folders of torch.distributed.checkpoint.",
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
Borders = Annotated[
    list[str] | None,
    typer.Option(
        "--inexact-borders",
        metavar="NAME",
        help="Allow merges of these modules, by name or glob, to differ at the border. Repeatable.",
        show_default=False,
    ),
]
Probe = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Find out by running them what these layers are, by name or glob; needs --shape. Repeatable.",
        show_default=False,
    ),
]
Reserve = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Carry the residual of these blocks, by name or glob, in channels of its own (RMNet). Repeatable.",
        show_default=False,
    ),
]
Download = Annotated[bool, typer.Option("--download", help="Allow weights and configurations to be fetched.")]
Trusted = Annotated[
    bool, typer.Option("--trusted", help="Allow files to hold any object, a module say: reading it can run any code.")
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
        "--rules",
        metavar="NAME",
        help="Use this rule instead of all. Repeatable; see structrep rules.",
        autocompletion=_rule_names,
        show_default=False,
    ),
]
Norms = Annotated[
    str,
    typer.Option(
        help="fold, or keep: merge the blocks of structrep.expand alone.", autocompletion=lambda: ["fold", "keep"]
    ),
]
Cost = Annotated[
    str,
    typer.Option(
        help="What decides whether a merge pays: counted, or measured, which needs --shape.",
        autocompletion=lambda: ["counted", "measured"],
    ),
]
Device = Annotated[str | None, typer.Option(help="Where to run both; CUDA where there is one.", show_default=False)]
Dtype = Annotated[str | None, typer.Option(help="What to run both in: float32, bfloat16, float16.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the record as JSON.")]


def dtype_named(name: str | None) -> torch.dtype | None:
    found = getattr(torch, name, None) if name else None
    if name and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise BadInput(f"{name!r} is no floating-point dtype: float32, bfloat16, float16 and float64 are")
    return found


def autocast_of(name: str | None, device: torch.device) -> torch.dtype | None:
    found = dtype_named(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch only warns, and goes on without
        try:
            torch.autocast(device.type, found, enabled=found is not None)
        except (RuntimeError, UserWarning) as error:
            raise BadInput(f"torch has no autocast to {name} on {device.type}: give bfloat16 or float16") from error
    return found


# What all commands that plan are told beside the model, by the names that `structrep.plan` has for it.
PLANNING: dict[str, tuple[Any, Any]] = {
    "rules": (Rules, None),
    "inexact_borders": (Borders, None),
    "probe": (Probe, None),
    "reserve": (Reserve, None),
    "norms": (Norms, "fold"),
    "cost": (Cost, "counted"),
}


Settings: TypeAlias = Mapping[str, Any]  # those of them that a command was given
DEFAULTS: Settings = {}


def planning(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `settings` the options for them, where that argument stands."""
    signature = inspect.signature(command, eval_str=True)
    options = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)
        for name, (annotation, default) in PLANNING.items()
    ]
    taken = [options if name == "settings" else [one] for name, one in signature.parameters.items()]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        settings = {name: given.pop(name) for name in PLANNING}
        command(**given, settings={name: value for name, value in settings.items() if value not in (None, [])})

    run.__signature__ = signature.replace(parameters=[one for some in taken for one in some])  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for some in taken for one in some}
    return run


def device_of(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(f"--device {name!r} cannot be used: {said(error)}") from error
    return device


def keywords_of(arguments: Sequence[str]) -> dict[str, Any]:
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


def size_of(shape: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d{0,17}(x[1-9]\d{0,17})*", shape, re.ASCII):
        raise BadInput(f"--shape {shape!r} is no size: write positive numbers with x between, 1x3x224x224 say")
    return tuple(map(int, shape.split("x")))


def examples_of(sizes: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        try:
            yield torch.randn(size, generator=generator)
        except (RuntimeError, TypeError, ValueError, OverflowError):
            shape = "x".join(map(str, size))
            raise BadInput(f"--shape {shape} has {math.prod(size):,} numbers, which memory does not hold") from None
