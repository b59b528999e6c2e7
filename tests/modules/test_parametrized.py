"""Layers that compute their weights before every call merge as plain ones do, in the model's own precision, and become
plain layers."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

import structrep
from tests.support.truth import check, relative_error

SLACK = 8  # of the model's own rounding


class By(nn.Module):
    """A parametrization that is a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, w):
        return self.function(w)


def by(layer, function, name="weight"):
    parametrize.register_parametrization(layer, name, By(function))
    return layer


def standardised(w):
    dims = tuple(range(1, w.ndim))
    return (w - w.mean(dims, keepdim=True)) / (w.var(dims, keepdim=True, unbiased=False) + 1e-5).sqrt()


def weight_standardisation(w):
    return F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True, eps=1e-6).reshape_as(w)


class Masked(nn.Module):
    """A parametrization with buffers that hold no floats, or such as torch does not calculate with."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tensor([True]))
        self.register_buffer("levels", torch.tensor([3], dtype=torch.uint16))
        self.register_buffer("scale", torch.tensor([0.75]).to(torch.float8_e4m3fn))

    def forward(self, w):
        return w * self.mask * self.levels.to(w) * self.scale.to(torch.float32).to(w)


class Centred(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.7))

    def forward(self, w):
        return (w - w.mean()) * self.gain.exp()


def masked(layer):
    parametrize.register_parametrization(layer, "weight", Masked())
    return layer


def with_own_parameter(layer):
    parametrize.register_parametrization(layer, "weight", Centred())
    return layer


NEW = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm of all": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "tanh": lambda layer: by(layer, torch.tanh),
    "a factor": lambda layer: by(layer, lambda w: w * 0.3),
    "standardised": lambda layer: by(layer, standardised),
    "weight standardisation": lambda layer: by(layer, weight_standardisation),
    "its own parameter": with_own_parameter,
    "buffers that are no floats": masked,
    "rounded": lambda layer: by(layer, lambda w: (w * 8).round() / 8),
    "bias": lambda layer: by(layer, torch.tanh, "bias"),
    "two of one": lambda layer: by(parametrizations.weight_norm(layer), torch.tanh),
    "weight and bias": lambda layer: by(parametrizations.weight_norm(layer), torch.sin, "bias"),
}
OLD = {
    "old weight_norm": old_weight_norm,
    "old spectral_norm": old_spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned twice": lambda layer: prune.l1_unstructured(prune.random_unstructured(layer, "weight", 0.2), "weight", 0.5),
    "pruned in filters": lambda layer: prune.ln_structured(layer, "weight", 0.5, n=2, dim=0),
    "old, pruned bias": lambda layer: prune.l1_unstructured(old_weight_norm(layer), "bias", 0.5),
}
KINDS = NEW | OLD

# made of a kind: a model, the shape of its input, its rules, the types of the layers that are left
MODELS = {
    "norm": (
        lambda k: [k(nn.Conv2d(4, 8, 3)), nn.BatchNorm2d(8)], (2, 4, 7, 6), ["fold_norm"], [nn.Conv2d],
    ),
    "alone": (
        lambda k: [k(nn.Conv2d(4, 8, 3, stride=2, groups=2)), nn.ReLU()],
        (2, 4, 7, 6), ["constant_kernel"], [nn.Conv2d],
    ),
    "alone, reflect": (
        lambda k: [k(nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"))],
        (2, 4, 7, 6), ["constant_kernel"], [nn.Conv2d],
    ),
    "Linears": (
        lambda k: [k(nn.Linear(6, 3)), k(nn.Linear(3, 4))], (5, 6), ["chain"], [nn.Linear],
    ),
    "transposed": (
        lambda k: [k(nn.ConvTranspose2d(4, 8, 3, stride=2)), nn.BatchNorm2d(8)],
        (2, 4, 5, 4), ["fold_norm"], [nn.ConvTranspose2d],
    ),
    "1d": (
        lambda k: [k(nn.Conv1d(4, 8, 3)), nn.BatchNorm1d(8), nn.ReLU(), k(nn.Conv1d(8, 4, 3))],
        (2, 4, 9), ["fold_norm", "constant_kernel"], [nn.Conv1d, nn.Conv1d],
    ),
    "3d": (
        lambda k: [k(nn.Conv3d(2, 4, 3)), nn.BatchNorm3d(4)], (1, 2, 5, 4, 6), ["fold_norm"], [nn.Conv3d],
    ),
}  # fmt: skip


def made(model, kind, dtype):
    """A model in eval mode, the same at every call."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old ones are deprecated
        whole = nn.Sequential(*MODELS[model][0](KINDS[kind]))
    for module in whole:
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
    return whole.to(dtype).eval()


