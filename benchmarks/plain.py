"""The plain models behind the benchmarks: what one would write who had never heard of branches.

    python -m benchmarks.plain               # all of them
    python -m benchmarks.plain --model repvgg_a0

Each is built by hand, from the widths and depths of its paper, as convolutions, activations, skips and Linears. That it
is the deploy model is checked: with the deploy model's weights, in the order in which they run, it computes what the
training-time model does.

RepVGG-A0, RepVGG-B0, MobileOne-S1, FastViT-T8 and RepViT-M1 are compared with timm's, whose own conversion is there
too. A stack is 8 blocks of `structrep.blocks`, each with a ReLU behind it, 64 channels wide, on 56x56, kernels 3x3;
RepLKNet's is depthwise, of 13x13 beside 5x5. The plain one has an `nn.Conv2d` for each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import structrep
from benchmarks import measure
from structrep.blocks import ACBlock2d, DiverseBranchBlock2d, ExpandConv2d, LargeKernelBlock2d, MobileOneBlock2d
from structrep.prove.run import relative_error
from tests.support.vision import import_torchvision

_torchvision_ops = import_torchvision()  # which timm imports
import timm  # noqa: E402

from benchmarks.zoo import Executed, settled  # noqa: E402

IMAGE = (3, 224, 224)
FEATURES = (64, 56, 56)
DEPTH = 8

# --- plain models ---------------------------------------------------------------------------------


class Residual(nn.Sequential):
    """What is inside, with a skip around it."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return x + y


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(conv(channels, squeezed), nn.ReLU(), conv(squeezed, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = x * self.gate(x.mean((2, 3), keepdim=True))
        return gated


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)


def classifier(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]


def repvgg(stem: int, widths: tuple[int, ...], depths: tuple[int, ...]) -> nn.Sequential:
    """3x3 convolutions with ReLU; the stem and the first of each stage halve the image."""
    layers: list[nn.Module] = [conv(3, stem, 3, 2), nn.ReLU()]
    inputs = stem
    for width, depth in zip(widths, depths, strict=True):
        for index in range(depth):
            layers += [conv(inputs, width, 3, 1 if index else 2), nn.ReLU()]
            inputs = width
    return nn.Sequential(*layers, *classifier(inputs))


def mobileone(stem: int, widths: tuple[int, ...], depths: tuple[int, ...]) -> nn.Sequential:
    """A 3x3, then pairs of a depthwise 3x3 and a 1x1, each with ReLU."""
    layers: list[nn.Module] = [conv(3, stem, 3, 2), nn.ReLU()]
    inputs = stem
    for width, depth in zip(widths, depths, strict=True):
        for index in range(depth):
            layers += [conv(inputs, inputs, 3, 1 if index else 2, inputs), nn.ReLU(), conv(inputs, width), nn.ReLU()]
            inputs = width
    return nn.Sequential(*layers, *classifier(inputs))


def fastvit(widths: tuple[int, ...], depths: tuple[int, ...]) -> nn.Sequential:
    """A depthwise 3x3 mixes places; a residual of a depthwise 7x7 and two 1x1s mixes channels."""
    width = widths[0]
    layers: list[nn.Module] = [conv(3, width, 3, 2), nn.GELU(), conv(width, width, 3, 2, width), nn.GELU()]
    layers += [conv(width, width), nn.GELU()]
    inputs = width
    for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if index:
            layers += [conv(inputs, width, 7, 2, inputs), conv(width, width), nn.GELU()]
        for _ in range(depth):
            mixer = [conv(width, width, 7, 1, width), conv(width, 3 * width), nn.GELU(), conv(3 * width, width)]
            layers += [conv(width, width, 3, 1, width), Residual(*mixer)]
        inputs = width
    outputs = 2 * inputs
    layers += [conv(inputs, outputs, 3, 1, inputs), SqueezeExcite(outputs, outputs // 16), nn.GELU()]
    return nn.Sequential(*layers, *classifier(outputs))


def repvit(widths: tuple[int, ...], depths: tuple[int, ...]) -> nn.Sequential:
    """A depthwise 3x3 mixes places, every other one with a squeeze-excite; a residual of two 1x1s mixes channels."""

    def mixer(width: int) -> Residual:
        return Residual(conv(width, 2 * width), nn.GELU(), conv(2 * width, width))

    width = widths[0]
    layers: list[nn.Module] = [conv(3, width // 2, 3, 2), nn.GELU(), conv(width // 2, width, 3, 2)]
    inputs = width
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if stage:
            layers += [conv(inputs, inputs, 3, 1, inputs), mixer(inputs)]
            layers += [conv(inputs, inputs, 3, 2, inputs), conv(inputs, width), mixer(width)]
        for index in range(depth):
            layers.append(conv(width, width, 3, 1, width))
            if index % 2 == 0:
                layers.append(SqueezeExcite(width, (width // 4 + 4) // 8 * 8))  # a quarter, a multiple of 8
            layers.append(mixer(width))
        inputs = width
    return nn.Sequential(*layers, *classifier(inputs))


def stack(make: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(DEPTH) for layer in (make(), nn.ReLU())))


# --- cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A training-time model and the plain one of its deploy shape.

    Args:
        shape: of one input, without the batch.
        published: timm has a conversion of its own.
    """

    name: str
    training: Callable[[], nn.Module]
    plain: Callable[[], nn.Module]
    shape: tuple[int, ...] = IMAGE
    published: bool = False

    def forms(self) -> dict[str, nn.Module]:
        """The training-time model, what `structrep` makes of it, the plain model with those weights, and timm's."""
        torch.manual_seed(0)
        training = self.training()
        deploy = structrep.reparameterize(training, self.input(1))
        forms = {
            "training-time": training,
            "deploy": deploy,
            "plain": with_weights(self.plain(), deploy, self.input(1)),
        }
        if self.published:
            forms["timm's deploy"] = by_timm(training)
        return forms

    def input(self, batch: int) -> Tensor:
        return torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(0))


def timm_model(name: str) -> nn.Module:
    """A model of timm with norms, layer scales and learnable affines as training leaves them, in eval mode."""
    model = settled(timm.create_model(name)).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for path, value in model.named_parameters():
        if path.endswith(("gamma", "lab.scale")):  # a layer scale starts at 1e-5, where nothing of its branch is seen
            value.uniform_(0.2, 1, generator=generator)
        elif path.endswith("lab.bias"):
            value.normal_(0, 0.2, generator=generator)
    return model


def by_timm(model: nn.Module) -> nn.Module:
    """A copy, converted as timm does it."""
    converted: nn.Module = timm.utils.reparameterize_model(model)
    return converted.eval()


def training_stack(make: Callable[[], nn.Module]) -> nn.Module:
    return settled(stack(make)).requires_grad_(False)


def with_weights(plain: nn.Module, deploy: nn.Module, x: Tensor) -> nn.Module:
    """The plain model with a deploy model's weights, layer by layer in the order in which they run.

    Raises:
        ValueError: the two do not run layers of the same shapes.
    """
    theirs, ours = in_order(deploy, x), in_order(plain, x)
    shapes = [[tuple(layer.weight.shape) for layer in layers] for layers in (theirs, ours)]
    if shapes[0] != shapes[1]:
        place = next((i for i, (a, b) in enumerate(zip(*shapes, strict=False)) if a != b), min(map(len, shapes)))
        raise ValueError(
            f"the deploy model runs {len(theirs)} layers with weights, the plain one {len(ours)}, and layer {place} "
            f"differs: {shapes[0][place : place + 1]} and {shapes[1][place : place + 1]}; write the plain one as the "
            "deploy model is"
        )
    for layer, given in zip(ours, theirs, strict=True):
        layer.weight.data.copy_(given.weight)
        assert layer.bias is not None
        layer.bias.data.copy_(torch.zeros_like(layer.bias) if given.bias is None else given.bias)
    return plain.eval().requires_grad_(False)


def in_order(model: nn.Module, x: Tensor) -> list[nn.Conv2d | nn.Linear]:
    """Convolutions and Linears as one forward pass runs them."""
    ran: list[nn.Conv2d | nn.Linear] = []
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(lambda layer, *_: ran.append(layer)) for layer in layers]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return ran


def _stack(name: str, training: Callable[[], nn.Module], plain: Callable[[], nn.Module]) -> Case:
    return Case(name, partial(training_stack, training), partial(stack, plain), FEATURES)


def _timm(name: str, plain: Callable[[], nn.Module]) -> Case:
    return Case(name, partial(timm_model, name), plain, published=True)


_SPATIAL = partial(conv, 64, 64, 3)
CASES = {
    case.name: case
    for case in (
        _timm("repvgg_a0", partial(repvgg, 48, (48, 96, 192, 1280), (2, 4, 14, 1))),
        _timm("repvgg_b0", partial(repvgg, 64, (64, 128, 256, 1280), (4, 6, 16, 1))),
        _timm("mobileone_s1", partial(mobileone, 64, (96, 192, 512, 1280), (2, 8, 10, 1))),
        _timm("fastvit_t8", partial(fastvit, (48, 96, 192, 384), (2, 2, 4, 2))),
        _timm("repvit_m1", partial(repvit, (48, 96, 192, 384), (2, 2, 14, 2))),
        _stack("acb_stack", partial(ACBlock2d, 64, 64, 3, padding=1), _SPATIAL),
        _stack("dbb_stack", partial(DiverseBranchBlock2d, 64, 64, 3, padding=1), _SPATIAL),
        _stack("mobileone_stack", partial(MobileOneBlock2d, 64, 64, 3, padding=1), _SPATIAL),
        _stack("expandnet_stack", partial(ExpandConv2d, 64, 64, 3, padding=1), _SPATIAL),
        _stack(
            "replknet_stack",
            partial(LargeKernelBlock2d, 64, 64, 13, padding=6, groups=64),
            partial(conv, 64, 64, 13, groups=64),
        ),
    )
}


COMPILED = ("repvgg_a0", "acb_stack")  # by Inductor too: others take minutes each


def chosen(names: list[str]) -> list[Case]:
    """The cases of these names, or all.

    Raises:
        typer.BadParameter: there is no such case.
    """
    if unknown := set(names) - CASES.keys():
        raise typer.BadParameter(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    return [CASES[name] for name in names or CASES]


def main(model: Annotated[list[str], typer.Option(help="Only these cases.")] = []) -> None:  # noqa: B006
    rows, records = [], []
    for case in chosen(model):
        forms = case.forms()
        x = case.input(2)
        with torch.no_grad():
            truth = copy.deepcopy(forms["training-time"]).double()(x.double())
            record: dict[str, Any] = {"model": case.name, "forms": {}}
            for name, form in forms.items():
                ran = Executed(form, x)
                counts = {
                    key: getattr(ran, key) for key in ("convs", "norms", "additions", "parameters", "multiply_adds")
                }
                record["forms"][name] = counts | {"error": relative_error(ran.output, truth)}
                rows.append(
                    [case.name, name, *(f"{n:,}" for n in counts.values()), f"{record['forms'][name]['error']:.1e}"]
                )
        records.append(record)
    columns = ("model", "form", "convolutions", "norms", "additions", "parameters", "multiply-adds, 2 images", "error")
    measure.show(
        "Training-time, deploy and plain; errors against a float64 run of the training-time model", columns, rows
    )
    if not model:
        measure.save("plain", {"machine": measure.machine("timm"), "models": records})


if __name__ == "__main__":
    typer.run(main)
