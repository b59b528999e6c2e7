"""Small models and measures that several tests use."""

import math

import torch
from torch import Tensor, nn

import structrep
from structrep import Rule
from structrep.blocks import Branches

__all__ = ["Branches", "example_input", "relative_error", "settled"]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest finite value of the truth: the judge of the tests, which is not the
    one that structrep has. Infinite where shapes differ, or one is no number where the other is another."""
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


def example_input(rule: Rule, model: nn.Module) -> Tensor:
    """What the example of a rule takes, in float64: `model` is one, or several in a row."""
    shape = rule.example_shape
    if shape is None:
        layer = next(m for m in structrep.reparameterize(model).modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
        shape = (3, layer.in_channels, 9, 8) if isinstance(layer, nn.Conv2d) else (3, layer.in_features)
    return torch.randn(shape, dtype=torch.float64)


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """A model as training leaves it: norms with statistics and affines of their own, in eval mode, in float64."""
    each_value = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.weight is not None:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.normal_(0, 0.5, generator=generator)
        elif isinstance(module, each_value):
            for parameter in module.parameters(recurse=False):
                parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model.double().eval()
