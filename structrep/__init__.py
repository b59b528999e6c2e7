"""Structural re-parameterization for any model: train many linear branches, deploy the equal plain network.

deploy = structrep.reparameterize(model)
"""

from structrep import rules as _rules  # noqa: F401  registers the catalogue
from structrep.algebra import ConvMap
from structrep.checkpoint import convert_checkpoint
from structrep.driver import Plan, assert_merged, explain, plan, reparameterize
from structrep.errors import Refusal, StructrepError, Unmerged, VerificationError
from structrep.expand import expand, expand_layers
from structrep.monitor import monitor
from structrep.probe import probe
from structrep.proof import verify
from structrep.readers import reader
from structrep.registry import Registry, Rule, rule
from structrep.report import Verification

__all__ = [
    "ConvMap",
    "Plan",
    "Refusal",
    "Registry",
    "Rule",
    "StructrepError",
    "Unmerged",
    "Verification",
    "VerificationError",
    "assert_merged",
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
