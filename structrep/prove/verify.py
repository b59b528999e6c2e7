"""Proof that the value was put back rightly: regions one by one, and the whole model against the float64 truth.

There are no tolerances to choose. With what the training-time model computes in float64 as truth, the deploy model may
err about as much as the training-time model does by rounding alone in the same dtype: of its activations, and of each
of its weights once. Where that is so much that it shows little (a choice that rounding changes), both run in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from structrep.algebra import precision
from structrep.algebra.shadows import Choice, Shadows
from structrep.errors import BadInput, VerificationError, said
from structrep.match.merge import Merge
from structrep.modules import parametrized
from structrep.modules.arguments import Example
from structrep.modules.copies import demand_python
from structrep.prove.passing import Passing
from structrep.prove.run import (
    How,
    Run,
    accepted,
    cudnn_of,
    device_named,
    dtype_of,
    dtypes_of,
    eps_of,
    name_of_dtype,
    relative_error,
)
from structrep.records.verification import OutputRecord, Verification

SLACK = 8.0  # rounding errors of two equal models are alike, not equal


def verify(
    reference: nn.Module,
    deploy: nn.Module,
    example_inputs: Example,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
    tf32: bool = False,
    seed: int = 0,
    merges: Mapping[str, Merge] | None = None,
) -> Verification:
    """Compare a deploy model with its training-time model; neither is changed.

    Example:
        >>> structrep.verify(model, deploy, torch.randn(1, 3, 224, 224)).ok
        True

    Args:
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        device: where to run both; CUDA when there is one, else CPU.
        dtype: what to run both in; the reference's own by default. The truth is float64: what the reference computes
            but for its roundings and casts (`structrep.algebra.shadows.Shadows`). Where it does not run so, the record
            says why, and the truth is its own run.
        autocast: run both under autocast to this dtype.
        channels_last: run both in that memory format.
        tf32: let CUDA multiply float32 in TensorFloat-32.
        seed: of what a model draws as it runs.
        merges: by the path of each merged layer; `Plan.verify` gives those of the plan. Each is compared too.

    Returns:
        Errors of all outputs, relative to each output's largest value; `.ok` says whether they are rounding.

    Raises:
        BadInput: the reference rejects the inputs, or the two models' outputs differ in structure or shape.
        VerificationError: the deploy model does not run on inputs that the reference takes.
    """
    for one in (reference, deploy):
        if not isinstance(one, torch.jit.ScriptModule):
            demand_python(one)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    own = dtype_of(reference)
    how = How(device, dtype or own, autocast, channels_last, seed, cast=dtype not in (None, own))
    merges = merges or {}
    # Weights that were cast to float32 when they were merged cannot be nearer the truth than that.
    cast = dtypes_of(deploy).keys() - dtypes_of(reference)
    coarsest = max(how.dtype, dtype_of(deploy), autocast or how.dtype, *cast, key=eps_of)
    noisy = replace(how, dtype=max(how.dtype, dtype_of(deploy), key=eps_of))
    floor = 2 * eps_of(coarsest)  # one small sum may happen to be exact
    lost, choices = "", tuple[OutputRecord, ...]()
    with precision.whole(tf32=tf32):
        truth, failed = _truth(reference, example_inputs, noisy)
        if truth.draws:  # other numbers in every dtype: only runs of one dtype can be compared
            how = noisy
        ours = _deployed(deploy, example_inputs, how, merges)
        # Merged weights are rounded once when they are stored. What that does to the original counts as its noise too.
        rounded = _rounded(reference, noisy, eps_of(coarsest))
        theirs = Run(rounded, example_inputs, noisy)
        passing = Passing(merges, device)
        stretches = passing.run(example_inputs, noisy)
        outputs = _outputs(truth.exact, ours.outputs, (truth.outputs, theirs.outputs), floor)
        noise = max(one.noise for one in outputs)
        coarser = truth.shadows is not None and any(eps_of(one) > eps_of(coarsest) for one in truth.shadows.dtypes)
        drowned = noise > (floor if coarser else math.sqrt(eps_of(coarsest)))
        off = any(one.error > SLACK * one.noise for one in outputs)
        if not failed and (drowned or (off and truth.chooses)):
            exactly = _Exactly(reference, deploy, rounded, example_inputs, noisy, merges, floor)
            wide = coarsest == torch.float64 and torch.float32 in exactly.dtypes
            if wide and any(one.error > SLACK * one.noise for one in exactly.outputs):
                # Weights that its forward computes in float32 are no nearer the truth.
                rounded = _rounded(reference, noisy, eps_of(torch.float32))
                exactly = _Exactly(reference, deploy, rounded, example_inputs, noisy, merges, floor)
            if drowned or exactly.otherwise:
                lost = exactly.reason(how.dtype, noise)
            if lost and exactly.held:
                outputs, ours, choices = exactly.outputs, exactly.ours, exactly.choices
        regions = tuple(passing.records(ours.watched, stretches, how.dtype, floor))
    blank = not any(bool(torch.isfinite(one).any()) for one in truth.exact)
    if blank:
        lost = "the training-time model gives no finite number here, so merged layers are all that could be compared"
    return Verification(
        device=device_named(device),
        dtype=name_of_dtype(how.dtype),
        autocast=name_of_dtype(autocast) if autocast else None,
        channels_last=channels_last,
        tf32=tf32,
        cudnn=cudnn_of(device),
        seed=seed,
        torch=torch.__version__,
        slack=SLACK,
        truth=name_of_dtype(how.dtype) if failed else "float64",
        failed=failed,
        alone=truth.shadows.alone if truth.shadows else {},
        lost=lost,
        blank=blank,
        outputs=outputs,
        choices=choices,
        regions=regions,
    )


def _truth(reference: nn.Module, example_inputs: Example, how: How) -> tuple[Run, str]:
    """The training-time model in its dtype and in float64 beside it; where that cannot be, in its dtype, and why.

    Raises:
        BadInput: the model rejects the inputs, or gives nothing to compare.
    """
    failed = ""
    try:
        truth = Run(reference, example_inputs, how, shadows=Shadows())
    except Exception as error:
        truth = accepted(reference, example_inputs, how)
        failed = f"the training-time model does not run in float64: {said(error)}"
    if not truth.outputs:
        raise BadInput(f"{type(reference).__name__} gives no tensor that could be compared")
    return truth, failed


def _deployed(deploy: nn.Module, example_inputs: Example, how: How, watch: Iterable[str]) -> Run:
    """A run of a deploy model, on inputs that the training-time model takes.

    Raises:
        VerificationError: it fails.
    """
    try:
        return Run(deploy, example_inputs, how, watch)
    except Exception as error:
        raise VerificationError(
            f"the deploy model cannot run on inputs that the training-time model takes: {said(error)}"
        ) from error


def _outputs(
    right: list[Tensor], mine: list[Tensor], theirs: Iterable[list[Tensor]], floor: float
) -> tuple[OutputRecord, ...]:
    """The deploy model's outputs against the truth; what it is compared with are other runs of the training-time one.

    Raises:
        BadInput: outputs differ in structure or shape.
    """
    if len(right) != len(mine):
        raise BadInput(f"the training-time model gives {len(right)} tensors, the deploy model {len(mine)}")
    records = []
    for index, (one, other, *noisy) in enumerate(zip(right, mine, *theirs, strict=True)):
        if one.shape != other.shape:
            raise BadInput(f"output {index} has shape {tuple(one.shape)} before and {tuple(other.shape)} after")
        noise = max(floor, *(relative_error(value, one) for value in noisy))
        records.append(
            OutputRecord(name=f"{index}", shape=tuple(one.shape), error=relative_error(other, one), noise=noise)
        )
    return tuple(records)


class _Exactly:
    """Both models in float64, with the training-time model's choices: where rounding takes other ones (of two equal
    scores, which is the first), outputs may be anything, and it is what they are chosen by that is compared."""

    def __init__(
        self,
        reference: nn.Module,
        deploy: nn.Module,
        rounded: nn.Module,
        example_inputs: Example,
        how: How,
        watch: Iterable[str],
        floor: float,
    ) -> None:
        free = Shadows(recorded=True)
        one, theirs = Shadows(held=free.choices), Shadows(held=free.choices)
        truth = Run(reference, example_inputs, how, shadows=free)
        self.ours = Run(deploy, example_inputs, how, watch, one)
        noisy = Run(rounded, example_inputs, how, shadows=theirs)
        self.outputs = _outputs(truth.exact, self.ours.exact, (noisy.exact,), floor)
        self.ours.watched = self.ours.watched_exact
        self.dtypes = free.dtypes
        same = len(one.choices) == len(theirs.choices) == len(free.choices)
        self.held = self.ours.exactly and same and not one.astray | theirs.astray
        choices = list(zip(free.choices, one.choices, theirs.choices, strict=True)) if self.held else []
        self.otherwise = dict.fromkeys(it.name for it in (*one.choices, *theirs.choices) if it.otherwise)
        self.choices = tuple(self._records(choices, floor))

    def _records(self, choices: Iterable[tuple[Choice, ...]], floor: float) -> Iterator[OutputRecord]:
        """What the deploy model chose otherwise by, as far off as it is."""
        most = floor
        for right, mine, theirs in choices:
            pairs = list(zip(right.by, mine.by, theirs.by, strict=True))
            most = max(most, *(relative_error(other, one) for one, _, other in pairs))
            if mine.otherwise:
                error = max(relative_error(other, one) for one, other, _ in pairs)
                yield OutputRecord(name=right.name, shape=tuple(right.by[0].shape), error=error, noise=most)

    def reason(self, dtype: torch.dtype, noise: float) -> str:
        """Why a comparison in a dtype shows nothing."""
        coarser = [name_of_dtype(one) for one in self.dtypes if eps_of(one) > eps_of(dtype)]
        why = "it amplifies rounding"
        if self.otherwise:
            why = f"rounding changes what it chooses by {', '.join(self.otherwise)}"
        elif coarser:
            why = f"it computes in {', '.join(coarser)} too"
        elif math.isinf(noise):
            why = "it overflows there, or rounding makes numbers infinite"
        then = "both were run in float64" if self.held else "the deploy model cannot be run in float64 with its choices"
        return (
            f"in {name_of_dtype(dtype)} the comparison shows little, for the training-time model is off by "
            f"{noise:.1e} itself: {why}; {then}"
        )


def _rounded(model: nn.Module, how: How, eps: float) -> nn.Module:
    """The model with every number off by one rounding, up or down, those that it computes of others as it computes
    them."""
    twin = how.model(model)
    for module in [one for one in twin.modules() if parametrized.computed(one)]:
        still = parametrized.plain(module, parametrized.compute(module))
        module.__class__, module.__dict__ = type(still), vars(still)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*twin.parameters(), *twin.buffers()):
        if (
            tensor.is_floating_point() and tensor.itemsize > 1
        ):  # float8 is coarser than that, and is not calculated with
            signs = torch.randint(0, 2, tensor.shape, generator=generator, device="cpu").to(tensor) * 2 - 1
            tensor.data = tensor.data * (1 + eps * signs)
    return twin
