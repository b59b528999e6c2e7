"""What every test needs set: hypothesis profiles, threads, and a torchvision that imports.

Tests of the command line call it in this process, with `typer.testing.CliRunner`: a subprocess would import
torchvision without what is declared here.
"""

import importlib

import pytest
import torch
from hypothesis import HealthCheck, settings

# torch is slow on its first calls, which says nothing about the law under test.
settings.register_profile("base", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
# The same examples on every run: no failure is luck. `--hypothesis-profile=thorough` looks for new ones.
settings.register_profile("quick", settings.get_profile("base"), max_examples=100, derandomize=True)
settings.register_profile("thorough", settings.get_profile("base"), max_examples=2000)
settings.load_profile("quick")

# The maps under test are small: threads cost more than they save, and pytest-xdist runs one process a core.
torch.set_num_threads(1)


def _import_torchvision() -> "torch.library.Library | None":
    """Import torchvision, declaring the two ops it cannot import without if its compiled ops did not load.

    The wheels are linked against one build of torch (on Linux, CUDA). Beside another (a CPU-only torch) their
    `_C` library does not load. torchvision allows for that everywhere but in one place: it registers fake
    kernels for `nms` and `qnms` whether or not they exist. Their schemas, as `_C` would have declared them,
    are all that is missing; the models, which are what the tests use, call no compiled op.

    Returned is the library that owns the schemas: they last as long as it does.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return None
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    else:
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")
    return library


# Before any test module imports timm, which imports torchvision.
_torchvision_ops = _import_torchvision()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or config.getoption("--device", default="cuda") != "cuda":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