def layers(model):
    idle = (nn.Sequential, nn.Identity, nn.ReLU)
    return [module for module in model.modules() if not isinstance(module, idle)]


def demand_near(deploy, model, truth, x):
    """Nearly as near the truth, a float64 copy, as the model is."""
    with torch.no_grad():
        right = truth(x.double())
        own = relative_error(model(x), right)
        eps = torch.finfo(x.dtype).eps
        assert relative_error(deploy(x), right) <= SLACK * max(own, 2 * eps)


SOME = ("weight_norm", "spectral_norm", "bias", "weight and bias", "old weight_norm", "pruned")
ALL = [
    *((kind, "norm", dtype) for kind in KINDS for dtype in (torch.float32, torch.float64)),
    *((kind, "alone", torch.float32) for kind in KINDS),
    *((kind, model, torch.float64) for model in MODELS.keys() - {"norm"} for kind in SOME),
]


@pytest.mark.parametrize(("kind", "model", "dtype"), sorted(ALL, key=str))
def test_merged_into_plain_layers(kind, model, dtype):
    _, shape, rules, left = MODELS[model]
    x = torch.randn(shape, dtype=dtype)
    before, truth = made(model, kind, dtype), made(model, kind, dtype).double()
    plan = structrep.plan(before)
    planned = [merge.rules[-1] for merge in plan.merges]
    plan.prove()
    assert planned == [merge.rules[-1] for merge in plan.merges] == rules
    assert not plan.refusals
    state = {name: value.clone() for name, value in before.state_dict().items()}
    for deploy in (
        structrep.reparameterize(before),
        structrep.reparameterize(before, x),
        structrep.reparameterize(made(model, kind, dtype), inplace=True),
        structrep.reparameterize(made(model, kind, dtype), x, inplace=True),
    ):
        assert list(map(type, layers(deploy))) == left
        assert {name.rpartition(".")[2] for name in deploy.state_dict()} == {"weight", "bias"}
        assert not any(module._forward_pre_hooks for module in deploy.modules())
        demand_near(deploy, before, truth, x)
        assert not structrep.plan(deploy).merges
    assert all(torch.equal(value, state[name]) for name, value in before.state_dict().items())
    with torch.no_grad():
        found = deploy(x)
        for other in (copy.deepcopy(deploy), pickle.loads(pickle.dumps(deploy)), torch.jit.script(deploy)):
            assert torch.equal(other(x), found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_one_layer(kind):
    for inplace in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = KINDS[kind](nn.Conv2d(4, 8, 3)).eval()
        x = torch.randn(2, 4, 7, 6)
        with torch.no_grad():
            expected = model(x)
            deploy = structrep.reparameterize(model, x, inplace=inplace)
            assert type(deploy) is nn.Conv2d
            assert set(deploy.state_dict()) == {"weight", "bias"}
            assert (deploy is model) == inplace
            assert relative_error(deploy(x), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "tanh", "standardised", "old weight_norm", "pruned"])
def test_in_half_precision(kind, dtype):
    x = torch.randn(2, 4, 7, 6, dtype=dtype)
    model = made("norm", kind, dtype)
    deploy = structrep.reparameterize(model, x)
    assert [type(module) for module in layers(deploy)] == [nn.Conv2d]
    assert deploy[0].weight.dtype == dtype
    demand_near(deploy, model, made("norm", kind, dtype).double(), x)


def test_a_weight_that_is_rounded_on_the_way():
    """Its rounding to float16 is none of the merge's, and is measured with the model's own."""
    model = nn.Sequential(by(nn.Conv2d(4, 4, 3, padding=1), lambda w: w.half().to(w.dtype)), nn.BatchNorm2d(4)).eval()
    x = torch.randn(1, 4, 6, 5)
    deploy = structrep.reparameterize(model, x)
    assert type(deploy[0]) is nn.Conv2d
    assert relative_error(deploy(x), model(x)) < 1e-6
    deploy[0].weight.data *= 1.01
    assert not structrep.verify(model, deploy, x).ok


