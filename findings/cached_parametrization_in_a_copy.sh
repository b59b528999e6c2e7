#!/usr/bin/env bash
# torch 2.13.0, torch/nn/utils/parametrize.py (`_inject_property`, `get_cached_parametrization`)
#
# Guess: inside `parametrize.cached()` a deep copy of a parametrized layer computes its own weight: the cache is kept by
# module and tensor name.
# Behaviour: the key is `id` of the layer that the parametrization was registered on, in a closure of a property of its
# class, which copies share. A copy made meanwhile gives the original's weight, whatever is done to its own parameters,
# and in the original's dtype after `.double()`; nothing is said. So an average of weights, or a perturbed copy, that is
# run under `cached()` is the model itself.
#
# Output seen:
#   under cached(): the copy, its scale doubled, differs by 0.0; its weight after double() is torch.float32
#   afterwards: the copy differs by 1.31
# Exits with 0 while it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/python" -W ignore - <<'PROGRAM'
import copy

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

torch.manual_seed(0)
layer = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
x = torch.randn(1, 3, 8, 8)
with torch.no_grad():
    with parametrize.cached():
        y = layer(x)
        twin = copy.deepcopy(layer)
        twin.parametrizations.weight.original0.mul_(2)
        inside = (twin(x) - y).abs().max().item()
        dtype = copy.deepcopy(layer).double().weight.dtype
    outside = (twin(x) - y).abs().max().item()
print(f"under cached(): the copy, its scale doubled, differs by {inside}; its weight after double() is {dtype}")
print(f"afterwards: the copy differs by {outside:.2f}")
assert (inside, dtype) == (0.0, torch.float32), "changed: copies have a cache of their own"
assert outside > 0.1
PROGRAM
