"""Text in, text out: the command `structrep`."""

from structrep.cli import commands, doctor
from structrep.cli.app import app

__all__ = ["app", "commands", "doctor"]