def test_a_frozen_weight_stays_frozen():
    model = parametrizations.weight_norm(nn.Conv2d(4, 8, 3)).eval().requires_grad_(False)
    assert not structrep.reparameterize(nn.Sequential(model))[0].weight.requires_grad
    assert structrep.reparameterize(nn.Sequential(model.requires_grad_()))[0].weight.requires_grad


# --- norms, and modules with a forward of their own ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean"])
def test_norms_that_compute_their_numbers(name, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), by(nn.BatchNorm2d(8), torch.cos, name)).to(dtype).eval()
    x = torch.randn(2, 4, 7, 6, dtype=dtype)
    deploy = structrep.reparameterize(model, x)
    assert set(deploy.state_dict()) == {"0.weight", "0.bias"}
    demand_near(deploy, model, copy.deepcopy(model).double(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("norm", "layer", "shape"),
    [
        (lambda: nn.LayerNorm(4), lambda: nn.Linear(4, 3), (2, 5, 4)),
        (lambda: nn.GroupNorm(2, 4), lambda: nn.Conv2d(4, 3, 1), (2, 4, 5, 6)),
    ],
)
def test_norms_of_each_value_give_up_what_they_compute(norm, layer, shape, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(by(by(norm(), torch.tanh), lambda b: b + 0.3, "bias"), layer()).to(dtype).eval()
    x = torch.randn(shape, dtype=dtype)
    deploy = structrep.reparameterize(model, x)
    assert set(deploy.state_dict()) == {"1.weight", "1.bias"}
    demand_near(deploy, model, copy.deepcopy(model).double(), x)
    pickle.dumps(deploy)


class Functional(nn.Module):
    """A weight that the module's own forward hands to a function, and a norm."""

    def __init__(self):
        super().__init__()
        self.weight, self.bn = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(F.conv2d(x, self.weight, padding=1))


class Standardising(nn.Conv2d):
    """As in timm and in BiT: a weight that is standardised in the forward."""

    def __init__(self):
        super().__init__(4, 4, 3, padding=1)

    def forward(self, x):
        return F.conv2d(x, standardised(self.weight), self.bias, padding=1)


@pytest.mark.parametrize("own", [Functional, Standardising])
@pytest.mark.parametrize(
    "kind", ["weight_norm", "spectral_norm", "tanh", "old weight_norm", "old spectral_norm", "pruned"]
)
def test_forwards_of_their_own(kind, own):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(KINDS[kind](own()), nn.ReLU()).eval()
    x = torch.randn(2, 4, 7, 6)
    with torch.no_grad():
        expected = model(x)
        deploy = structrep.reparameterize(model, x)
        assert relative_error(deploy(x), expected) < 1e-5
        assert len(deploy.state_dict()) == 2
        assert not deploy[0]._forward_pre_hooks
        for other in (copy.deepcopy(deploy), pickle.loads(pickle.dumps(deploy))):
            assert torch.equal(other(x), deploy(x))


def test_a_weight_that_is_a_property():
    class Property(nn.Conv2d):
        def __init__(self):
            super().__init__(4, 8, 3)
            self.raw = nn.Parameter(self.weight.detach().clone())
            del self.weight

        @property
        def weight(self):
            return torch.tanh(self.raw) * 0.3

    model, x = nn.Sequential(Property(), nn.BatchNorm2d(8)).eval(), torch.randn(2, 4, 7, 6)
    deploy = structrep.reparameterize(model, x)
    assert type(deploy[0]) is nn.Conv2d
    with torch.no_grad():
        assert relative_error(deploy(x), model(x)) < 1e-6


class Gained(nn.Conv2d):
    """A convolution that is read by a function of the user's, which computes with its numbers."""

    def __init__(self):
        super().__init__(4, 8, 3)
        self.gain = nn.Parameter(torch.rand(8, 1, 1, 1) + 0.5)

    def forward(self, x):
        return F.conv2d(x, self.weight * self.gain, self.bias)


@structrep.reader(Gained)
def gained(layer):
    return structrep.ConvMap(layer.weight * layer.gain, layer.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "kind", [lambda layer: layer, parametrizations.weight_norm, lambda layer: by(layer, torch.sin, "gain")]
)
def test_layers_that_the_user_reads(kind, dtype):
    model = nn.Sequential(kind(Gained()), nn.BatchNorm2d(8)).to(dtype).eval()
    x = torch.randn(2, 4, 7, 6, dtype=dtype)
    deploy = structrep.reparameterize(model, x)
    assert set(deploy.state_dict()) == {"0.weight", "0.bias"}
    assert type(deploy[0]) is nn.Conv2d
    demand_near(deploy, model, copy.deepcopy(model).double(), x)


def test_an_embedding_takes_the_linear_behind_it_and_what_nothing_reads_stays():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = parametrizations.weight_norm(nn.Embedding(10, 4))
            self.linear = parametrizations.weight_norm(nn.Linear(4, 4))
            self.rnn = parametrizations.weight_norm(nn.LSTM(4, 4), "weight_hh_l0")

        def forward(self, tokens):
            return self.rnn(self.linear(self.embed(tokens)))[0]

    model, tokens = Tokens().eval(), torch.randint(10, (3, 5))
    plan = structrep.plan(model, tokens)
    assert ([merge.where for merge in plan.merges], plan.refusals) == (["embed"], ())
    with torch.no_grad():
        assert relative_error(structrep.reparameterize(model, tokens)(tokens), model(tokens)) < 1e-6


# --- where the model is not followed, or a layer is used more than once ----------------------------------------------


class Unfollowed(nn.Module):
    """A condition on the numbers of a value, convolutions that a method hands to a function."""

    def __init__(self, kind):
        super().__init__()
        self.pre, self.blocks = kind(nn.Conv1d(4, 8, 3)), nn.ModuleList([kind(nn.Conv1d(8, 8, 3)) for _ in range(2)])

    def remove_weight_norm(self):
        torch.nn.utils.remove_weight_norm(self.pre)

    def forward(self, x):
        y = self.pre(x)
        for block in self.blocks:
            y = y + F.pad(block(y), (1, 1)) if str(y) != "never" else y
        return y


@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm"])
def test_below_what_is_not_followed(kind):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Unfollowed(KINDS[kind]).eval()
    x = torch.randn(2, 4, 9)
    with torch.no_grad():
        expected = model(x)
    plan = structrep.plan(model, x)
    assert [merge.where for merge in plan.merges] == ["pre", "blocks.0", "blocks.1"]
    assert [refusal.kind for refusal in plan.refusals] == ["Untraceable"]
    deploy = structrep.reparameterize(model, x)
    assert set(deploy.state_dict()) == {f"{p}.{n}" for p in ("pre", "blocks.0", "blocks.1") for n in ("weight", "bias")}
    with torch.no_grad():
        assert relative_error(deploy(x), expected) < 1e-6


class Twice(nn.Module):
    def __init__(self, kind, cached=False):
        super().__init__()
        self.conv, self.norm, self.cached = kind(nn.Conv2d(4, 4, 3, padding=1)), nn.BatchNorm2d(4), cached

    def forward(self, x):
        if not self.cached:
            return self.norm(self.conv(self.conv(x).relu()))
        with parametrize.cached():
            return self.norm(self.conv(self.conv(x).relu()))


@pytest.mark.parametrize("cached", [False, True])
def test_a_layer_that_is_called_twice_keeps_a_constant_weight(cached):
    model, x = Twice(parametrizations.weight_norm, cached).eval(), torch.randn(2, 4, 7, 6)
    plan = structrep.plan(model, x)
    assert [(merge.where, merge.rules) for merge in plan.merges] == [("conv", ("constant_kernel",))]
    assert [(refusal.where, refusal.kind) for refusal in plan.refusals] == [("norm", "Shared")]
    deploy = structrep.reparameterize(model, x)
    assert type(deploy.conv) is nn.Conv2d
    with torch.no_grad():
        assert relative_error(deploy(x), model(x)) < 1e-6


def test_what_a_cache_holds_is_not_looked_at():
    model, x = made("norm", "weight_norm", torch.float32), torch.randn(2, 4, 7, 6)
    with torch.no_grad(), parametrize.cached():
        expected = model(x)
        for given in ([], [x]):
            deploy = structrep.reparameterize(model, *given)
            assert [type(module) for module in layers(deploy)] == [nn.Conv2d]
            assert relative_error(deploy(x), expected) < 1e-6
            assert type(model(x)) is torch.Tensor
            assert torch.equal(model(x), expected)


class Tied(nn.Module):
    """A weight that is used elsewhere too."""

    def __init__(self, kind):
        super().__init__()
        self.encode, self.hidden = kind(nn.Linear(4, 6)), nn.Linear(6, 6)

    def forward(self, x):
        return F.linear(self.hidden(self.encode(x)).relu(), self.encode.weight.t())


@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm"])
def test_a_weight_that_is_used_elsewhere_stays(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Tied(KINDS[kind]).eval()
    x = torch.randn(3, 4)
    plan = structrep.plan(model)
    assert [merge.where for merge in plan.merges] == ["reparam_linear"]
    assert {refusal.kind for refusal in plan.refusals} == {"Shared"}
    with torch.no_grad():
        expected = model(x)
        assert relative_error(structrep.reparameterize(model)(x), expected) < 1e-6


# --- what is no constant ---------------------------------------------------------------------------------------------


class Counting(nn.Module):
    calls = 0

    def forward(self, w):
        self.calls += 1
        return w * self.calls


@pytest.mark.parametrize(
    ("parametrization", "reason"),
    [
        (lambda: By(lambda w: w + torch.randn_like(w)), "torch.randn_like draws new numbers at every call"),
        (lambda: By(lambda w: F.dropout(w, 0.5, training=True)), "torch.dropout draws new numbers at every call"),
        (Counting, "to compute it changes the layer"),
    ],
)
def test_weights_that_are_new_at_every_call_stay(parametrization, reason):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).eval()
    parametrize.register_parametrization(model[0], "weight", parametrization())
    plan = structrep.plan(model)
    assert not plan.merges
    assert [(refusal.where, refusal.kind) for refusal in plan.refusals] == [("0", "Unreadable"), ("1", "Isolated")]
    assert reason in plan.refusals[0].reason
    assert "parametrize.remove_parametrizations(model.get_submodule('0'), 'weight')" in plan.refusals[0].reason
    assert plan.refusals[1].reason.endswith("0, before it, computes its weights, and they are no constants")


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("spectral_norm", "torch.nn.utils.parametrize.remove_parametrizations(model.get_submodule('0'), 'weight')"),
        ("old spectral_norm", "torch.nn.utils.remove_spectral_norm(model.get_submodule('0'), 'weight')"),
    ],
)
def test_a_spectral_norm_in_training_mode_stays(kind, remedy):
    model = made("norm", kind, torch.float32)
    model[0].train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plan = structrep.plan(model)
    assert not plan.merges
    assert "in training mode: call model.eval() first; or " + remedy in plan.refusals[0].reason
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_weight_norm_in_training_mode_is_a_constant():
    model = made("norm", "weight_norm", torch.float32)
    model[0].train()
    assert [merge.rules for merge in structrep.plan(model).merges] == [("fold_norm",)]


