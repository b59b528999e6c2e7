"""What every test needs set: hypothesis profiles, threads, and a torchvision that imports.

Tests of the command line call it in this process, with `typer.testing.CliRunner`: a subprocess would import
torchvision without what is declared here.
"""

import gc

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support.vision import import_torchvision

# torch is slow on its first calls, which says nothing about the law under test.
settings.register_profile("base", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
# The same examples on every run: no failure is luck. `--hypothesis-profile=thorough` looks for new ones.
settings.register_profile("quick", settings.get_profile("base"), max_examples=100, derandomize=True)
settings.register_profile("thorough", settings.get_profile("base"), max_examples=2000)
settings.load_profile("quick")

# The maps under test are small: threads cost more than they save, and pytest-xdist runs one process a core.
torch.set_num_threads(1)


# Before any test module imports timm, which imports torchvision.
_torchvision_ops = import_torchvision()


def pytest_collection_finish() -> None:
    """All that was imported is there to stay: no collection of garbage has to look at it, and few are needed."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or config.getoption("--device", default="cuda") != "cuda":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
