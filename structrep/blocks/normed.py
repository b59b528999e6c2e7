"""Blocks that add branches, each with a norm at its end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from structrep.blocks._geometry import ConvBlock
from structrep.blocks.online import merged_first, sum_of


class NormedBlock(ConvBlock):
    """A block that adds branches, each with a norm at its end, one of which is a conv of all taps and a norm."""

    own_norms = True
    online: bool | None = False  # for blocks that are never merged first

    @property
    def main(self) -> nn.Sequential:
        """The branch that has all taps."""
        raise NotImplementedError

    def start_as(self, weight: Tensor, bias: Tensor | None, norm: nn.Module | None = None) -> None:
        """See `ConvBlock.start_as`: the branch with all taps becomes the conv and its norm. The norms at the ends of
        the others start at zero, as the last norm of a residual branch may (arXiv:1706.02677, section 5.1).

        Raises:
            ValueError: no norm is given.
        """
        if norm is None:
            raise ValueError(f"{type(self).__name__} has norms on its branches, and no norm stands behind the conv")
        main: Any = self.main
        with torch.no_grad():
            main.conv.weight.copy_(weight)
            take_over(main.norm, norm, bias)
            for branch in self._branches():
                last = [part for part in branch.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)][-1]
                last.momentum = main.norm.momentum
                if branch is not main:
                    nn.init.zeros_(last.weight)
                    nn.init.zeros_(last.bias)

    def composed(self, x: Tensor) -> Tensor | None:
        """What the branches add up to while they train, merged before they are run; None if they are to be run."""
        branches = merged_first(list(self._branches()), self.reading, x, self.online)
        return None if branches is None else sum_of(branches, self.reading, x)

    def _branches(self) -> Iterable[nn.Module]:
        for child in self.children():
            yield from child.children() if isinstance(child, nn.ModuleList) else (child,)


def take_over(own: Any, norm: Any, bias: Tensor | None) -> None:
    """Make a norm what another is behind a conv with a bias."""
    own.eps, own.momentum = norm.eps, norm.momentum
    nn.init.ones_(own.weight) if norm.weight is None else own.weight.copy_(norm.weight)
    nn.init.zeros_(own.bias) if norm.bias is None else own.bias.copy_(norm.bias)
    own.running_mean.copy_(norm.running_mean if bias is None else norm.running_mean - bias)
    own.running_var.copy_(norm.running_var)
    own.num_batches_tracked.copy_(norm.num_batches_tracked)
