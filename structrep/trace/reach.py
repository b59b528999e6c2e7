"""Who uses parts and tensors of others as a trace runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor, nn

from structrep.graph.calls import Call
from structrep.trace.recorder import Recorder


class Reach:
    """The calls that get at what is not their own module's, by its path.

    Args:
        names: of the tensors that the model holds, by id.
        paths: of its modules.
        recorder: of the calls.
    """

    def __init__(self, names: Mapping[int, str], paths: Mapping[nn.Module, str], recorder: Recorder) -> None:
        self.names, self.paths, self.recorder = names, paths, recorder
        self.calls: dict[str, set[Call]] = {}
        self.fetched: Counter[tuple[str, Call]] = Counter()  # how often a forward looked up what is not its own
        self.asked: Counter[tuple[str, Call]] = Counter()  # and asked it for no more than its dtype or device

    def look_up(self, name: str, value: Any) -> None:
        """Note that the forward that runs has looked up a parameter, a buffer or a child."""
        call = self.recorder.current
        path = self.names.get(id(value)) if isinstance(value, Tensor) else self.paths.get(value)
        if not path or call is None or path.rpartition(".")[0] == call.path:
            return
        if call.module._parameters.get(name) is not value:  # tied, its own too
            self.fetch(path, call)

    def fetch(self, path: str, call: Call) -> None:
        """Note that a call uses what is at a path."""
        self.calls.setdefault(path, set()).add(call)
        self.fetched[path, call] += 1

    def ask(self, path: str, call: Call) -> None:
        """Note that a call asks what is at a path for its dtype or device."""
        self.asked[path, call] += 1

    def users(self, path: str, touched: Container[str]) -> set[Call]:
        """Of the calls that get at what is at a path those that take more of it than a dtype or a device.

        Args:
            touched: paths of the tensors that were computed with.
        """
        if path in touched:
            return set(self.calls[path])
        return {call for call in self.calls[path] if self.fetched[path, call] > self.asked[path, call]}
