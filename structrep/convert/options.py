"""The settings of a plan, validated once: the same from Python and on the command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf, ValidationError
from torch import nn

from structrep.errors import BadInput
from structrep.modules.arguments import Example
from structrep.prove.measured import Measured
from structrep.registry import Registry, Rule

Rules: TypeAlias = Registry | Iterable[str | Rule] | None
Names: TypeAlias = str | Iterable[str]  # of modules, or globs; one alone may stand for itself
Layers: TypeAlias = str | type[nn.Module] | Iterable[str | type[nn.Module]]
Norms: TypeAlias = Literal["fold", "keep"]
Cost: TypeAlias = Literal["counted", "measured"] | Measured


def _several(given: Any) -> Any:
    """One name or type alone stands for itself."""
    return (given,) if isinstance(given, (str, type)) else given


Globs = Annotated[tuple[str, ...], BeforeValidator(_several)]
NAMES = "names of modules, or globs such as 'layer1.*'"


class Options(BaseModel):
    """What `structrep.plan` is told beside the model and its example inputs; see there.

    The description of a field is what an error about it tells to give.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    rules: Any = Field(None, description="a registry, or names of rules and rules")
    inexact_borders: Globs = Field((), description=NAMES)
    probe: Annotated[tuple[str | type[nn.Module], ...], BeforeValidator(_several)] = Field(
        (), description=f"{NAMES}, or types of modules"
    )
    reserve: Globs = Field((), description=NAMES)
    norms: Norms = Field("fold", description="'fold' or 'keep'")
    cost: Literal["counted", "measured"] | InstanceOf[Measured] = Field(
        "counted", description="'counted', 'measured' or a structrep.Measured"
    )

    @classmethod
    def of(cls, **settings: Any) -> Options:
        """
        Raises:
            BadInput: a setting is none that there is.
        """
        try:
            return cls(**settings)
        except ValidationError as error:
            setting = str(error.errors()[0]["loc"][0])
            raise BadInput(f"{setting}={settings[setting]!r}: give {cls.model_fields[setting].description}") from error

    def demand(self, example_inputs: Example | None) -> None:
        """Raise BadInput where settings do not go together, or need example inputs."""
        if self.cost != "counted" and example_inputs is None:
            raise BadInput("cost='measured' needs example_inputs: they tell the shapes that layers are timed on")
        if self.cost != "counted" and self.norms == "keep":
            raise BadInput("norms='keep' merges every block, whatever it costs: leave out cost='measured'")
        if self.probe and example_inputs is None:
            raise BadInput("to probe a layer example_inputs are needed: they tell what it is given")

    @property
    def chosen(self) -> Iterator[str | type[nn.Module]]:
        """What names modules of the model."""
        yield from (*self.inexact_borders, *self.probe, *self.reserve)