def test_a_kernel_that_is_only_repeated_stays():
    """It is stored in less, and what is done at every call is no work."""

    class Repeated(nn.Module):
        def forward(self, w):
            return w.repeat(16, 1)

        def right_inverse(self, w):
            return w[:2]

    linear = nn.Linear(32, 32)
    parametrize.register_parametrization(linear, "weight", Repeated())
    plan = structrep.plan(nn.Sequential(linear).eval())
    assert not plan.merges
    assert {(refusal.where, refusal.kind) for refusal in plan.refusals} == {("0", "Costlier")}


def test_a_kernel_that_is_multiplied_out_at_every_call_is_a_constant():
    """That is stored in less, but made anew, and then held as well."""

    class LowRank(nn.Module):
        def forward(self, down, up):
            return up @ down

        def right_inverse(self, w):
            u, s, v = torch.linalg.svd(w, full_matrices=False)
            return v[:2], u[:, :2] * s[:2]

    linear = nn.Linear(32, 32)
    parametrize.register_parametrization(linear, "weight", LowRank())
    deploy = check(nn.Sequential(linear), torch.randn(3, 32, dtype=torch.float64), merges=1, linear=1)
    assert type(deploy[0]) is nn.Linear
    assert deploy[0].weight.shape == (32, 32)


