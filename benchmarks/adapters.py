"""What `structrep` makes of models that peft has adapted, beside peft's own `merge_and_unload`.

    python -m benchmarks.adapters            # all; writes docs/adapters.md
    python -m benchmarks.adapters LORA OFT   # of these tuners alone; prints, and writes nothing

Each tuner of peft that has a merge adapts small models with random weights, in float64, all layers of a kind that it
takes; what adapts is random too. Counted are the adapted layers that are plain ones afterwards. Errors are those of
the outputs, to the adapted model. A layer is *affine* where its own forward is, on random numbers: what is not cannot
be one layer, by any merge.
"""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import structrep
from benchmarks import measure
from structrep.errors import StructrepError
from structrep.prove.run import relative_error
from tests.support.vision import import_torchvision

_torchvision_ops = import_torchvision()  # which transformers imports

import peft  # noqa: E402
import transformers as hf  # noqa: E402
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

PAGE = measure.ROOT / "docs" / "adapters.md"
EXACT, AFFINE = 1e-9, 1e-5  # relative errors; some tuners compute in float32 whatever they are given


class Layers(nn.Module):
    """Layers of one kind in a row."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = layers

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return y


def _convs(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    made: Any = kind
    return lambda: Layers(made(8, 8, 3, padding=1), made(8, 8, 1), made(8, 8, 3, stride=2))


def _config(kind: str, **more: Any) -> Any:
    small = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "attn_implementation": "eager",
    }  # fmt: skip
    return getattr(hf, f"{kind}Config")(**{**small, **more})


GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
IDS, IMAGE = torch.arange(8)[None], (1, 3, 16, 16)
# The model, what it is given, and which of its layers are adapted.
HOSTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | None, str]] = {
    "Linear": (lambda: Layers(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), (4, 8), "a|b"),
    "Conv1d": (_convs(nn.Conv1d), (2, 8, 9), "a|b"),
    "Conv2d": (_convs(nn.Conv2d), (2, 8, 9, 9), "a|b"),
    "Conv3d": (_convs(nn.Conv3d), (2, 8, 5, 5, 5), "a|b"),
    "Embedding": (lambda: Layers(nn.Embedding(32, 8), nn.Linear(8, 8), nn.Linear(8, 8)), None, "a"),
    "GPT-2 (Conv1D)": (lambda: hf.GPT2LMHeadModel(_config("GPT2", **GPT2)), None, ".*c_attn|.*c_fc"),
    "Llama": (lambda: hf.LlamaForCausalLM(_config("Llama")), None, ".*q_proj|.*v_proj|.*up_proj|.*down_proj"),
    "ViT": (
        lambda: hf.ViTForImageClassification(_config("ViT", image_size=16, patch_size=4)), IMAGE,
        ".*query|.*value|.*q_proj|.*v_proj",
    ),
    "BERT": (lambda: hf.BertModel(_config("Bert")), None, ".*query|.*value|.*dense"),
    "ResNet": (lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**RESNET)), IMAGE, ".*convolution"),
}  # fmt: skip
# What a tuner needs beside its defaults to take so small layers.
OPTIONS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 2}, "ADALORA": {"init_r": 2, "target_r": 2, "total_step": 9}, "LOHA": {"r": 2}, "LOKR": {"r": 2},
    "OFT": {"r": 0, "oft_block_size": 4}, "BOFT": {"boft_block_size": 4}, "VERA": {"r": 2}, "PVERA": {"r": 2},
    "VBLORA": {"r": 2, "num_vectors": 4, "vector_length": 4, "topk": 2}, "FOURIERFT": {"n_frequency": 8},
    "HRA": {"r": 2}, "MISS": {"r": 2}, "RANDLORA": {"r": 2}, "C3A": {"block_size": 4}, "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2}, "WAVEFT": {"n_frequency": 8}, "GRALORA": {"r": 2, "gralora_k": 2}, "DELORA": {"r": 2},
    "PSOFT": {"r": 2}, "HIRA": {"r": 2}, "POLY": {"r": 2, "n_tasks": 2}, "IA3": {"feedforward_modules": []},
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LORA", {}), "LoRA, rank-stabilised": ("LORA", {"use_rslora": True}), "DoRA": ("LORA", {"use_dora": True}),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    tuner: str
    host: str
    adapted: int
    affine: int
    merged: int
    error: float | None  # None: it could not be run or converted
    theirs: float | None
    reasons: tuple[str, ...]


def tuners() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The name, peft's name and the options of each tuner that has a merge."""
    yield from ((name, kind, options) for name, (kind, options) in VARIANTS.items())
    for key, cls in PEFT_TYPE_TO_TUNER_MAPPING.items():
        if hasattr(cls, "merge_and_unload") and key.value != "LORA":
            yield key.value, key.value, {}


