"""What was written to a file."""

from __future__ import annotations

from structrep.records.base import Record, counted
from structrep.records.plan import PlanRecord
from structrep.records.verification import Verification


class CheckpointRecord(Record):
    """What was made of a checkpoint."""

    source: str
    out: str
    entries: dict[str, PlanRecord]  # by where the state dict stood: "state_dict_ema", say
    left: tuple[str, ...] = ()  # what was left out, as it fits the training-time model only

    def __str__(self) -> str:
        lines = [f"{self.source} -> {self.out}"]
        lines += [
            f"  {entry}: {counted(len(plan.merges), 'merge')}, {counted(len(plan.refusals), 'refusal')}"
            for entry, plan in self.entries.items()
        ]
        return "\n".join([*lines, *([f"  left out: {', '.join(self.left)}"] if self.left else [])])


class Provenance(Record):
    """What a file says of the deploy model in it."""

    source: str  # of the training-time model
    model: str
    weights_sha256: str  # of the training-time model's state dict
    rules: dict[str, int]  # how many merges each has done
    refusals: int
    versions: dict[str, str]
    verification: Verification | None = None


class ExportRecord(Record):
    """A deploy model that was written."""

    out: str
    bytes: int
    merges: int
    provenance: Provenance
    proved: bool  # every merge on its own
    runtime: Verification | None = None  # of the program that was written, .onnx in onnxruntime

    def __str__(self) -> str:
        of = self.provenance
        lines = [f"{counted(self.merges, 'merge')}, {counted(of.refusals, 'refusal')} in {of.model}"]
        if not self.proved:
            lines.append("not proved")
        elif of.verification is None:
            lines.append("every merge proved on its own; give --shape to compare the whole models")
        for what, found in (("outputs", of.verification), ("outputs of the program", self.runtime)):
            if found is not None:
                lines.append(
                    f"{what} compared on {found.device}, {found.dtype}: relative error {found.error:.1e}, rounding "
                    f"noise of the original {found.noise:.1e}, {'; '.join(filter(None, (found.against, found.lost)))}"
                )
        return "\n".join([*lines, f"{self.bytes:,} bytes in {self.out}"])
