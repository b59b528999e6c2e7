"""A folder to run commands in."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.running import NETS


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder of its own, with a module `nets`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "fails.py").write_text("import surely_not_installed\n")
    (tmp_path / "wrong.py").write_text("def net(:\n")
    yield tmp_path
    for name in set(sys.modules) - before:
        if Path(str(getattr(sys.modules[name], "__file__", ""))).parent == tmp_path:
            del sys.modules[name]
