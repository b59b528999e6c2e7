"""What holds of every call: model and process are as they were, the result is of its dtype and format, and final."""

import pytest
import torch
from torch import nn

import structrep
from structrep import errors
from tests.foreign import repvgg
from tests.support.models import bn, conv, noise, randomised
from tests.support.truth import CLOSE, EXACT, call, check, distance, equal, executed, says

X = noise(2, 4, 5, 6)


def two_blocks():
    return nn.Sequential(repvgg.Official(4, 4), repvgg.Summed(4))


# --- models with little in them ------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "refused"), [
    (nn.Identity, ""), (conv, ""), (lambda: bn(4), "Isolated"), (nn.ReLU, ""), (nn.Sequential, ""),
    (lambda: nn.Sequential(nn.Sequential()), ""), (lambda: nn.Sequential(nn.Identity(), nn.Identity()), ""),
    (lambda: nn.Sequential(conv(), nn.Sequential(), nn.Sequential(nn.Identity())), ""), (lambda: nn.Dropout(0.5), ""),
    (lambda: nn.Sequential(conv()), ""), (lambda: nn.AvgPool2d(2, 1), ""), (lambda: nn.PReLU(4), ""),
    (lambda: nn.MaxPool2d(1), ""),
])  # fmt: skip
def test_nothing_to_merge(make, refused):
    deploy = check(make(), X, merges=0, refused=refused, within=0.0)
    assert type(deploy) is type(make())


@pytest.mark.parametrize("model", [nn.ModuleList(), nn.Module(), nn.ParameterList([torch.ones(2)])])
def test_nothing_to_call(model):
    deploy = says(structrep.plan(model.eval()), 0).reparameterize()
    assert type(deploy) is type(model)


def test_containers_without_a_forward():
    model = nn.ModuleList([nn.Sequential(conv(), bn(4)), nn.ModuleDict({"a": repvgg.Official(4, 4)})]).eval()
    deploy = says(structrep.plan(randomised(model)), 2).reparameterize()
    assert equal(deploy[0], model[0], X)
    assert equal(deploy[1]["a"], model[1]["a"], X)
    assert executed(deploy[0], X)["norm"] == executed(deploy[1]["a"], X)["norm"] == 0


# --- dtypes, devices, formats --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_keep_their_dtype(dtype):
    model = randomised(two_blocks(), dtype=dtype)
    deploy = says(structrep.plan(model, X.to(dtype)), 2).reparameterize(X.to(dtype))
    assert {p.dtype for p in deploy.parameters()} == {dtype}
    assert structrep.verify(model, deploy, X.to(dtype)).ok


def test_half_overflow_is_refused():
    """Each branch is finite in half precision, the merged kernel is not."""
    model = randomised(repvgg.Official(4, 4), dtype=torch.float16)
    with torch.no_grad():
        for branch in (model.rbr_dense, model.rbr_1x1):
            branch.conv.weight.fill_(100.0)
            branch.bn.running_var.fill_(1e-3)
            branch.bn.weight.fill_(60.0)
    assert torch.isfinite(call(model, X.half() * 1e-3)).all()
    deploy = says(structrep.plan(model), 0, "Overflow").reparameterize()
    assert all(torch.isfinite(p).all() for p in deploy.parameters())


def test_mixed_dtypes_stay():
    """Norms in float32 inside a half model, as mixed-precision code keeps them."""
    model = randomised(repvgg.Official(4, 4), dtype=torch.bfloat16)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.float()
    deploy = says(structrep.plan(model), 1).reparameterize()
    assert {p.dtype for p in deploy.parameters()} == {torch.bfloat16}
    assert deploy(X.bfloat16()).dtype == torch.bfloat16


def test_new_layers_are_on_the_models_device():
    """Or it is said that there are no numbers."""
    model = randomised(repvgg.Official(4, 4)).to("meta")
    with pytest.raises(errors.StructrepError, match="meta"):
        structrep.reparameterize(model, verify=False)


def test_channels_last_stays():
    model = randomised(repvgg.Official(4, 4)).to(memory_format=torch.channels_last)
    deploy = says(structrep.plan(model), 1).reparameterize()
    weight = next(p for p in deploy.parameters() if p.ndim == 4)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_float32_example_for_a_float64_model():
    """Numbers say nothing of the dtype that the model runs in."""
    model = randomised(repvgg.Summed(4))
    deploy = says(structrep.plan(model, X.float()), 1).reparameterize(X.float())
    assert equal(deploy, model, X)


# --- again and apart -----------------------------------------------------------------------------------------


def test_converting_twice_is_a_no_op_even_in_place():
    model = randomised(two_blocks())
    truth = call(model, X)
    once = says(structrep.plan(model), 2).reparameterize(inplace=True)
    state = {k: v.clone() for k, v in once.state_dict().items()}
    twice = says(structrep.plan(once), 0).reparameterize(inplace=True)
    assert twice is once is model
    assert all(torch.equal(v, state[k]) for k, v in twice.state_dict().items())
    assert distance(call(twice, X), truth) <= EXACT


def test_a_plan_can_be_applied_more_than_once():
    model = randomised(two_blocks())
    plan = says(structrep.plan(model), 2)
    a, b = plan.apply(), plan.apply()
    assert equal(a, b, X, within=0.0)
    assert not {id(p) for p in a.parameters()} & {id(p) for p in b.parameters()}
    assert not {p.data_ptr() for p in a.parameters()} & {p.data_ptr() for p in b.parameters()}
    plan.apply(inplace=True)
    with pytest.raises(structrep.StructrepError, match=r"plan\(model\)"):
        plan.apply()


def test_weights_changed_between_plan_and_apply():
    model = randomised(repvgg.Official(4, 4))
    plan = says(structrep.plan(model), 1)
    randomised(model, seed=5)
    with pytest.raises(structrep.StructrepError, match="weights changed since this plan was made"):
        plan.apply()


def test_weights_written_past_their_version_are_those_that_are_merged():
    model = randomised(nn.Sequential(conv(), bn(4), nn.ReLU()))
    plan = says(structrep.plan(model), 1)
    model[0].weight.data.mul_(2)
    assert equal(plan.apply(), model, X, within=CLOSE)


# --- the process ---------------------------------------------------------------------------------------------


def test_conversion_under_grad_and_in_inference_mode():
    model = randomised(repvgg.Official(4, 4))
    with torch.enable_grad():
        deploy = says(structrep.plan(model, X), 1).reparameterize(X)
    assert all(p.is_leaf for p in deploy.parameters())
    with torch.inference_mode():
        inside = structrep.reparameterize(model, X)
    assert equal(inside, deploy, X, within=0.0)
    deploy(X).sum().backward()


def test_default_dtype_and_seed_are_left_alone():
    model = randomised(repvgg.Official(4, 4))
    torch.manual_seed(7)
    a = torch.rand(3)
    torch.manual_seed(7)
    says(structrep.plan(model, X), 1).reparameterize(X)
    assert torch.equal(torch.rand(3), a)
    assert torch.get_default_dtype() == torch.float32


def test_old_default_dtype_changes_nothing():
    torch.set_default_dtype(torch.float64)
    try:
        deploy = says(structrep.plan(randomised(repvgg.Official(4, 4)).float()), 1).reparameterize()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in deploy.parameters()} == {torch.float32}