class Numbering(nn.Module):
    """A module without inputs that gives another kernel at every call."""

    def __init__(self):
        super().__init__()
        self.w, self.calls = nn.Parameter(torch.randn(8, 4, 1, 1)), 0

    def forward(self):
        self.calls += 1
        return self.w * self.calls


def test_kernels_of_modules_that_count_stay():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.norm = Numbering(), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(F.conv2d(x, self.kernel()))

    model, x = Model().eval(), torch.randn(2, 4, 5, 5)
    deploy = structrep.reparameterize(model)
    with torch.no_grad():
        for _ in range(3):
            assert relative_error(deploy(x), model(x)) < 1e-6


# --- hooks ------------------------------------------------------------------------------------------------------------


def freshens(module, args):
    module.scale = 2.0


def test_hooks_are_told_by_name():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
    ).eval()
    model[0].register_forward_pre_hook(freshens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old_weight_norm(model[3]).register_forward_hook(lambda *_: None)
    reasons = {refusal.where: (refusal.kind, refusal.reason) for refusal in structrep.plan(model).refusals}
    assert reasons["0"] == (
        "Hooked",
        f"Conv2d has a forward pre-hook, freshens from {__name__}, which may change what it is given or its weights: "
        f"remove it before converting if it is only for training",
    )
    assert reasons["1"] == ("Isolated", "it scales what 0 gives for 2: 0, before it, has a hook")
    assert reasons["3"][0] == "Hooked"
    assert "forward hook, test_hooks_are_told_by_name.<locals>.<lambda> from" in reasons["3"][1]
    assert "must go on seeing its own values" in reasons["3"][1]


@pytest.mark.parametrize("writes", [
    lambda module, args: setattr(module, "w", args[0].mean() * torch.ones(8, 4, 1, 1)),
    lambda module, args: module.w.copy_(args[0].mean() * torch.ones(8, 4, 1, 1)),
])  # fmt: skip
def test_what_a_hook_may_set_is_no_constant(writes):
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.w = nn.BatchNorm2d(8), torch.randn(8, 4, 1, 1)

        def forward(self, x):
            return self.norm(F.conv2d(x, self.w))

    model, x = nn.Sequential(Dynamic()).eval(), torch.randn(2, 4, 5, 5)
    model[0].register_forward_pre_hook(writes)
    with torch.no_grad():
        deploy = structrep.reparameterize(model)
        assert relative_error(deploy(x), model(x)) < 1e-6
        assert relative_error(deploy(x + 1), model(x + 1)) < 1e-6


def test_expand_leaves_layers_that_compute_their_weights():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Conv2d(3, 4, 3), old_weight_norm(nn.Conv2d(4, 4, 3)))
    with pytest.raises(structrep.StructrepError, match="its weight is computed before every call"):
        structrep.expand(model, "repvgg", where="1")


class Trimmed(nn.Module):
    """As in EnCodec: a forward that asks its convolution for settings."""

    def __init__(self, stride):
        super().__init__()
        self.conv = parametrizations.weight_norm(nn.ConvTranspose1d(4, 4, 4, stride=stride))

    def forward(self, x):
        y = self.conv(x)
        return y[..., : y.shape[-1] - self.conv.kernel_size[0] + self.conv.stride[0]]


class Described(Trimmed):
    def forward(self, x):
        y = self.conv(x)
        return y * 2 if type(self.conv) is nn.ConvTranspose1d else y


@pytest.mark.parametrize(
    ("model", "kind"), [(Trimmed(2), nn.ConvTranspose1d), (Trimmed(1), None), (Described(2), None)]
)
def test_settings_that_a_forward_asks_for_stay(model, kind):
    model, x = model.eval(), torch.randn(1, 4, 7)
    deploy = structrep.reparameterize(model)
    assert type(deploy.conv) is (kind or type(model.conv))
    with torch.no_grad():
        assert relative_error(deploy(x), model(x)) < 1e-6
