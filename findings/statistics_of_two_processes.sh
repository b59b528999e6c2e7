#!/usr/bin/env bash
# torch 2.13.0, torch/distributed/checkpoint/_dedup_save_plans.py (`dedup_save_plans`)
#
# Guess: where tensors are the same on every process, torch.distributed.checkpoint writes all of them from one process,
# or at least all of one module, so that a batch norm's mean and variance belong together.
# Behaviour: each tensor is written by the process with the fewest bytes planned so far. Statistics that were collected on
# each process apart, as DistributedDataParallel with broadcast_buffers=False leaves them, are written as the mean of one
# process with the variance of another; loading says nothing.
#
# Output seen (3 processes; statistics are the number of the process):
#   norm.running_mean of process 2, norm.running_var of process 1
# (which processes may differ; that they do is what is held). Exits with 0 while it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/save.py" <<'PROGRAM'
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

dist.init_process_group("gloo")
model = nn.Sequential()
model.add_module("conv", nn.Conv2d(4, 8, 3))
model.add_module("norm", nn.BatchNorm2d(8))
model.norm.running_mean.fill_(dist.get_rank())
model.norm.running_var.fill_(dist.get_rank())
dcp.save(model.state_dict(), checkpoint_id=sys.argv[1])
dist.barrier()
if dist.get_rank() == 0:
    state = {name: torch.full_like(tensor, -1) for name, tensor in model.state_dict().items()}
    dcp.load(state, checkpoint_id=sys.argv[1], no_dist=True)
    mean, var = (int(state[f"norm.running_{what}"][0]) for what in ("mean", "var"))
    print(f"norm.running_mean of process {mean}, norm.running_var of process {var}")
    assert mean != var, "changed: both are of one process"
dist.destroy_process_group()
PROGRAM
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore -m torch.distributed.run --standalone --nproc_per_node 3 \
    "$folder/save.py" "$folder/checkpoint" 2>&1 | grep -v Warning
PROGRAM_STATUS=${PIPESTATUS[0]}
exit "$PROGRAM_STATUS"