def adapted(kind: str, options: dict[str, Any], host: str) -> Any:
    """A model that is adapted, whatever adapts it random.

    Raises:
        Exception: peft takes no such layers.
    """
    make, _, where = HOSTS[host]
    torch.manual_seed(0)
    config = next(cls for key, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if key.value == kind)
    given = {**OPTIONS.get(kind, {}), **options}
    if "target_modules" in config.__dataclass_fields__:
        given["target_modules"] = where
    model = make()
    own = {id(parameter) for parameter in model.parameters()}
    model = peft.get_peft_model(model, config(**given)).double().eval()  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if id(parameter) not in own and parameter.is_floating_point():
            parameter.data.add_(torch.empty_like(parameter).normal_(0, 0.2, generator=generator))
    return model


def layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    return {path: one for path, one in model.named_modules() if isinstance(one, BaseTunerLayer)}


def is_affine(layer: Any, given: Tensor) -> bool:
    if not given.is_floating_point():
        return True  # an embedding is a table, whatever computes it
    x, y = (torch.randn_like(given) for _ in range(2))
    with torch.no_grad():
        f = [layer(one) for one in (x, y, 0.25 * x + 0.75 * y)]
    return relative_error(0.25 * f[0] + 0.75 * f[1], f[2]) < AFFINE


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(x)
    return found if isinstance(found, Tensor) else found[0]


def run(name: str, kind: str, options: dict[str, Any], host: str) -> Case | None:
    """A case; None if peft takes no such layers."""
    shape = HOSTS[host][1]
    x = IDS if shape is None else torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    try:
        model = adapted(kind, options, host)
        there = layers(model)
        given: dict[str, Tensor] = {}
        handles = [
            one.register_forward_pre_hook(lambda module, args, path=path: given.setdefault(path, args[0].detach()))  # type: ignore[attr-defined]
            for path, one in there.items()
        ]
        truth = output(model, x)
    except Exception:
        return None
    for handle in handles:
        handle.remove()
    if not there:
        return None
    affine = sum(is_affine(one, given[path]) for path, one in there.items() if path in given)
    try:
        theirs = relative_error(output(copy.deepcopy(model).merge_and_unload(), x), truth)
    except Exception:
        theirs = None
    try:
        plan = structrep.plan(model, x)
        deploy = plan.reparameterize(x)
        left = layers(deploy)
        error = relative_error(output(deploy, x), truth)
    except StructrepError as refused:
        return Case(name, host, len(there), affine, 0, None, theirs, (str(refused).splitlines()[0],))
    reasons = [one.reason for one in plan.refusals if any(_within(one.layers, path) for path in left)]
    return Case(name, host, len(there), affine, len(there) - len(left), error, theirs, tuple(dict.fromkeys(reasons)))


def _within(refused: tuple[str, ...], path: str) -> bool:
    return any(one == path or one.startswith(f"{path}.") or not one for one in refused)


def _told(error: float | None) -> str:
    return "cannot" if error is None else "exact" if error < EXACT else f"off by {error:.2g}"


def table(cases: list[Case]) -> str:
    rows = [
        (
            case.tuner, case.host, f"{case.merged} of {case.adapted}",
            "" if case.affine == case.adapted else f"{case.affine} of {case.adapted}",
            _told(case.error), _told(case.theirs), "<br>".join(case.reasons[:2]).replace("|", "\\|"),
        )
        for case in cases
    ]  # fmt: skip
    head = ("tuner", "layers of", "merged", "affine, if not all", "structrep", "peft's own merge", "why others stay")
    return measure.markdown(head, rows)


def summary(cases: list[Case]) -> str:
    could = [case for case in cases if case.affine == case.adapted]
    whole = [case for case in cases if case.merged == case.adapted]
    part = [case for case in cases if 0 < case.merged < case.adapted]
    wrong = [case for case in cases if case.theirs is None or case.theirs >= EXACT]
    both = sum(one in whole for one in could)
    rest = len(cases) - len(whole) - len(part)
    return (
        f"{len(cases)} cases: {len(whole)} merged whole, {len(part)} in part, {rest} not. In {len(could)} all adapted "
        f"layers are affine, and of these {both} are merged whole. peft's own merge is off, or raises, in {len(wrong)}."
    )


PREFACE = """\
# Adapters

Written by `python -m benchmarks.adapters`, with peft {version}: each tuner that has a merge, on small models with
random weights, in float64. *merged* counts adapted layers that are plain ones in the deploy model; errors are those of
its outputs to the adapted model's. *affine* counts those whose own forward is an affine map, found on random numbers:
no merge can make one layer of another. What stays is a layer of peft's that works as before.

"""


def main(chosen: list[str]) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    cases = []
    for name, kind, options in tuners():
        for host in HOSTS if not chosen or kind in chosen or name in chosen else ():
            if (case := run(name, kind, options, host)) is not None:
                cases.append(case)
                print(*vars(case).values(), sep=" | ", flush=True)
    print(summary(cases))
    if not chosen:
        PAGE.write_text(PREFACE.format(version=peft.__version__) + summary(cases) + "\n\n" + table(cases))


if __name__ == "__main__":
    main(sys.argv[1:])
