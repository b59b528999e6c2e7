"""What the tests of this folder measured goes to a folder, row by row; `python -m tests.needs.gpu` makes the page."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.needs.gpu.near import Error


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="where tests/needs/gpu runs; cpu tries the tests themselves")
    parser.addoption("--gpu-results", type=Path, help="a folder for what was measured")


@dataclass
class Results:
    """Rows for the page, in a file for each process that finds some."""

    folder: Path | None

    def error(self, model: str, how: str, found: Error) -> None:
        self._add("error", model, how, found.error, found.noise)

    def latency(self, model: str, how: str, before: float, after: float) -> None:
        """Note medians in milliseconds."""
        self._add("latency", model, how, before, after)

    def _add(self, *row: str | float) -> None:
        if self.folder is not None:
            with (self.folder / f"{os.getpid()}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    wanted = torch.device(request.config.getoption("--device"))
    if wanted.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return wanted


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, device: torch.device) -> Results:
    folder: Path | None = request.config.getoption("--gpu-results")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "device.json").write_text(json.dumps(described(device)))
    return Results(folder)


def described(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device.type}: torch {torch.__version__}"
    return (
        f"{torch.cuda.get_device_name(device)}: torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}"
    )


@pytest.fixture
def timed(device: torch.device) -> Callable[..., list[float]]:
    """Medians in milliseconds of some functions, run in turn."""

    def measure(*runs: Callable[[], Any], rounds: int = 30) -> list[float]:
        taken: list[list[float]] = [[] for _ in runs]
        for turn in range(rounds + 5):
            for times, run in zip(taken, runs, strict=True):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if turn >= 5:
                    times.append(1e3 * (time.perf_counter() - start))
        return [statistics.median(times) for times in taken]

    return measure
