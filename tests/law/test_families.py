"""The five families as other people write them: one plain layer each, equal in float64, and still the user's model."""

import copy
import io
import pickle
import warnings

import pytest
import timm
import torch
from torch import fx, nn

import structrep
from tests.foreign.cases import BLOCKS, NETWORKS, Case
from tests.foreign.expandnet import HalfLinear, NonLinear, expand_cl
from tests.foreign.networks import TwoInputs
from tests.foreign.repvgg import Stacked
from tests.support.models import noise, randomised
from tests.support.truth import EXACT, SAME, call, distance, equal, executed, fingerprint, flat

ALL = [*BLOCKS, *NETWORKS]


class Converted:
    """A case's model, its inputs and its deploy form, made once for all laws."""

    made: dict[str, "Converted"] = {}  # noqa: RUF012

    def __init__(self, case: Case) -> None:
        self.model = randomised(case.make())
        self.inputs = []
        for size in case.sizes:
            x = noise(2, case.channels, *size)
            try:
                call(self.model, x)
            except (RuntimeError, ValueError):  # smaller than the kernel
                continue
            self.inputs.append(x)
        assert len(self.inputs) >= (3 if case.dims else 1)
        self.deploy = structrep.reparameterize(self.model)

    @property
    def x(self) -> torch.Tensor:
        return self.inputs[0]

    @classmethod
    def of(cls, case: Case) -> "Converted":
        if case.name not in cls.made:
            cls.made[case.name] = cls(case)
        return cls.made[case.name]


every_case = pytest.mark.parametrize("case", ALL, ids=str)
# What does not depend on the family is shown on one block of each, and on a network of several.
EACH = [*{case.rules: case for case in BLOCKS}.values(), next(case for case in NETWORKS if case.name == "net-all-five")]
one_of_each = pytest.mark.parametrize("case", EACH, ids=str)


@every_case
def test_each_block_becomes_one_layer_under_the_name_of_the_family(case):
    """One that is equal in float64 and stores less: what became useless is gone, a gradient reaches the rest."""
    it = Converted.of(case)
    plan = structrep.plan(it.model)
    assert set(case.rules) <= {rule for merge in plan.merges for rule in merge.rules}, f"{plan}"
    assert equal(it.deploy, it.model, *it.inputs)
    ran = executed(it.deploy, it.x)
    assert {kind: ran[kind] for kind in case.after} == case.after
    assert not ran["einsum"]
    stored, was = (sum(p.numel() for p in model.parameters()) for model in (it.deploy, it.model))
    assert stored < was
    deploy = copy.deepcopy(it.deploy).requires_grad_()
    sum(y.sum() for y in flat(deploy(it.x.clone()))).backward()
    assert not [name for name, p in deploy.named_parameters() if p.grad is None]


@one_of_each
def test_example_inputs_and_inplace_make_no_difference(case):
    it = Converted.of(case)
    truth = [call(it.model, x) for x in it.inputs]
    for given, inplace in ((None, True), (it.x, False), ((it.x,), True)):
        model = copy.deepcopy(it.model)
        before = fingerprint(model)
        deploy = structrep.reparameterize(model, given, inplace=inplace)
        assert max(distance(call(deploy, x), y) for x, y in zip(it.inputs, truth, strict=True)) <= EXACT
        assert {k: executed(deploy, it.x)[k] for k in case.after} == case.after
        if inplace:
            assert deploy is model
        else:
            assert fingerprint(model) == before
            assert equal(model, it.model, *it.inputs, within=0.0)
            shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in deploy.parameters()}
            assert not shared - {0}


@one_of_each
def test_planning_leaves_the_model_alone(case):
    model = copy.deepcopy(Converted.of(case).model)
    before = fingerprint(model)
    repr(structrep.plan(model)), str(structrep.plan(model, Converted.of(case).x))
    assert fingerprint(model) == before


@one_of_each
def test_converting_again_changes_nothing(case):
    it = Converted.of(case)
    plan = structrep.plan(it.deploy, it.x)
    assert not plan.merges
    again = structrep.reparameterize(it.deploy)
    assert equal(again, it.deploy, *it.inputs, within=0.0)
    assert [(k, v.shape) for k, v in again.state_dict().items()] == [
        (k, v.shape) for k, v in it.deploy.state_dict().items()
    ]


