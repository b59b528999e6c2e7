"""Example inputs, as arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from structrep.errors import BadInput

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]


def as_arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments.

    Raises:
        BadInput: neither a tensor, a tuple nor a mapping.
    """
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    raise BadInput(
        f"example_inputs is a {type(example).__name__}: give a tensor, a tuple of positional arguments or a mapping of "
        f"keyword arguments"
    )
