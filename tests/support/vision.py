"""torchvision, also where its build is for another torch."""

import importlib

import torch


def import_torchvision() -> "torch.library.Library | None":
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
