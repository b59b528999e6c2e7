"""Records: frozen, printed as tables, dumped as JSON."""

from __future__ import annotations

import io

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from structrep.records.markup import filled

WORST = 8  # merged layers that a table of a verification shows


class Record(BaseModel):
    model_config = ConfigDict(frozen=True)


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def as_text(*tables: Table, width: int = 160) -> str:
    """Tables as plain text."""
    # Cells may hold anything, also what rich would take for markup.
    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False, emoji=False, highlight=False)
    for table in tables:
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def as_html(*tables: Table) -> str:
    """Tables as HTML, for notebooks."""
    return str(filled("tables.html.j2", tables=tables))
