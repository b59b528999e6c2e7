"""The pages keep their word: every snippet runs, and what a page shows as printed is what is printed.

* The ```python blocks of a page run in order, as one program. A ```text block right behind one is what it prints.
* In a ```console block, a line `$ structrep ...` runs, and the lines below it are what it prints.
* A link to a file leads to one.

What another machine measures otherwise (rounding errors, times, sizes of files, versions) need be of the same form, no
more.

`python -m tests.pages.test_docs` writes what is printed now into the pages, or into those that it is given.
"""

import contextlib
import io
import os
import re
import runpy
import shlex
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import structrep
from structrep import blocks, registry
from structrep.cli import app
from tests.support import ROOT
from tests.support.vision import import_torchvision

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ (structrep [^\n]*)\n((?:(?!\$ )[^\n]*\n)*)", re.MULTILINE)
MEASURED = re.compile(r"\d\.\de[-+]\d\d|\d+\.\d+ ms|[\d,]+ bytes|\b\d+\.\d+\.\d+(?:\+\w+)?|\d\.\d\d(?= │ +ok)")

# The user's own module, as the pages speak of it, and its weights.
MYNET = """
from torch import nn

from structrep.blocks import ACBlock2d, RepVGGBlock2d


def make(width=16):
    return nn.Sequential(RepVGGBlock2d(3, width, 3, padding=1), nn.ReLU(), ACBlock2d(width, width, 3, padding=1))
"""


@dataclass
class Output:
    """What a page shows as printed, where in the page, and what was printed."""

    start: int
    end: int
    shown: str
    printed: str


def outputs(page: Path) -> Iterator[Output]:
    """Run all of a page in the current folder."""
    Path("mynet.py").write_text(MYNET)
    sys.path.insert(0, os.getcwd())
    torch.manual_seed(0)
    module = sys.modules["page"] = types.ModuleType("page")
    exec(MYNET, vars(module))
    torch.save(module.make().state_dict(), "trained.pt")

    text = page.read_text(encoding="utf-8")
    printed: str | None = ""
    end = 0
    for block in BLOCK.finditer(text):
        language, content, behind = block[1], block[2], not text[end : block.start()].strip()
        if language == "text" and behind and printed is not None:
            yield Output(block.start(2), block.end(2), content, printed)
        printed, end = "", block.end()
        if language == "python":
            # behind as many lines as in the page, so that a traceback names the page's own
            code = compile("\n" * text.count("\n", 0, block.start(2)) + content, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                try:
                    exec(code, vars(module))
                except torch.onnx.OnnxExporterError:
                    if exports_norms():
                        raise
                    printed = None  # and what is shown behind it is not compared
                else:
                    printed = out.getvalue()
        for command in COMMAND.finditer(content) if language == "console" else ():
            result = CliRunner(env={"COLUMNS": "84"}).invoke(app, shlex.split(command[1])[1:])
            assert result.exit_code == 0, f"{page.name}: {command[1]}\n{result.output}"
            if command[2].strip():
                yield Output(
                    block.start(2) + command.start(2), block.start(2) + command.end(2), command[2], result.stdout
                )


def exports_norms() -> bool:
    """Whether torch writes a norm to ONNX: 2.6 does not, with an onnxscript that is newer than itself."""
    try:
        torch.onnx.export(nn.BatchNorm2d(1).eval(), (torch.ones(1, 1, 2, 2),), dynamo=True, verbose=False)
    except torch.onnx.OnnxExporterError:
        return False
    return True


def tidy(text: str) -> str:
    """Without the blanks that nobody sees."""
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n") + "\n"


def form(text: str) -> str:
    """Without what is measured, and what moves with its length; a norm says less of itself in torch 2.6."""
    if "bias=" not in repr(nn.BatchNorm2d(1)):
        text = text.replace(", bias=True, track_running_stats", ", track_running_stats")
    return re.sub(" +", " ", MEASURED.sub("#", tidy(text)))


@pytest.fixture
def forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder; rules and modules that a page makes are gone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry.default, "_rules", dict(registry.default._rules))
    yield
    for name in ("page", "mynet"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs_and_prints_what_it_shows(page: Path) -> None:
    for output in outputs(page):
        assert form(output.shown) == form(output.printed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_pictures_are_what_is_drawn() -> None:
    for name, picture in runpy.run_path(str(ROOT / "docs" / "make_pictures.py"))["pictures"]().items():
        kept = (ROOT / "docs" / "images" / name).read_text(encoding="utf-8")
        assert kept == picture, f"{name} is not what is drawn: run python docs/make_pictures.py"


def test_the_reference_has_all_that_is_public() -> None:
    said = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    errors = {name for name in dir(structrep.errors) if name in structrep.__all__}  # the page takes all of them
    public = {*structrep.__all__, *blocks.__all__} - errors
    missing = sorted(name for name in public if not re.search(rf"\b{name}\b", said))
    assert not missing, f"docs/reference says nothing of {', '.join(missing)}"


def write(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for output in reversed(list(outputs(page))):
        if form(output.shown) != form(output.printed):
            text = text[: output.start] + tidy(output.printed) + text[output.end :]
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    declared = import_torchvision()
    kept = dict(registry.default._rules)
    for page in [Path(name).resolve() for name in sys.argv[1:]] or PAGES:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            write(page)
            os.chdir(ROOT)
        registry.default._rules = dict(kept)
        sys.modules.pop("mynet", None)
