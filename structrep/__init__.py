"""Structural re-parameterization for any model: train many linear branches, deploy the equal plain network.

deploy = structrep.reparameterize(model)

What is named here is imported when it is first asked for: beside `import torch`, `import structrep` costs little.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from structrep import blocks as blocks
    from structrep import errors as errors
    from structrep import testing as testing
    from structrep.algebra import ConvMap
    from structrep.blocks.places import expand_layers
    from structrep.convert.calls import assert_merged, explain, plan, reparameterize
    from structrep.convert.plan import Plan
    from structrep.deliver.checkpoint import convert_checkpoint
    from structrep.errors import (
        MergeDropped,
        NothingMerged,
        Refusal,
        StructrepError,
        Unmerged,
        VerificationError,
    )
    from structrep.prove.measured import Measured
    from structrep.prove.verify import verify
    from structrep.read.modules import reader
    from structrep.read.probe import probe
    from structrep.records.verification import Verification
    from structrep.registry import Registry, Rule, rule
    from structrep.train.expand import check_optimizer, expand
    from structrep.train.monitor import monitor

__all__ = [
    "ConvMap",
    "Measured",
    "MergeDropped",
    "NothingMerged",
    "Plan",
    "Refusal",
    "Registry",
    "Rule",
    "StructrepError",
    "Unmerged",
    "Verification",
    "VerificationError",
    "assert_merged",
    "check_optimizer",
    "convert_checkpoint",
    "expand",
    "expand_layers",
    "explain",
    "monitor",
    "plan",
    "probe",
    "reader",
    "reparameterize",
    "rule",
    "verify",
]

_HOME = {
    "ConvMap": "algebra",
    "Measured": "prove.measured",
    "MergeDropped": "errors",
    "NothingMerged": "errors",
    "Plan": "convert.plan",
    "Refusal": "errors",
    "Registry": "registry",
    "Rule": "registry",
    "StructrepError": "errors",
    "Unmerged": "errors",
    "Verification": "records.verification",
    "VerificationError": "errors",
    "assert_merged": "convert.calls",
    "check_optimizer": "train.expand",
    "convert_checkpoint": "deliver.checkpoint",
    "expand": "train.expand",
    "expand_layers": "blocks.places",
    "explain": "convert.calls",
    "monitor": "train.monitor",
    "plan": "convert.calls",
    "probe": "read.probe",
    "reader": "read.modules",
    "reparameterize": "convert.calls",
    "rule": "registry",
    "verify": "prove.verify",
}

if not TYPE_CHECKING:  # to a type checker, what is not named above does not exist

    def __getattr__(name: str) -> Any:
        if home := _HOME.get(name):
            value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
            globals()[name] = value
            return value
        module = f"{__name__}.{name}"
        if not name.startswith("_"):
            try:
                return importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name != module:
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
