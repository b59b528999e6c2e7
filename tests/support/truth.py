"""The judge of the tests: float64 comparisons, counts of what really runs, and one way to say what has to come out.

Nothing here is taken from structrep but the calls under test: the judge is not the judged.
"""

import contextlib
import copy
import hashlib
import math
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import structrep
from tests.support.models import randomised

# Relative to the largest value, in float64.
EXACT = 1e-12  # equal but for rounding
CLOSE = 1e-13  # equal but for the rounding of one merge
SAME = 1e-14  # nothing was merged, or numbers were moved and not computed
WAYS = ("alone", "with an example", "in place")  # to convert a model, all of which have to give the same


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest finite value of the truth: infinite where shapes differ, or one is no
    number where the other is another."""
    if value.shape != truth.shape:
        return math.inf
    one, other = (x.detach().cpu().to(torch.complex128 if x.is_complex() else torch.float64) for x in (value, truth))
    alike = (one == other) | (torch.isnan(one) & torch.isnan(other))
    if bool(alike.all()):
        return 0.0
    gaps, finite = (one - other).abs()[~alike], other[torch.isfinite(other)].abs()
    largest = float(finite.max()) if len(finite) else 0.0
    found = float(gaps.max()) / largest if largest else math.inf
    return math.inf if math.isnan(found) else found


def followed_or_told(model: nn.Module, deploy: nn.Module, x: Tensor) -> bool:
    """Whether a deploy model does as the model, or says what is another now: both were set to something else."""
    with torch.no_grad():
        try:
            return relative_error(deploy(x), model(x)) < EXACT
        except ValueError as error:
            return "convert the model again" in str(error)


def flat(value: Any) -> list[Tensor]:
    """All tensors of an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, SimpleNamespace):
        value = vars(value)
    if isinstance(value, dict):
        return [t for item in value.values() for t in flat(item)]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in flat(item)]
    if is_dataclass(value):
        return [t for f in fields(value) for t in flat(getattr(value, f.name))]
    return []


def distance(ours: Any, truth: Any) -> float:
    """The largest relative error of two outputs; infinite if they differ in how many tensors they have."""
    a, b = flat(ours), flat(truth)
    if len(a) != len(b):
        return math.inf
    return max((relative_error(x, y) for x, y in zip(a, b, strict=True)), default=0.0)


def call(model: nn.Module, inputs: Any, method: str = "forward") -> Any:
    """Run a model on a tensor, a tuple of positional or a dict of keyword arguments, on copies of them."""
    return _run(model, inputs, method)[0]


def _run(model: nn.Module, inputs: Any, method: str = "forward") -> tuple[Any, list[Tensor]]:
    """What a model gives, and what it has left in the tensors that it was given."""
    run = model if method == "forward" else getattr(model, method)
    with torch.no_grad():
        if isinstance(inputs, dict):
            given = {name: _fresh(value) for name, value in inputs.items()}
            return run(**given), flat(given)
        positional = [_fresh(value) for value in (inputs if isinstance(inputs, tuple) else (inputs,))]
        return run(*positional), flat(positional)


def _fresh(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def equal(deploy: nn.Module, model: nn.Module, *inputs: Any, within: float = EXACT) -> bool:
    """The two models agree on all of these inputs."""
    worst = max(distance(call(deploy, one), call(model, one)) for one in inputs)
    assert worst <= within, f"relative error {worst:.1e}"
    return True


@contextlib.contextmanager
def ends(seconds: int = 20) -> Iterator[None]:
    """What would go on for ever fails instead."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no end after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def says(plan: structrep.Plan, merges: int, refused: str = "") -> structrep.Plan:
    """A plan has so many merges, and refuses for reasons of these kinds and for no other."""
    assert len(plan.merges) == merges, plan
    assert {one.kind for one in plan.refusals} == set(refused.split()), plan
    return plan


def check(
    model: nn.Module,
    *inputs: Any,
    merges: int,
    refused: str = "",
    ways: tuple[str, ...] = WAYS,
    method: str = "forward",
    within: float = EXACT,
    **ran: int,
) -> nn.Module:
    """Convert a model with random weights, in every way; the deploy model of the first way.

    Its outputs and what it leaves in its inputs are those of the model, which is as it was; nothing is left to merge.

    Args:
        inputs: what each call is given: a tensor, a tuple of positional or a dict of keyword arguments. The first is
            the example.
        merges: how many there are.
        refused: the kinds of all reasons for which others are refused, in words.
        ways: in which it is converted, where not all of them find the same.
        method: what is called.
        within: the largest relative error.
        ran: how many convs, linears, norms and additions one call of the deploy model runs, where that is counted.
    """
    model, made = randomised(model), []
    truth = [_run(copy.deepcopy(model), one, method) for one in inputs]
    for way in ways:
        source = copy.deepcopy(model) if way == "in place" else model
        before, example = fingerprint(source), inputs[0] if way == "with an example" else None
        with ends(), warnings.catch_warnings():
            warnings.simplefilter("ignore", structrep.NothingMerged)
            plan = says(structrep.plan(source, example), merges, refused)
            deploy = plan.reparameterize(example, inplace=way == "in place")
        assert (deploy is source) == (way == "in place")
        assert way == "in place" or fingerprint(source) == before
        for one, (output, left) in zip(inputs, truth, strict=True):
            ours, mine = _run(deploy, one, method)
            assert type(ours) is type(output)
            assert distance(ours, output) <= within
            assert distance(mine, left) <= within
        seen = executed(deploy, inputs[0], method)
        assert {kind: seen[kind] for kind in ran} == ran
        assert not structrep.plan(deploy).merges
        made.append(deploy)
    return made[0]


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Everything about a model that a conversion of a copy must leave alone."""
    state = {k: hashlib.sha256(v.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
             if v.numel() else "" for k, v in model.state_dict().items()}  # fmt: skip
    modules = [(n, id(m), type(m), m.training, sorted(m.__dict__)) for n, m in model.named_modules()]
    identities = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    return state, modules, identities


KINDS = {
    "convolution": "conv",
    "addmm": "linear",
    "mm": "linear",
    "bmm": "linear",
    "native_batch_norm": "norm",
    "_native_batch_norm_legit_no_training": "norm",
    "add": "add",
    "add_": "add",
    "sub": "add",
    "einsum": "einsum",
}


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if name in KINDS:
            self.seen[KINDS[name]] += 1
        return func(*args, **(kwargs or {}))


def executed(model: nn.Module, inputs: Any, method: str = "forward") -> Counter[str]:
    """How many convs, linears, norms and additions one call really runs."""
    with _Watch() as watch:
        call(model, inputs, method)
    return watch.seen
