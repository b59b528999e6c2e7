"""`make test-gpu`: the tests of this folder, and a page of what they measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="where tests/gpu runs; cpu tries the tests themselves")
    parser.addoption("--gpu-page", action="store_true", help="write docs/gpu.md")


@dataclass
class Measured:
    """What the tests found, for the page."""

    errors: list[tuple[str, str, float, float]] = field(default_factory=list)  # model, how, error, noise
    latencies: list[tuple[str, str, float, float]] = field(default_factory=list)  # model, how, before, after, in ms


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    wanted = torch.device(request.config.getoption("--device"))
    if wanted.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return wanted


@pytest.fixture(scope="session")
def everything() -> Measured:
    return Measured()


@pytest.fixture
def measured(request: pytest.FixtureRequest, everything: Measured, device: torch.device) -> Iterator[Measured]:
    """Written down after each test, for a run may be cut short."""
    yield everything
    if request.config.getoption("--gpu-page"):
        PAGE.write_text(page(everything, device))


def page(found: Measured, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    cudnn = f", cuDNN {torch.backends.cudnn.version()}" if device.type == "cuda" else ""
    lines = [
        "# On the GPU",
        "",
        f"Written by `make test-gpu` on {name}: torch {torch.__version__}, CUDA {torch.version.cuda}{cudnn}.",
        "",
        "## Errors",
        "",
        "Largest error of an output, relative to its largest value, against the float64 truth: of the deploy model, "
        "and of the training-time model by its own rounding in the same dtype. The limit is 8 times the latter.",
        "",
        "| model | how | error | noise | ratio |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {m} | {how} | {e:.1e} | {n:.1e} | {e / n:.2f} |" for m, how, e, n in found.errors),
        "",
        "## Latency",
        "",
        "Medians of interleaved runs, in milliseconds, batch of 8.",
        "",
        "| model | how | training time | deploy | times faster |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {m} | {how} | {a:.3f} | {b:.3f} | {a / b:.2f} |" for m, how, a, b in found.latencies),
        "",
    ]
    return "\n".join(lines)


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