@one_of_each
def test_float32_errs_by_rounding_only(case):
    it = Converted.of(case)
    model = copy.deepcopy(it.model).float()
    deploy = structrep.reparameterize(model, it.x.float())
    assert structrep.verify(model, deploy, it.x.float()).ok
    assert {p.dtype for p in deploy.parameters()} == {torch.float32}
    assert all(b.dtype == torch.float32 for b in deploy.buffers() if b.is_floating_point())


@one_of_each
def test_new_layers_are_like_the_old(case):
    for learned in (True, False):
        deploy = structrep.reparameterize(copy.deepcopy(Converted.of(case).model).requires_grad_(learned))
        assert {p.requires_grad for p in deploy.parameters()} == {learned}
        assert {(p.dtype, p.device) for p in deploy.parameters()} == {(torch.float64, torch.device("cpu"))}
        assert not any(m.training for m in deploy.modules())
        assert all(isinstance(p, nn.Parameter) and p.is_leaf and p.is_contiguous() for p in deploy.parameters())


# --- what can be done with the result -------------------------------------------------------------


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def reloaded(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    missing = twin.load_state_dict(model.state_dict(), strict=True)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    return twin


SURGERY = {
    "deepcopy": lambda m, x: copy.deepcopy(m),
    "deepcopy-twice": lambda m, x: copy.deepcopy(copy.deepcopy(m)),
    "pickle": lambda m, x: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m, x: saved(m),
    "state_dict": lambda m, x: reloaded(m),
    "symbolic_trace": lambda m, x: fx.symbolic_trace(m),
    "jit.trace": lambda m, x: torch.jit.trace(m, x, strict=False, check_trace=False),
    "export": lambda m, x: torch.export.export(m, (x,)).module(),
    "compile": lambda m, x: torch.compile(m, backend="eager", dynamic=False),
}


@one_of_each
@pytest.mark.parametrize("way", SURGERY)
def test_result_can_be_copied_saved_and_exported(case, way):
    """Whatever could be done with the training-time model can be done with the result."""
    it = Converted.of(case)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            other = SURGERY[way](it.deploy, it.x)
        except Exception:
            with pytest.raises(Exception):  # noqa: B017, PT011
                SURGERY[way](it.model, it.x)
            pytest.skip("nor could it be with the training-time model")
    assert equal(other, it.deploy, it.x, within=SAME)


@one_of_each
def test_result_is_still_the_users_model(case):
    it = Converted.of(case)
    assert isinstance(it.deploy, type(it.model))
    assert type(it.deploy).__name__ == type(it.model).__name__
    assert type(it.deploy).__module__ == type(it.model).__module__
    assert repr(it.deploy)


def test_methods_and_attributes_stay():
    case = next(c for c in NETWORKS if c.name == "net-stages")
    it = Converted.of(case)
    assert len(it.deploy.forward_features(it.x)) == 3
    assert distance(it.deploy.forward_features(it.x), it.model.forward_features(it.x)) <= EXACT
    assert it.deploy.stem.in_channels == 3
    assert isinstance(it.deploy.stages[0][1].nonlinearity, nn.ReLU)


def test_state_dicts_of_two_conversions_are_interchangeable():
    case = next(c for c in NETWORKS if c.name == "net-all-five")
    one, two = (structrep.reparameterize(randomised(case.make(), seed)) for seed in (0, 1))
    one.load_state_dict(two.state_dict(), strict=True)
    x = noise(1, 3, 9, 8)
    assert equal(one, two, x, within=0.0)


# --- more inputs than one ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "example",
    [
        None,
        (noise(1, 3, 6, 6), noise(1, 2, 8, 8)),
        {"image": noise(1, 3, 6, 6), "guide": noise(1, 2, 8, 8)},
        {"image": noise(1, 3, 6, 6), "guide": noise(1, 2, 8, 8), "mask": None, "scale": 1.0},
    ],
    ids=["none", "tuple", "mapping", "mapping-with-constants"],
)
def test_two_inputs(example):
    model = randomised(TwoInputs())
    deploy = structrep.reparameterize(model, example)
    a, b = noise(2, 3, 5, 9), noise(2, 2, 7, 4)
    assert equal(deploy, model, (a, b), {"image": a, "guide": b}, {"guide": b, "image": a})
    ran = executed(deploy, (a, b))
    assert (ran["conv"], ran["norm"], ran["add"]) == (3, 0, 0)


