"""Small models that several tests use, and what training leaves in them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import structrep
from structrep import Rule
from structrep.blocks import Branches

__all__ = [
    "Branches", "Two", "Written", "bn", "conv", "example_input", "made", "noise", "randomised", "settled", "small",
]  # fmt: skip

# The models are tiny: threads that wait for one another cost more than they bring.
torch.set_num_threads(1)

bn = nn.BatchNorm2d


def conv(c1: int = 4, c2: int = 4, k: Any = 3, **more: Any) -> nn.Conv2d:
    """A convolution that keeps the size, if nothing else is said."""
    return nn.Conv2d(c1, c2, k, **{"padding": k // 2 if isinstance(k, int) else 0, **more})


class Written(nn.Module):
    """A module whose layers and forward are given where it is used: `run(module, x)` as a function."""

    def __init__(self, run: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.run(self, x)


class Two(nn.Module):
    """Two branches, which some forward adds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv(k=1)

    def both(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def made(forward: Callable[..., Any], base: type[nn.Module] = Two, named: str = "forward") -> nn.Module:
    """A model of a class that has the function as its forward, or as another method."""
    torch.manual_seed(0)
    return settled(type("Made", (base,), {named: forward, "__module__": forward.__module__})())


def small(name: str) -> nn.Module:
    """A model of timm's, with fewer and narrower blocks of each of its kinds."""
    import timm  # most tests need none
    from timm.models.byobnet import ByoBlockCfg
    from timm.models.repghost import RepGhostNet

    if name == "repghostnet_050":
        return RepGhostNet([[[3, 8, 16, 0, 1]], [[3, 24, 24, 0, 2]], [[5, 36, 40, 0.25, 2]]], num_classes=10, width=0.5)

    def blocks(kind: str, *sizes: tuple[int, int], **more: Any) -> dict[str, Any]:
        return {"blocks": tuple(ByoBlockCfg(kind, d=d, c=c, s=2, **more) for d, c in sizes), "stem_chs": 8}

    sizes: dict[str, dict[str, Any]] = {
        "repvgg_a0": blocks("rep", (2, 8), (2, 16), (1, 16)),
        "mobileone_s0": blocks("one", (2, 8), (2, 16), (1, 16), gs=1, block_kwargs={"num_conv_branches": 4}),
        "fastvit_t8": {
            "layers": (1, 1), "embed_dims": (16, 32), "mlp_ratios": (3, 3), "token_mixers": ("repmixer", "repmixer"),
            "downsamples": (False, True), "pos_embs": (None, None), "se_downsamples": (False, False),
        },
    }  # fmt: skip
    return timm.create_model(name, num_classes=10, **sizes.get(name, {}))


def example_input(rule: Rule, model: nn.Module) -> Tensor:
    """What the example of a rule takes, in float64: `model` is one, or several in a row."""
    shape = rule.example_shape
    if shape is None:
        layer = next(m for m in structrep.reparameterize(model).modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
        shape = (3, layer.in_channels, 9, 8) if isinstance(layer, nn.Conv2d) else (3, layer.in_features)
    return torch.randn(shape, dtype=torch.float64)


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


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


def randomised(model: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """In eval mode, with random weights, statistics and affines; frozen parameters and constant buffers stay."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, scale: float = 1.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale)

    model = model.eval().to(dtype)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if not tensor.requires_grad:
                continue
            if tensor.ndim > 1:
                normal(tensor, tensor[0].numel() ** -0.5)
            else:
                normal(tensor, 0.5)
                if name.endswith(("weight", "gamma", "scale", "alpha", "beta_scale")):
                    tensor.add_(1.0)
        for name, tensor in model.named_buffers():
            if not tensor.is_floating_point():
                continue
            if "var" in name:
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 1.5 + 0.5)
            elif "mean" in name or "shift" in name or "scale" in name:
                normal(tensor)
    return model
