"""The command, and how each of its commands ends."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from structrep.deliver import formats
from structrep.errors import BadInput, StructrepError, TrainingMode, Uninitialized, UnknownRule

HELP = (
    "Merges multi-branch training-time networks into plain deploy-time ones, exactly, and proves it.\n\n"
    "Exit codes: 0 done; 1 refused, or the proof failed; 2 wrong usage, or input that cannot be used; 130 interrupted. "
    "After 1 and 2 the reason is on stderr, and no file was written or changed."
)
REFUSED, UNUSABLE, INTERRUPTED = 1, 2, 130
ENDED = {REFUSED: "refused", UNUSABLE: "error", INTERRUPTED: "interrupted"}
UNUSABLE_INPUT = (BadInput, TrainingMode, Uninitialized, UnknownRule)
PAGE = 160  # columns of a table that no terminal shows
Working = Callable[[str], AbstractContextManager[None]]  # given what is being done; see _outcome


class Refused(Exception):
    """There is nothing to convert, or the proof failed."""


app = typer.Typer(name="structrep", help=HELP, no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(version_of())
        raise typer.Exit


@app.callback()
def structrep_(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@contextlib.contextmanager
def outcome(as_json: bool) -> Iterator[Working]:
    """Say what went wrong on stderr, and exit with its code.

    Given is what shows, on a terminal, what is being done; with a record to print it shows nothing.
    """
    try:
        yield lambda what: _working(what, as_json)
    except UNUSABLE_INPUT as error:
        _end(UNUSABLE, error)
    except (Refused, StructrepError) as error:
        _end(REFUSED, error)
    except KeyboardInterrupt as error:
        _end(INTERRUPTED, error)


def _end(code: int, error: BaseException) -> NoReturn:
    message = Text.assemble((f"{ENDED[code]}:", "bold red"), f" {str(error) or 'before the command was done'}")
    Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(message)
    raise typer.Exit(code) from error


@contextlib.contextmanager
def _working(what: str, quiet: bool) -> Iterator[None]:
    """A spinner, on a terminal. What the model's own code prints meanwhile goes to stderr."""
    spinner = Console(stderr=True, markup=False, quiet=quiet).status(what)
    with spinner, contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # packages tell each other: exported programs, in torch itself
        yield


def show(tables: Iterable[Table]) -> None:
    # cells are text as it stands: a pattern draws an optional part as [x], which is no markup
    console = Console(width=None if sys.stdout.isatty() else PAGE, markup=False, emoji=False, highlight=False)
    for table in tables:
        console.print(table)


def version_of() -> str:
    return formats.version("structrep") or "unknown: structrep is not installed as a package"
