"""When an error on a device is rounding: both it and the noise that it is held against have to be of that size."""

from __future__ import annotations

import math
from dataclasses import dataclass

SLACK = 8.0  # as much more than the training-time model's own rounding as a deploy model's may be
NOISIEST = 64.0  # roundings: a model whose own error is larger overflows, or is not what ran


@dataclass(frozen=True)
class Error:
    """Relative errors to the float64 truth of a deploy model, and of its training-time model by rounding alone.

    Args:
        eps: the largest relative rounding of one number, in the dtype that both ran in.
    """

    error: float
    noise: float
    eps: float

    @property
    def why_not(self) -> str:
        """What speaks against an error that is rounding; empty if nothing does."""
        if not (math.isfinite(self.noise) and self.noise <= NOISIEST * self.eps):
            return (
                f"the training-time model is off by {self.noise:.1e}, which shows nothing: rounding is {self.eps:.1e}"
            )
        if not self.error <= SLACK * max(self.noise, self.eps):
            return f"the deploy model is off by {self.error:.1e}, rounding alone by {self.noise:.1e}"
        return ""
