"""Ways of running a training step, each against the plain one, in one process. About 20 s, most of it compiling."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

import structrep
from structrep.errors import Uninitialized
from structrep.train.expand import FAMILIES
from tests.needs.distributed.training import OPTIONS, Plain, batch, expanded, loss_of
from tests.support.models import settled
from tests.support.truth import EXACT, relative_error

X, _ = batch(0, 0)
BLOCKS = pytest.mark.parametrize("block", OPTIONS)


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def statistics(model: nn.Module) -> torch.Tensor:
    return torch.cat([buffer.flatten() for name, buffer in model.named_buffers() if "running" in name])


def plain_step(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    loss_of(other).backward()
    return other


def kinds(model: nn.Module) -> list[tuple[str, type[nn.Module]]]:
    return [(path, type(module)) for path, module in model.named_modules()]


def norms(model: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules() if isinstance(module, _BatchNorm)}


@BLOCKS
def test_synced_norms_before_expand(block):
    """A model whose norms are `SyncBatchNorm` gets blocks with such norms, and comes back with its own."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(settled(Plain()).train())
    wide = structrep.expand(model, block, **OPTIONS[block])
    assert norms(wide) == {nn.SyncBatchNorm}
    assert relative_error(copy.deepcopy(wide)(X), copy.deepcopy(model)(X)) < EXACT, "with statistics of batches"
    back = structrep.reparameterize(wide.eval(), norms="keep")
    assert kinds(back) == kinds(model)
    assert relative_error(back(X), model.eval()(X)) < EXACT


@BLOCKS
def test_synced_norms_after_expand(block):
    """The state dict is that of a model with plain norms, so weights go from one to the other."""
    plain = expanded(block)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(expanded(block))
    assert norms(synced) == {nn.SyncBatchNorm}
    loss_of(synced).backward()
    assert relative_error(gradients(synced), gradients(plain_step(plain))) < EXACT
    plain.load_state_dict(synced.state_dict())
    back = structrep.reparameterize(synced.eval(), norms="keep")
    assert relative_error(back(X), plain.eval()(X)) < EXACT
    Plain().load_state_dict(back.state_dict())


@contextlib.contextmanager
def statistics_kept(module):
    """A second pass over the same batch, which must not count again."""
    known = {norm: norm.momentum for norm in module.modules() if isinstance(norm, _BatchNorm)}
    for norm in known:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in known.items():
            norm.momentum = momentum


@BLOCKS
def test_activation_checkpointing(block):
    """With `statistics_kept`, gradients and norm statistics are those of the plain step. Without it the statistics
    of norms count a batch twice, as in any model; gradients are the same but for `dbb`, whose forward reads them."""
    model, bare = expanded(block), expanded(block)
    truth = plain_step(model)
    body, again = model.body, bare.body.forward
    model.body.forward = lambda x: checkpoint(
        type(body).forward, body, x, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), kept)
    )
    kept = statistics_kept(body)
    loss_of(model).backward()
    assert relative_error(gradients(model), gradients(truth)) < EXACT
    assert relative_error(statistics(model), statistics(truth)) < EXACT
    bare.body.forward = lambda x: checkpoint(again, x, use_reentrant=False)
    loss_of(bare).backward()
    assert (relative_error(gradients(bare), gradients(truth)) < EXACT) == (block != "dbb")
    assert relative_error(statistics(bare), statistics(truth)) > 1e-3


@BLOCKS
def test_two_passes_before_the_gradient(block):
    """As Siamese networks and distillation run a model: the gradient is the sum of those of the passes."""
    model, apart = expanded(block), expanded(block)
    (loss_of(model) + loss_of(model, 1)).backward()
    loss_of(apart).backward()
    loss_of(apart, 1).backward()
    assert relative_error(gradients(model), gradients(apart)) < EXACT


@BLOCKS
def test_compiled(block):
    """One graph, without a break."""
    torch.compiler.reset()
    model = expanded(block)
    truth = plain_step(model)
    loss_of(torch.compile(model, fullgraph=True, backend="aot_eager")).backward()
    assert relative_error(gradients(model), gradients(truth)) < EXACT
    assert relative_error(statistics(model), statistics(truth)) < EXACT


@pytest.mark.slow
def test_compiled_with_inductor():
    torch.compiler.reset()
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).double()
    model = structrep.expand(plain, "doconv", where="0")
    truth = copy.deepcopy(model)
    truth(X).square().sum().backward()
    compiled = torch.compile(model, fullgraph=True)
    compiled(X).square().sum().backward()
    assert relative_error(gradients(model), gradients(truth)) < EXACT
    back = structrep.reparameterize(compiled.eval(), norms="keep")
    assert relative_error(back(X), model(X)) < EXACT


@BLOCKS
def test_autocast(block):
    """Weights, gradients and statistics stay in float32; the plain network's gradient is off by as much."""
    exact, model = expanded(block), expanded(block).float()
    truth = plain_step(exact)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model).backward()
    assert {tensor.dtype for tensor in (*model.parameters(), gradients(model), statistics(model))} == {torch.float32}
    error = torch.linalg.norm(gradients(model) - gradients(truth)) / torch.linalg.norm(gradients(truth))
    assert 1e-4 < error < 0.15
    assert relative_error(statistics(model), statistics(truth)) < 0.01


@BLOCKS
def test_on_the_meta_device(block):
    """A block whose memory `to_empty` made computes what its state dict says: numbers that are in none are there."""
    model = expanded(block).eval()
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    for value in empty.state_dict().values():
        value.fill_(7)
    empty.load_state_dict(model.state_dict())
    assert relative_error(empty(X), model(X)) < EXACT


@BLOCKS
def test_made_on_the_meta_device(block):
    """A block made without memory gets its fixed numbers by `reset_parameters`, as torch's layers get theirs."""
    ((layer, kind),) = [pair for pair in FAMILIES[block].of.items() if pair[0] in (nn.Conv2d, nn.Linear)]
    arguments = (4, 4) if layer is nn.Linear else (4, 4, 7, 1, 3, 1, 4) if block == "replknet" else (4, 4, 3, 1, 1)
    with torch.device("meta"):
        made = kind(*arguments)
    made.to_empty(device="cpu")
    for module in made.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    truth = dict(kind(*arguments).named_buffers())
    assert all(torch.equal(buffer, truth[name]) for name, buffer in made.named_buffers())


def test_a_model_without_memory_is_not_expanded():
    with torch.device("meta"):
        model = Plain()
    with pytest.raises(Uninitialized, match="load the weights first"):
        structrep.expand(model)
