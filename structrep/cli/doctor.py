"""What is installed, and what each part of structrep needs."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from rich.table import Table
from torch import nn

import structrep
from structrep import files, registry
from structrep.cli.app import Refused, app, outcome, show, version_of
from structrep.cli.arguments import AsJson
from structrep.deliver.formats import FORMATS, version
from structrep.errors import BadInput, Refusal, StructrepError
from structrep.prove.latency import accelerator, device_name
from structrep.records.base import Record, counted


@dataclass(frozen=True)
class Part:
    """A package that some of structrep needs."""

    package: str
    of: str
    remedy: str = ""


PARTS = (
    Part("torch", "everything"),
    Part("networkx", "everything"),
    *(Part(name, f"writing {one.suffix} files", one.remedy) for one in FORMATS.values() for name in one.writers),
    *(Part(name, f"checking {one.suffix} files", one.remedy) for one in FORMATS.values() for name in one.checkers),
    Part("timm", "timm: models", "pip install 'structrep[timm]'"),
    Part("torchvision", "torchvision: models", "pip install torchvision"),
    Part("transformers", "hf: models, the callback", "pip install 'structrep[transformers]'"),
    Part("lightning", "the callback", "pip install 'structrep[lightning]'"),
    Part("matplotlib", "plots", "pip install 'structrep[plot]'"),
)


class PartRecord(Record):
    """A package as it is here."""

    package: str
    version: str  # "" where it is not installed
    of: str
    trouble: str = ""


class DoctorRecord(Record):
    """What is here, and whether the rules hold here."""

    python: str
    platform: str
    device: str
    structrep: str
    parts: tuple[PartRecord, ...]
    rules: dict[str, str]  # by rule, what is wrong with its example; "" where it is proved


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed and for what, and prove every rule's example on this machine."""
    with outcome(as_json) as working:
        with working("looking at packages and rules"):
            record = DoctorRecord(
                python=platform.python_version(),
                platform=platform.platform(terse=True),
                device=device_name(accelerator()),
                structrep=version_of(),
                parts=tuple(map(_looked_at, PARTS)),
                rules={rule.name: _tried(rule) for rule in registry.resolve(None) if rule.example is not None},
            )
        if as_json:
            print(record.model_dump_json(indent=2))
        else:
            table = Table(
                "package", "version", "for", "", title=f"structrep {record.structrep}, Python {record.python}"
            )
            table.caption = f"{record.platform}; {record.device}"
            for part in record.parts:
                table.add_row(part.package, part.version or "-", part.of, part.trouble)
            show([table])
            proved = sum(not what for what in record.rules.values())
            print(f"{proved} of {counted(len(record.rules), 'rule')} proved on their examples")
        if wrong := [f"{name}: {what}" for name, what in record.rules.items() if what]:
            raise Refused("\n  ".join(wrong))


def _looked_at(part: Part) -> PartRecord:
    found = version(part.package)
    trouble = part.remedy if not found else ""
    if found:
        try:
            files.imported(part.package, part.remedy)
        except BadInput as error:
            trouble = str(error)
    return PartRecord(package=part.package, version=found, of=part.of, trouble=trouble)


def _tried(rule: structrep.Rule) -> str:
    """What is wrong with the example of a rule; "" if it is merged, by that rule, and proved."""
    assert rule.example is not None
    try:
        plan = structrep.plan(nn.Sequential(rule.example()).eval(), rules=[rule])
        plan.prove()
    except (StructrepError, Refusal) as error:
        return str(error)
    return "" if plan.merges else "; ".join(refusal.reason for refusal in plan.refusals) or "it merges nothing"
