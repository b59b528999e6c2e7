"""What the laws are checked with: random statistics, float64 comparisons, counts of what really runs."""

import hashlib
from collections import Counter
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# The models are tiny: threads that wait for one another cost more than they bring.
torch.set_num_threads(1)

EXACT = 1e-12  # relative, in float64


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


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def flat(value) -> list[Tensor]:
    """All tensors of an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in flat(item)]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in flat(item)]
    if is_dataclass(value):
        return [t for f in fields(value) for t in flat(getattr(value, f.name))]
    return []


def distance(ours, truth) -> float:
    """Largest difference of two outputs, relative to the truth's largest value; infinite if their shapes differ."""
    a, b = flat(ours), flat(truth)
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    return max(
        (float((x.double() - y.double()).abs().max() / y.double().abs().max().clamp(min=1e-300)) if y.numel() else 0.0)
        for x, y in zip(a, b, strict=True)
    )


def call(model: nn.Module, inputs):
    """Run a model on a tensor, a tuple of positional or a dict of keyword arguments, on copies of them."""
    with torch.no_grad():
        if isinstance(inputs, dict):
            return model(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()})
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        return model(*(v.clone() if isinstance(v, Tensor) else v for v in inputs))


def equal(deploy: nn.Module, model: nn.Module, *inputs, within: float = EXACT) -> bool:
    """The two models agree on all of these inputs."""
    worst = max(distance(call(deploy, one), call(model, one)) for one in inputs)
    assert worst <= within, f"relative error {worst:.1e}"
    return True


def fingerprint(model: nn.Module) -> tuple:
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
        self.seen: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in KINDS:
            self.seen[KINDS[name]] += 1
        return func(*args, **(kwargs or {}))


def executed(model: nn.Module, inputs) -> Counter:
    """How many convs, linears, norms and additions one call really runs."""
    with _Watch() as watch:
        call(model, inputs)
    return watch.seen
