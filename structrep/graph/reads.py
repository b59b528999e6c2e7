"""What a forward asked for as it was traced, beside its arguments, and what it was told."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from datetime import date
from types import CodeType
from typing import Any

import torch
from torch import fx


@dataclass(eq=False)
class Read:
    """One thing that a forward asked for, and what it was told.

    Args:
        holder: the module whose attribute it is, or the tensor whose dtype or device; the namespace or the function
            that has a name; the node that compares the dtype of an input; None of a question to torch or the system.
        text: how it is asked, behind what stands for the holder, ".low", ".cfg['t']", ".dtype", or around it, with
            `HELD` in its place; the whole question.
        told: the answer; `MISSING` for an attribute that there was none of.
        counts: whether a trace may be told otherwise.
        places: the code and the instruction of each time that it was asked, and how many entries deep.
    """

    holder: Any
    text: str
    told: Any
    counts: bool = True
    places: list[tuple[CodeType, int, int]] = field(default_factory=list)

    def of(self, holder: str) -> str:
        """The question as code, given the holder's."""
        return self.text.replace(PLACEHOLDER, holder) if PLACEHOLDER in self.text else f"{holder}{self.text}"

    @property
    def of_numbers(self) -> bool:
        """Whether it is asked for the numbers of a tensor, which no exported program can look at."""
        of = self.text.startswith(("bool(", "float(", "int(", "structrep_numbers("))
        return PLACEHOLDER in self.text and (of or self.text.endswith((".item()", ".tolist()")))

    @property
    def where_am_i(self) -> bool:
        """Whether it is asked how the forward is run, which a user changes without touching the model."""
        return (self.holder is None or isinstance(self.holder, fx.Node)) and isinstance(self.told, bool)

    @property
    def unstable(self) -> bool:
        """Whether the answer may be another at every call."""
        return self.text.partition("(")[0] in UNSTABLE | BY_ANY_NAME or is_date(self.told)


class _Missing:
    def __repr__(self) -> str:
        return "missing"


MISSING = _Missing()
PLACEHOLDER = "\0"  # what stands for the holder in a question around it: len(HELD)
_CLOCKS = ("time", "perf_counter", "monotonic", "process_time", "thread_time")
# by module, what can be asked of how a forward is run, and is noted as it is asked
OF_TORCH = {
    "torch.jit": ("is_tracing", "is_scripting"),
    "torch.onnx": ("is_in_onnx_export",),
    "torch.compiler": ("is_compiling", "is_exporting", "is_dynamo_compiling"),
    "torch.cuda": ("is_available",),
    "torch._dynamo": ("is_compiling",),
    "torch": (
        *("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled"),
        *("are_deterministic_algorithms_enabled", "get_num_threads", "get_float32_matmul_precision"),
        *("get_default_dtype", "get_default_device", "get_autocast_dtype", "get_autocast_gpu_dtype"),
    ),
}
UNSTABLE = {"os.urandom", *(f"time.{name}{unit}" for name in _CLOCKS for unit in ("", "_ns"))}
BY_ANY_NAME = {"globals", "__import__"}  # by which anything may be asked for


def is_date(value: Any) -> bool:
    """Whether a value is a function that tells the date."""
    of = getattr(value, "__self__", None)
    return isinstance(of, type) and issubclass(of, date) and value.__name__ in ("now", "utcnow", "today")


def noted() -> set[Any]:
    """The functions that are noted as they are asked."""
    of_torch = {getattr(sys.modules.get(home), name, None) for home, names in OF_TORCH.items() for name in names}
    tracing = torch.fx._symbolic_trace
    others = {getattr(tracing, name, None) for name in ("is_fx_tracing", "is_fx_symbolic_tracing")}
    return {os.getenv, torch._C._get_tracing_state, *of_torch, *others}
