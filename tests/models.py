"""Small models and measures that several tests use."""

import torch
from torch import Tensor, nn

import structrep
from structrep import Rule
from structrep.blocks import Branches
from structrep.prove.run import relative_error

__all__ = ["Branches", "example_input", "relative_error", "settled"]


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
