"""What torch wraps around a model to train, average, compile or shard it."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import structrep
from structrep.blocks import RepVGGBlock2d
from structrep.errors import Sharded
from tests.models import relative_error, settled

X = torch.randn(2, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return settled(nn.Sequential(RepVGGBlock2d(3, 4, 3, padding=1), nn.ReLU(), RepVGGBlock2d(4, 4, 3, padding=1)))


@pytest.fixture
def process(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def layers(model):
    return [type(module).__name__ for module in model.modules() if not list(module.children())]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_it_is_the_model_inside_that_comes_back(model, wrap, inplace):
    wrapped = wrap(model)
    truth = model(X)
    deploy = structrep.reparameterize(wrapped, X, inplace=inplace)
    assert type(deploy) is type(model)
    assert layers(deploy) == ["Conv2d", "ReLU", "Conv2d"]
    assert relative_error(deploy(X), truth) < 1e-12
    assert (deploy is model) == inplace


@pytest.mark.usefixtures("process")
def test_distributed_data_parallel(model):
    truth = model(X)
    deploy = structrep.reparameterize(DistributedDataParallel(model), X)
    assert type(deploy) is type(model)
    assert layers(deploy) == ["Conv2d", "ReLU", "Conv2d"]
    assert relative_error(deploy(X), truth) < 1e-12


@pytest.mark.parametrize("average", ["swa", "timm"])
def test_an_averaged_copy(model, average):
    """An EMA copy is a model of its own, that calls what it averaged."""
    ema = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        if average == "swa"
        else timm.utils.ModelEmaV3(model)
    ).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.1)
    for step in range(2):
        ema.update_parameters(other) if average == "swa" else ema.update(other, step=step)
    deploy = structrep.reparameterize(ema, X)
    assert type(deploy) is type(ema)
    assert layers(deploy.module) == ["Conv2d", "ReLU", "Conv2d"]
    assert relative_error(deploy(X), ema(X)) < 1e-12
    assert relative_error(deploy(X), model(X)) > 1e-3


@pytest.mark.usefixtures("process")
def test_sharded_parameters_are_an_error(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in model:
        fully_shard(layer)
    with pytest.raises(Sharded, match=r"0\.\S+ is a DTensor .* load the full state dict into an unsharded model"):
        structrep.reparameterize(model)
    assert set(model.state_dict()) == set(state)


class Toggling(nn.Linear):
    """As in loralib: the adapter is in the weights in eval mode, and train() takes it out again."""

    def __init__(self, toggles):
        super().__init__(5, 5)
        self.down, self.up = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(5, 2))
        self.toggles, self.merged = toggles, False

    def train(self, mode=True):
        super().train(mode)
        if self.toggles and mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.up @ self.down
            self.merged = not mode
        return self

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("toggles", [True, False])
def test_train_takes_nothing_out_of_a_deploy_model(toggles):
    torch.manual_seed(0)
    model = settled(nn.Sequential(Toggling(toggles), nn.BatchNorm1d(5)))
    x = X[0, 0]
    truth = model(x).detach()
    deploy = structrep.reparameterize(model, x)
    assert layers(deploy) == ["Linear", "Features2d"]
    assert relative_error(deploy(x), truth) < 1e-12
    assert relative_error(deploy.train().eval()(x), truth) < 1e-12
