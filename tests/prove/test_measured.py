"""Merges chosen by measurement, in runtimes of which we know how long each layer takes."""

import json
import time

import pytest
import torch
from torch import nn

import structrep
from structrep.blocks import LargeKernelBlock2d, RepVGGBlock2d
from structrep.errors import BadInput, Slower
from structrep.prove.latency import WARM, in_turn
from structrep.prove.measured import Measured
from tests.support.models import settled
from tests.support.truth import CLOSE, relative_error, says

X = torch.randn(1, 4, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MILLISECOND = 1e-3


def runtime(cost):
    """A runtime in which a module takes as many milliseconds as its layers are said to."""

    def ready(model, args, kwargs):
        span = MILLISECOND * sum(map(cost, model.modules()))

        def run():
            time.sleep(span)
            return model(*args, **kwargs)

        return run

    return ready


def large_kernels_with_bias_are_slow(layer):
    if isinstance(layer, nn.Conv2d):
        return 30 if layer.kernel_size == (9, 9) and layer.bias is not None else 2
    return 0


def every_layer_takes_as_long(layer):
    return 3 * isinstance(layer, (nn.Conv2d, nn.BatchNorm2d))


def model():
    torch.manual_seed(0)
    large = LargeKernelBlock2d(4, 4, 9, padding=4, groups=4)
    return settled(nn.Sequential(large, nn.ReLU(), RepVGGBlock2d(4, 4, 3, padding=1), nn.ReLU()))


def test_what_is_slower_merged_stays_and_is_merged_in_part():
    net = model()
    plan = structrep.plan(net, X, cost=Measured(runtime(large_kernels_with_bias_are_slow)))
    assert "repvgg" in {rule for merge in plan.merges for rule in merge.rules}
    slow = [refusal for refusal in plan.refusals if refusal.kind == "Slower"]
    assert any("conv 9x9" in refusal.what and "ms, as one layer it would take" in refusal.reason for refusal in slow)
    assert all("9x9" not in merge.after for merge in plan.merges)
    deploy = plan.reparameterize(X)
    assert relative_error(deploy(X), net(X)) < CLOSE
    norms = [layer for layer in deploy.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 1  # that of the small kernel is folded


def test_where_fewer_layers_are_faster_all_is_merged_that_can_be():
    net = model()
    measured = Measured(runtime(every_layer_takes_as_long))
    plan = structrep.plan(net, X, cost=measured)
    assert [merge.where for merge in plan.merges] == [merge.where for merge in structrep.plan(net, X).merges]
    assert all(merge.seconds[0] > merge.seconds[1] for merge in plan.merges)
    assert list(plan.latency.models) == ["merged", "as it is"]
    assert "ms -> " in str(plan)


def test_never_slower_than_none():
    """Single merges seem to pay, and the model as a whole is slower for it: it stays as it is."""
    net = model()

    def ready(layers, args, kwargs):
        whole = isinstance(layers, nn.Sequential)
        merged = not any(isinstance(layer, nn.BatchNorm2d) for layer in layers.modules())
        return lambda: time.sleep(MILLISECOND * (20 if whole == merged else 2))

    plan = structrep.plan(net, X, cost=Measured(ready))
    assert not plan.merges
    assert {refusal.kind for refusal in plan.refusals} >= {"Slower"}
    assert any("the whole model takes" in refusal.reason for refusal in plan.refusals)
    assert list(plan.apply().state_dict()) == list(net.state_dict())


def test_timings_are_kept(tmp_path):
    net, cache, ran = model(), tmp_path / "timings.json", []

    def ready(layers, args, kwargs):
        ran.append(layers)
        return runtime(every_layer_takes_as_long)(layers, args, kwargs)

    first = structrep.plan(net, X, cost=Measured(ready, cache))
    stored = json.loads(cache.read_text())
    assert len(stored) == len({(merge.before, merge.parameters) for merge in first.merges})
    assert all("torch" in key and "float64" in key for key in stored)
    ran.clear()
    again = structrep.plan(net, X, cost=Measured(ready, cache))
    assert again.merges == first.merges
    assert len(ran) == 2  # the whole models


def test_bad_input(tmp_path):
    net = model()
    with pytest.raises(BadInput, match="needs example_inputs"):
        structrep.plan(net, cost="measured")
    with pytest.raises(BadInput, match=r"cost='fast': give 'counted', 'measured' or a structrep.Measured"):
        structrep.plan(net, X, cost="fast")
    with pytest.raises(BadInput, match="norms='keep' merges every block"):
        structrep.plan(
            structrep.expand(nn.Sequential(nn.Conv2d(4, 4, 3)), "doconv", where="0").eval(),
            X.float(),
            norms="keep",
            cost="measured",
        )
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(BadInput, match=r"bad.json holds no timings .*: remove it, or name another"):
        Measured(cache=tmp_path / "bad.json")


def test_in_torch_itself():
    net = model()
    plan = structrep.plan(net, X, cost="measured")
    assert plan.merges or {refusal.kind for refusal in plan.refusals} == {"Slower"}
    assert relative_error(plan.apply()(X), net(X)) < CLOSE
    assert issubclass(Slower, structrep.Refusal)


class Counts(nn.Module):
    """A forward that changes its module, its input, and draws numbers."""

    def __init__(self):
        super().__init__()
        self.block, self.drop = RepVGGBlock2d(4, 4, 3, padding=1), nn.Dropout()
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs.add_(1)
        torch.rand(1)
        return self.block(self.drop(x)).relu_() + x.add_(1)


def test_neither_model_nor_input_are_changed_by_timing():
    net = settled(nn.Sequential(Counts(), RepVGGBlock2d(4, 4, 3, padding=1)))
    net[0].drop.train()
    x, state = X.clone(), {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch.manual_seed(0)
    structrep.plan(net, x.float(), cost="measured")
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert drawn == torch.rand(1)
    assert net[0].drop.training
    assert torch.equal(x, X)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_a_runtime_that_fails(tmp_path):
    def fails(layers, args, kwargs):
        raise RuntimeError("no such operator")

    def takes_whole_models(layers, args, kwargs):
        if isinstance(layers, torch.fx.GraphModule):
            raise RuntimeError("no such operator")
        return runtime(every_layer_takes_as_long)(layers, args, kwargs)

    with pytest.raises(BadInput, match=r"the runtime does not take Sequential: .*no such operator"):
        structrep.plan(model(), X, cost=Measured(fails))
    with pytest.raises(BadInput, match=r"is a folder"):
        Measured(cache=tmp_path)
    assert structrep.plan(model(), X, cost=Measured(takes_whole_models)).merges


def test_a_plan_that_has_counted_has_nothing_to_time_with():
    plan = says(structrep.plan(model()), 2)
    with pytest.raises(BadInput, match=r"cost='measured'\) gives the faster plan"):
        plan.faster(X)


def test_a_run_is_over_when_the_device_is_done(monkeypatch):
    """On any accelerator: one by name alone."""
    events = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: events.append(device.type))
    for kind in ("xpu", "mps"):
        found = in_turn({"run": lambda: events.append("run")}, 1, torch.device(kind))
        assert events == [kind, "run", kind] * (WARM + 1)
        assert found.device == kind
        events.clear()
    in_turn({"run": lambda: events.append("run")}, 1, torch.device("cpu"))
    assert set(events) == {"run"}