def test_flags_of_the_root_still_work():
    """No merge lies in the root's own forward, so it must not be rewritten for one value of its flags."""
    model = randomised(TwoInputs())
    deploy = structrep.reparameterize(model, (noise(1, 3, 6, 6), noise(1, 2, 8, 8)))
    a, b = noise(2, 3, 5, 9), noise(2, 2, 7, 4)
    for more in ({"scale": 2.0}, {"return_guide": True}, {"mask": noise(2, 4, 5, 9) > 0}):
        assert equal(deploy, model, {"image": a, "guide": b, **more})


# --- what must not merge ---------------------------------------------------------------------------


def test_padding_on_the_middle_conv_of_a_chain_with_bias_is_refused():
    """The 1x1's bias is not zero, the kxk pads with zero: no one conv is equal."""
    model = randomised(expand_cl(4, 5, where="middle"))
    plan = structrep.plan(model)
    assert any(r.kind == "Inexact" for r in plan.refusals)
    assert all(len(m.before.split(" -> ")) < 3 for m in plan.merges)
    x = noise(2, 4, 5, 6)
    deploy = structrep.reparameterize(model, x)
    assert equal(deploy, model, x, noise(1, 4, 1, 1))
    assert executed(deploy, x)["conv"] >= 2


def test_nonlinear_chain_stays():
    model = randomised(NonLinear(3, 4))
    deploy = structrep.reparameterize(model)
    x = noise(2, 3, 6, 5)
    assert equal(deploy, model, x)
    assert executed(deploy, x)["conv"] == 3
    assert executed(deploy, x)["norm"] == 0


def test_chain_merges_beside_a_nonlinearity():
    model = randomised(HalfLinear(3, 4))
    deploy = structrep.reparameterize(model)
    x = noise(2, 3, 6, 5)
    assert equal(deploy, model, x)
    assert executed(deploy, x)["conv"] == 2


@pytest.mark.parametrize("between", [nn.ReLU(), nn.LayerNorm(20), nn.GELU(), nn.Softmax(-1)])
def test_nonlinear_linears_stay(between):
    model = randomised(nn.Sequential(nn.Linear(6, 24), nn.Linear(24, 20), between, nn.Linear(20, 5)))
    deploy = structrep.reparameterize(model)
    x = noise(3, 6)
    assert equal(deploy, model, x)
    assert executed(deploy, x)["linear"] == 2


def test_bottleneck_is_not_widened():
    """1x1 to fewer channels and back takes less work than the one 1x1 it equals."""
    model = randomised(nn.Sequential(nn.Conv2d(16, 2, 1), nn.Conv2d(2, 16, 1)))
    plan = structrep.plan(model)
    assert not plan.merges
    assert [r.kind for r in plan.refusals] == ["Costlier"]


def test_stacked_branches_stay_equal():
    model = randomised(Stacked(4))
    deploy = structrep.reparameterize(model)
    assert equal(deploy, model, noise(2, 4, 5, 6), noise(1, 4, 1, 1))
    assert executed(deploy, noise(2, 4, 5, 6))["norm"] == 0


def test_a_standardized_kernel_with_a_gain_and_a_bias_is_computed_once():
    """As in NF-ResNets (timm's ScaledStdConv2d): as many numbers afterwards, but none computed on every pass."""
    model = randomised(nn.Sequential(timm.layers.ScaledStdConv2d(4, 4, 3, padding=1, bias=True), nn.ReLU()))
    deploy = structrep.reparameterize(model)
    x = noise(2, 4, 6, 5)
    assert equal(deploy, model, x)
    assert type(deploy[0]) is nn.Conv2d
    assert executed(deploy, x)["norm"] == 0
