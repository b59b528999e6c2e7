"""What each process runs: `torchrun -m tests.needs.distributed.worker TASK FOLDER`. The first writes what came out."""

import runpy
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import structrep
from structrep.blocks.dbb import NormPad
from structrep.errors import Sharded
from tests.needs.distributed.training import (
    ACCUMULATED,
    OPTIONS,
    SyncedNorm,
    batch,
    even,
    expanded,
    loss_of,
    merged_first,
    sync_norms,
    train,
)
from tests.support import ROOT

BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
FLOAT32_INSIDE = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.bfloat16)


def shard(model: nn.Module, precision: MixedPrecisionPolicy | None = None) -> nn.Module:
    """Each stage a unit of FSDP2. In bfloat16 norms are units of their own, which stay in float32; where a `NormPad`
    reads the weight of its norm, the `NormPad`."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if precision is not None:
        pads = [module for module in model.modules() if isinstance(module, NormPad)]
        inside = {pad.norm for pad in pads}
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module not in inside]
        for module in (*pads, *norms):
            fully_shard(module, mesh=mesh, mp_policy=FLOAT32_INSIDE)
    for stage in (model.stem, model.body, model):
        fully_shard(stage, mesh=mesh, mp_policy=precision or MixedPrecisionPolicy())
    return model


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without shards, on the first process; nothing on the others."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def data_parallel(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for block in OPTIONS:
        model = DistributedDataParallel(sync_norms(expanded(block)))
        train(model)
        found[f"{block}/state"] = model.module.state_dict()
        for module in model.modules():
            if isinstance(module, SyncedNorm):
                module.__class__ = nn.BatchNorm2d
        found[f"{block}/back"] = structrep.reparameterize(model.eval(), norms="keep").state_dict()
    for block in ACCUMULATED:
        model = DistributedDataParallel(sync_norms(expanded(block)))
        train(model, parts=2)
        found[f"{block}/accumulated"] = model.module.state_dict()
    return found


def sharded(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for block in OPTIONS:
        model = shard(sync_norms(expanded(block)))
        train(model)
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / block)
        try:
            structrep.reparameterize(model.eval(), norms="keep")
        except Sharded as error:
            found[f"{block}/refused"] = str(error)
    return found


def apart(folder: Path) -> dict[str, object]:
    """Norms with statistics of each process, as they are and averaged, and what each process had."""
    model = even()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    model(batch(0, dist.get_rank())[0])
    own: list[dict[str, torch.Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(own, dict(model.named_buffers()))
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / "apart")
    recipe = runpy.run_path(str(ROOT / "examples" / "torchrun" / "train.py"))
    recipe["save"](model, folder / "averaged")
    return {"own": own}


def resharded(folder: Path) -> dict[str, object]:
    """The checkpoints of `sharded`, read by another number of processes, into models that had no memory yet."""
    found: dict[str, object] = {}
    x, _ = batch(0, 0)
    for block in OPTIONS:
        model = shard(expanded(block).to("meta"))
        model.to_empty(device="cpu")
        state = get_model_state_dict(model)
        dcp.load({"model": state}, checkpoint_id=folder / block)
        found[f"{block}/output"] = model.eval()(x).detach()
        found[f"{block}/state"] = whole(model)
    return found


def mixed(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for block in OPTIONS:
        model = shard(sync_norms(expanded(block).float()), BFLOAT16)
        loss_of(model).backward()
        found[f"{block}/gradients"] = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return found


def merged(folder: Path) -> dict[str, object]:
    """Blocks whose branches are merged first, with torch's own norms of all processes."""
    parallel = DistributedDataParallel(merged_first())
    nn.SyncBatchNorm.convert_sync_batchnorm(parallel)  # not before, for then it asks for a GPU
    train(parallel)
    parts = nn.SyncBatchNorm.convert_sync_batchnorm(merged_first())
    for stage in (parts[0], parts[2], parts):
        fully_shard(stage, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    train(parts)
    return {"parallel": parallel.module.state_dict(), "sharded": whole(parts)}


TASKS = {task.__name__: task for task in (data_parallel, sharded, apart, resharded, mixed, merged)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    target = Path(sys.argv[2])
    for name in sys.argv[1].split(","):
        result = TASKS[name](target)
        if dist.get_rank() == 0:
            torch.save(result, target / f"{name}.pt")
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.5)  # gloo's threads let go of Python objects, and abort the process if Python ends before they did
