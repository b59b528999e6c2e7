"""Whose code a frame runs: a user's, torch's, or the engine's own."""

from __future__ import annotations

import functools
from types import FrameType, FunctionType
from typing import Any

from structrep.modules.positions import branches

_PICKING, _PICKS = ("operator", "itertools"), ("min", "max", "sorted", "filter", "next")


def is_engine(frame: FrameType) -> bool:
    """Whether a frame is the engine's own; its blocks are models like others."""
    return _of_engine(frame.f_globals.get("__name__"))


def is_library(frame: FrameType) -> bool:
    """Whether a frame is torch's or the engine's."""
    return _of_library(frame.f_globals.get("__name__"))


def may_go_otherwise(frame: FrameType) -> bool:
    """Whether the code of a frame may go several ways, or calls a function that may pick between what it is given."""
    code, space = frame.f_code, frame.f_globals
    if branches(code):
        return True
    for name in code.co_names:
        value = space.get(name)
        if isinstance(value, FunctionType) and not _of_library(value.__module__) and branches(value.__code__):
            return True
        if getattr(value, "__name__", None) in _PICKING or name in _PICKS:
            return True
    return False


def outside(frame: FrameType | None, names: tuple[str, ...]) -> FrameType | None:
    """The innermost frame of a module whose name begins with none of these."""
    while frame is not None and str(frame.f_globals.get("__name__")).startswith(names):
        frame = frame.f_back
    return frame


def _of_engine(name: Any) -> bool:
    return str(name).startswith("structrep.") and not str(name).startswith(("structrep.blocks", "structrep.deployed"))


@functools.lru_cache(4096)  # asked at every attribute
def _of_library(name: Any) -> bool:
    return str(name).partition(".")[0] == "torch" or _of_engine(name)
