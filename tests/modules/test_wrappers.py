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
from structrep.errors import BadInput, Sharded, Unmerged
from tests.support.models import settled
from tests.support.truth import EXACT, SAME, relative_error

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


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_it_is_the_model_inside_that_comes_back(model, wrap):
    for inplace in (False, True):
        wrapped = wrap(model)
        truth = model(X)
        deploy = structrep.reparameterize(wrapped, X, inplace=inplace)
        assert type(deploy) is type(model)
        assert layers(deploy) == ["Conv2d", "ReLU", "Conv2d"]
        assert relative_error(deploy(X), truth) < EXACT
        assert (deploy is model) == inplace


@pytest.mark.usefixtures("process")
def test_distributed_data_parallel(model):
    truth = model(X)
    deploy = structrep.reparameterize(DistributedDataParallel(model), X)
    assert type(deploy) is type(model)
    assert layers(deploy) == ["Conv2d", "ReLU", "Conv2d"]
    assert relative_error(deploy(X), truth) < EXACT


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
    assert relative_error(deploy(X), ema(X)) < EXACT
    assert relative_error(deploy(X), model(X)) > 1e-3


@pytest.mark.usefixtures("process")
def test_sharded_parameters_are_an_error(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in model:
        fully_shard(layer)
    with pytest.raises(Sharded, match=r"0\.\S+ is a DTensor .* load the full state dict into an unsharded model"):
        structrep.reparameterize(model)
    assert set(model.state_dict()) == set(state)


# --- compiled, scripted ----------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.dense, self.point = nn.Conv2d(channels, 4, 3, padding=1), nn.Conv2d(channels, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.dense(x) + self.point(x))


def two_blocks():
    return settled(nn.Sequential(Branches(), nn.ReLU(), Branches(4)))


def whole(backend):
    model = two_blocks()
    model.compile(backend=backend)
    return model


def block(backend):
    model = two_blocks()
    model[0].compile(backend=backend)
    return model


def wrapped_block(backend):
    model = two_blocks()
    model[0] = torch.compile(model[0], backend=backend)
    return model


def wrapped_rows(backend):
    """Rows of layers, which have no forward of their own."""
    row = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    one = torch.compile(nn.Conv2d(4, 4, 1), backend=backend)
    return settled(nn.Sequential(torch.compile(row, backend=backend), nn.ReLU(), one, nn.BatchNorm2d(4)))


def assigned(backend):
    model = two_blocks()
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def assigned_in_block(backend):
    model = two_blocks()
    model[2].forward = torch.compile(model[2].forward, backend=backend)
    return model


def a_class_compiled(backend):
    class Compiled(Branches):
        @torch.compile(backend=backend)
        def forward(self, x):
            return self.norm(self.dense(x) + self.point(x))

    return settled(nn.Sequential(Compiled(), Branches(4)))


def a_function_compiled(backend):
    @torch.compile(backend=backend)
    def act(x):
        return x * x.sigmoid()

    class Acts(Branches):
        def forward(self, x):
            return act(super().forward(x))

    return settled(nn.Sequential(Acts(), Branches(4)))


COMPILED = [
    *(whole, block, wrapped_block, wrapped_rows, assigned, assigned_in_block),
    *(a_class_compiled, a_function_compiled),
]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("make", COMPILED)
def test_what_is_compiled_is_seen_through(make, backend):
    torch.compiler.reset()
    model = make(backend)
    truth = model(X)  # compiled by now
    assert len(structrep.plan(model).merges) == 2
    deploy = structrep.reparameterize(model, X)
    assert relative_error(deploy(X), truth) < EXACT
    assert relative_error(model(X), truth) < SAME
    assert not any(vars(module).get("_compiled_call_impl") for module in deploy.modules())
    deploy.compile(backend=backend)
    assert relative_error(deploy(X), truth) < EXACT
    assert structrep.reparameterize(model, X, inplace=True) is model
    assert not structrep.plan(model).merges
    assert relative_error(model(X), truth) < EXACT  # not what was compiled of the old layers
    for parameter in model.parameters():
        parameter.data.mul_(2)
    assert relative_error(model(X), truth) > 1e-2


def test_a_copy_runs_its_own_layers_where_the_forward_is_assigned():
    """Decorators of the forward, kept on the instance, hold the model that they decorate."""
    model = two_blocks()
    forward = model.forward
    model.forward = lambda x: forward(x).clamp(max=1e9)
    truth = model(X)
    deploy = structrep.reparameterize(model, X)
    assert len(structrep.plan(model).merges) == 2
    assert relative_error(deploy(X), truth) < EXACT
    for parameter in deploy.parameters():
        parameter.data.mul_(2)
    assert relative_error(deploy(X), truth) > 1e-2
    assert relative_error(model(X), truth) == 0


def loaded(model, path="scripted.pt"):
    torch.jit.save(torch.jit.script(model), path)
    return torch.jit.load(path)


SCRIPTS = {
    "script": torch.jit.script,
    "trace": lambda model: torch.jit.trace(model, X),
    "load": loaded,
    "freeze": lambda model: torch.jit.freeze(torch.jit.script(model)),
}


@pytest.mark.parametrize("how", SCRIPTS)
def test_scripts_stay_and_the_rest_merges(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inner = SCRIPTS[how](settled(nn.Sequential(Branches())))
    model = nn.Sequential(inner, settled(Branches(4))).eval()
    plan = structrep.plan(model)
    assert [merge.where for merge in plan.merges] == ["1.reparam_conv"]
    assert [(refusal.where, refusal.kind) for refusal in plan.refusals] == [("0", "Untraceable")]
    assert "is TorchScript, whose code is fixed" in plan.refusals[0].reason
    assert relative_error(plan.reparameterize()(X), model(X)) < EXACT


@pytest.mark.parametrize("how", SCRIPTS)
def test_a_script_itself_is_bad_input(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = SCRIPTS[how](settled(nn.Sequential(Branches())))
    for call in (
        structrep.plan,
        structrep.reparameterize,
        structrep.monitor,
        structrep.assert_merged,
        structrep.expand,
    ):
        with pytest.raises(BadInput, match="is TorchScript, whose code is fixed: give the module that it was made of"):
            call(script)


def test_a_script_that_is_never_called_spoils_nothing():
    class Loses(Branches):
        def __init__(self):
            super().__init__()
            self.loss = torch.jit.script(nn.MSELoss())

    model = settled(nn.Sequential(Loses()))
    plan = structrep.plan(model, X)
    assert len(plan.merges) == 1
    assert relative_error(plan.reparameterize(X)(X), model(X)) < EXACT


class ForgetsTrain(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)


class ForgetsEval(nn.Sequential):
    def eval(self):
        super().eval()

    def to(self, *args, **kwargs):
        super().to(*args, **kwargs)


@pytest.mark.parametrize("cls", [ForgetsTrain, ForgetsEval])
def test_modules_whose_modes_give_nothing_back(cls):
    model = cls(settled(Branches()), nn.ReLU(), settled(Branches(4)))
    model.eval()
    deploy = structrep.reparameterize(model, X)
    assert relative_error(deploy(X), model(X)) < EXACT
    structrep.assert_merged(deploy)
    with pytest.raises(Unmerged):
        structrep.assert_merged(model.train() or model)
    assert len(structrep.monitor(model).kernels) == 2
    assert isinstance(structrep.expand(model, "doconv", where="0.dense"), cls)
    assert structrep.verify(model.eval() or model, deploy, X).ok


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
    assert relative_error(deploy(x), truth) < EXACT
    assert relative_error(deploy.train().eval()(x), truth) < EXACT
