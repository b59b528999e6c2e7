"""A recipe for several processes: expand, train under torchrun, save shards, export in one process.

torchrun --standalone --nproc_per_node 2 examples/torchrun/train.py train run
torchrun --standalone --nproc_per_node 2 examples/torchrun/train.py train run-sharded --fsdp
python examples/torchrun/train.py export run digits.pt

gloo where there is no CUDA device, NCCL and SyncBatchNorm where there are.
"""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import typer
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import structrep

BATCH = 128  # images of all processes together

app = typer.Typer(help=__doc__)


def network() -> nn.Sequential:
    """What is deployed: (N, 1, 8, 8) -> (N, 10)."""
    layers: list[nn.Module] = []
    for inside, outside, stride in ((1, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1)):
        layers += [nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def expanded(block: str) -> nn.Module:
    """What is trained: the same in every process, for `fully_shard` sends no weights round."""
    torch.manual_seed(0)
    return structrep.expand(network(), block)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) in [0, 1] and labels (N,): three quarters to train on, a quarter to test on."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    x, x_test, y, y_test = (torch.from_numpy(part) for part in parts)
    return x.float().view(-1, 1, 8, 8) / 16, y, x_test.float().view(-1, 1, 8, 8) / 16, y_test


def distribute(model: nn.Module, device: torch.device, fsdp: bool) -> nn.Module:
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # which a CPU has no kernels for
    if not fsdp:
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in structrep.expand_layers(model):
        fully_shard(model.get_submodule(layer), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def save(model: nn.Module, folder: Path) -> None:
    """Each process writes its own part, under the names that the expanded model has without wrappers."""
    for buffer in model.buffers():  # without SyncBatchNorm every process has norm statistics of its own
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)  # what all have is written by the first
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder, planner=planner)  # type: ignore[attr-defined]


@app.command()
def train(folder: Path, block: str = "repvgg", fsdp: bool = False, epochs: int = 4) -> None:
    """Train on the processes that torchrun started, and save into a folder."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    own = slice(dist.get_rank(), None, dist.get_world_size())

    model = distribute(expanded(block).to(device), device, fsdp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    images, labels, *_ = digits()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(BATCH)[:-1]:
            x, y = images[batch[own]].to(device), labels[batch[own]].to(device)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    save(model, folder)
    dist.destroy_process_group()
    time.sleep(0.5)  # gloo's threads let go of Python objects, and abort the process if Python ends before they did


@app.command()
def export(folder: Path, out: Path, block: str = "repvgg") -> None:
    """Make a saved model the plain network again, and write its state dict. One process, any machine."""
    model = expanded(block)
    state = model.state_dict()
    dcp.load({"model": state}, checkpoint_id=folder)  # type: ignore[attr-defined]
    model.load_state_dict(state)
    *_, images, labels = digits()
    plain = structrep.reparameterize(model.eval(), images[:8], norms="keep")
    torch.save(plain.state_dict(), out)

    deploy = network().eval()
    deploy.load_state_dict(torch.load(out))
    with torch.no_grad():
        trained, deployed = model(images).argmax(1), deploy(images).argmax(1)
    right = [int((found == labels).sum()) for found in (trained, deployed)]
    print(f"{block}: {right[0]} of {len(labels)} test images right as trained, {right[1]} as deployed, in {out}")


if __name__ == "__main__":
    app()
