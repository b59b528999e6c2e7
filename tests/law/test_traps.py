"""Every way known to get a merge silently wrong: the result equals the original in float64, or the call says why."""

import contextlib
import copy
import functools
import operator
import signal
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import structrep
from structrep import errors
from tests.foreign import repvgg
from tests.support import traps
from tests.support.models import noise, randomised
from tests.support.traps import Written, bn, conv
from tests.support.truth import EXACT, call, distance, equal, executed, fingerprint, flat

X = noise(2, 4, 5, 6)
TINY = noise(1, 4, 1, 1)


@pytest.fixture(autouse=True)
def _ends():
    """A conversion that would go on for ever fails instead."""

    def stop(*_):
        raise TimeoutError("no end after 20 seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def check(model, *inputs, example=False, **after):
    """Convert a randomised model in float64; the result is equal, the model untouched, the counts as given."""
    model = randomised(model)
    inputs = inputs or (X, TINY)
    truth = [call(copy.deepcopy(model), x) for x in inputs]
    before = fingerprint(model)
    deploy = structrep.reparameterize(model, inputs[0] if example else None)
    assert fingerprint(model) == before
    for x, y in zip(inputs, truth, strict=True):
        assert distance(call(deploy, x), y) <= EXACT
    ran = executed(deploy, inputs[0])
    assert {kind: ran[kind] for kind in after} == after
    assert not structrep.plan(deploy).merges
    return deploy


def kinds(model, *inputs):
    return {r.kind for r in structrep.plan(model, *inputs).refusals}


# --- one value or layer used twice -----------------------------------------------------------------------

SHARED = {
    "conv called twice, once with a norm, once without": (
        lambda: Written(lambda m, x: m.n(m.c(x)) + F.relu(m.c(x)), c=conv(), n=bn(4)), {"conv": 2, "norm": 1}),
    "conv called twice, each with its own norm": (
        lambda: Written(lambda m, x: F.relu(m.n(m.c(x))) + F.relu(m.p(m.c(x))), c=conv(), n=bn(4), p=bn(4)),
        {"conv": 2, "norm": 2}),
    "conv and norm called twice together": (
        lambda: Written(lambda m, x: m.n(m.c(F.relu(m.n(m.c(x))))), c=conv(), n=bn(4)), {"conv": 2}),
    "one conv feeding two norms": (
        lambda: Written(lambda m, x: F.relu(m.n(y := m.c(x))) * torch.tanh(m.p(y)), c=conv(), n=bn(4), p=bn(4)),
        {"norm": 2}),
    "one norm fed by two convs": (
        lambda: Written(lambda m, x: F.relu(m.n(m.c(x))) * torch.tanh(m.n(m.d(x))), c=conv(), d=conv(), n=bn(4)),
        {"conv": 2, "norm": 2}),
    "conv output used elsewhere too": (
        lambda: Written(lambda m, x: F.relu(m.n(y := m.c(x))) + y.abs(), c=conv(), n=bn(4)), {"conv": 1, "norm": 1}),
    "norm output used elsewhere too": (
        lambda: Written(lambda m, x: m.n(m.p(y := m.n(m.c(x)))) + y.abs(), c=conv(), n=bn(4), p=bn(4)), {}),
    "branch of a sum used elsewhere too": (
        lambda: Written(lambda m, x: F.relu((y := m.c(x)) + m.d(x)) + y.abs(), c=conv(), d=conv(k=1)), {"conv": 2}),
    "one dropout between many layers": (
        lambda: Written(lambda m, x: m.o(m.n(m.o(m.c(x)))), c=conv(), n=bn(4), o=nn.Dropout(0.3)),
        {"conv": 1, "norm": 0}),
    "one activation between many layers": (
        lambda: Written(lambda m, x: m.o(m.n(m.c(m.o(m.p(m.d(x)))))), c=conv(), d=conv(), n=bn(4), p=bn(4),
                        o=nn.ReLU(inplace=True)), {"conv": 2, "norm": 0}),
    "one branch twice in a sum": (
        lambda: Written(lambda m, x: m.c(x) + m.c(x) + m.d(x), c=conv(), d=conv(k=1)), {}),
    "a value added to itself": (lambda: Written(lambda m, x: m.n((y := m.c(x)) + y), c=conv(), n=bn(4)), {}),
    "tied weights": (traps.tied_weights, {"norm": 0}),
    "tied bias": (traps.tied_bias, {"norm": 0}),
    "tied norms": (traps.tied_norms, {"norm": 0}),
    "a weight read elsewhere": (traps.weight_read_elsewhere, {}),
    "a weight that scales the output": (traps.weight_scales_elsewhere, {}),
    "registered under two names": (traps.two_names, {"conv": 1, "norm": 0}),
    "registered and called under two names": (traps.two_names_both_called, {"conv": 2}),
    "a block called three times": (traps.Recurrent, {"conv": 3, "norm": 0, "add": 0}),
    "a linear block called three times in a row": (traps.RecurrentLinear, {"norm": 0}),
    "a block in two containers, each called twice": (traps.NestedShare, {"norm": 0}),
    "a child used by the parent too": (traps.ReachesIn, {}),
    "a child asked for its shape by the parent": (traps.ReadsShapes, {}),
}  # fmt: skip


@pytest.mark.parametrize("example", [False, True], ids=["bare", "with-example"])
@pytest.mark.parametrize("name", SHARED)
def test_shared(name, example):
    make, after = SHARED[name]
    check(make(), example=example, **after)


@pytest.mark.parametrize(("make", "norms"), [(traps.Siamese, 0), (traps.SiameseHalf, 1)])
def test_siamese(make, norms):
    a, b = noise(2, 3, 6, 5), noise(2, 3, 4, 7)
    check(make(), (a, b), norm=norms)


def test_tied_parameters_of_untouched_layers_stay_tied():
    model = randomised(
        Written(lambda m, x: m.b(F.relu(m.a(F.relu(m.n(m.c(x)))))), a=conv(), b=conv(), c=conv(), n=bn(4))
    )
    model.b.weight = model.a.weight
    deploy = structrep.reparameterize(model)
    assert deploy.b.weight is deploy.a.weight
    assert equal(deploy, model, X)


# --- norms --------------------------------------------------------------------------------------------------


def linear_norm(width, then=None):
    return Written(
        lambda m, x: m.n(m.l(x) if then is None else then(m.l(x))), l=nn.Linear(6, width), n=nn.BatchNorm1d(5)
    )


@pytest.mark.parametrize("example", [False, True])
def test_norm_after_a_linear_on_2d(example):
    x = noise(3, 6)
    deploy = check(linear_norm(5), x, example=example)
    assert executed(deploy, x)["norm"] == (0 if example else 1)


@pytest.mark.parametrize("example", [False, True])
def test_norm_after_a_linear_on_3d_acts_on_another_dim(example):
    """(N, L, C) with L == C: the shapes allow it, the norm is over L."""
    x = noise(3, 5, 6)
    check(linear_norm(5), x, example=example, norm=1)


def test_norm_after_a_linear_planned_on_2d_and_run_on_3d():
    """What example inputs say of the rank holds for the merge: another rank must not be silently wrong."""
    model = randomised(linear_norm(5))
    deploy = structrep.reparameterize(model, noise(3, 6))
    x = noise(3, 5, 6)
    try:
        ours = call(deploy, x)
    except Exception:
        return
    assert distance(ours, call(model, x)) <= EXACT


def test_norm_after_flatten_and_linear_needs_no_example():
    model = Written(lambda m, x: m.n(m.l(torch.flatten(x, 1))), l=nn.Linear(24, 5), n=nn.BatchNorm1d(5))
    check(model, noise(2, 4, 2, 3), norm=0, linear=1)


def test_norm_after_a_transposed_linear():
    """Linear on the last dim, then BatchNorm1d on dim 1 of the transpose: the channels are the Linear's again."""
    model = Written(lambda m, x: m.n(m.l(x).transpose(1, 2)), l=nn.Linear(6, 5), n=nn.BatchNorm1d(5))
    check(model, noise(3, 5, 6), noise(3, 7, 6))


def test_concat_of_linears_on_the_wrong_dim():
    model = Written(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=nn.Linear(6, 5), b=nn.Linear(6, 5))
    check(model, noise(3, 6), example=True)
    check(model, noise(3, 2, 6), example=True, linear=2)
    check(model, noise(3, 6))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.BatchNorm2d(4, eps=0.1, affine=False),
                                  nn.BatchNorm2d(4, momentum=None), repvgg.MyBN(4), repvgg.FrozenNorm(4)])  # fmt: skip
def test_norms_that_fold(norm):
    check(nn.Sequential(conv(), norm), conv=1, norm=0, add=0)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4, track_running_stats=False), nn.GroupNorm(2, 4),
                                  nn.InstanceNorm2d(4), nn.LocalResponseNorm(2), nn.GroupNorm(4, 4),
                                  nn.InstanceNorm2d(4, affine=True, track_running_stats=False)])  # fmt: skip
def test_norms_that_do_not_fold(norm):
    check(nn.Sequential(conv(), norm), X)


def test_instance_norm_with_running_stats_is_affine_in_eval():
    """May merge or stay; must be equal."""
    check(nn.Sequential(conv(), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), X)


def test_norm_without_running_stats_is_refused_with_the_reason():
    model = randomised(nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)))
    refusal = next(r for r in structrep.plan(model).refusals if r.kind == "Unreadable")
    assert "track_running_stats" in refusal.reason


@pytest.mark.parametrize("what", ["whole", "one norm", "sync", "no conv before it"])
def test_training_mode_is_an_error_that_names_the_norm(what):
    model = randomised(
        nn.Sequential(conv(), nn.Sequential(nn.ReLU(), nn.SyncBatchNorm(4) if what == "sync" else bn(4)))
    )
    if what == "whole":
        model.train()
    else:
        model[1][1].train()
    before = fingerprint(model)
    for convert in (
        structrep.plan,
        structrep.reparameterize,
        functools.partial(structrep.reparameterize, inplace=True),
    ):
        with pytest.raises(errors.TrainingMode, match=r"1\.1 .*BatchNorm.*model\.eval\(\)"):
            convert(model)
    assert fingerprint(model) == before


def test_functional_batch_norm_in_training_mode_stays():
    """F.batch_norm(training=True) takes the batch's statistics; evaluated for real, it would also write buffers."""
    model = Written(
        lambda m, x: F.batch_norm(m.c(x), m.mean, m.var, training=True), c=conv(), mean=None, var=None
    )  # fmt: skip
    del model.mean, model.var
    model.register_buffer("mean", torch.zeros(4))
    model.register_buffer("var", torch.ones(4))
    check(model, X)


def test_dropout_left_in_training_mode_stays():
    model = randomised(Written(lambda m, x: m.d(m.o(m.c(x))), c=conv(k=1), o=nn.Dropout(0.5), d=conv(k=1)))
    model.o.train()
    deploy = structrep.reparameterize(model)
    assert executed(deploy, X)["conv"] == 2
    assert deploy.o.training


def test_norm_and_activation_in_one_module():
    timm = pytest.importorskip("timm")
    norm = timm.layers.BatchNormAct2d
    check(nn.Sequential(conv(), norm(4)), X, conv=1)
    check(
        Written(lambda m, x: m.n(m.c(x)) + m.p(m.d(x)), c=conv(), d=conv(k=1), n=norm(4), p=norm(4, apply_act=False)), X
    )
    frozen = nn.Sequential(conv(), timm.layers.FrozenBatchNormAct2d(4))
    check(frozen, X)


def test_torchvision_frozen_norm():
    ops = pytest.importorskip("torchvision.ops")
    check(nn.Sequential(conv(), ops.FrozenBatchNorm2d(4)), norm=0, conv=1, add=0)


def test_norm_with_zero_variance_and_zero_scale():
    model = randomised(nn.Sequential(conv(), bn(4)))
    model[1].running_var.zero_()
    model[1].weight.data[:2] = 0
    deploy = structrep.reparameterize(model)
    assert equal(deploy, model, X)


# --- hooks and parametrizations -----------------------------------------------------------------------------


def block():
    return nn.Sequential(nn.Sequential(conv(), bn(4)), nn.ReLU(), nn.Sequential(conv(), bn(4)))


PLACES = {"conv": "0.0", "norm": "0.1", "container": "0", "relu": "1", "root": ""}


@pytest.mark.parametrize("written_out", [False, True], ids=["chain", "sum"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["forward", "pre", "changes output", "changes input", "with kwargs", "always"])
@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_see_and_do_what_they_did(place, kind, inplace, written_out):
    model = randomised(block() if not written_out else nn.Sequential(repvgg.Summed(4), nn.ReLU(), repvgg.Summed(4)))
    path = PLACES[place] if not written_out else {"conv": "0.paths.0.0", "norm": "0.paths.2", "container": "0.paths.0",
                                                  "relu": "1", "root": ""}[place]  # fmt: skip
    seen = []
    target = model.get_submodule(path)
    if kind == "forward":
        target.register_forward_hook(lambda m, i, o: seen.append(("out", i[0].clone(), o.clone())))
    elif kind == "pre":
        target.register_forward_pre_hook(lambda m, i: seen.append(("in", i[0].clone())))
    elif kind == "changes output":
        target.register_forward_hook(lambda m, i, o: torch.tanh(o))
    elif kind == "changes input":
        target.register_forward_pre_hook(lambda m, i: (torch.sigmoid(i[0]),))
    elif kind == "with kwargs":
        target.register_forward_hook(lambda m, i, k, o: o * 2.5, with_kwargs=True)
    else:
        target.register_forward_hook(lambda m, i, o: seen.append(("out", o.clone())), always_call=True)
    truth = call(model, X)
    was = list(seen)
    seen.clear()
    deploy = structrep.reparameterize(model, inplace=inplace)
    assert not seen, "planning must not fire hooks with anything but nothing"
    assert distance(call(deploy, X), truth) <= EXACT
    assert [w[0] for w in was] == [s[0] for s in seen]
    assert all(distance(list(a[1:]), list(b[1:])) <= EXACT for a, b in zip(seen, was, strict=True))


def test_hook_inside_a_merge_is_a_refusal():
    model = randomised(block())
    model[0][0].register_forward_hook(lambda *_: None)
    assert "Hooked" in kinds(model)
    deploy = structrep.reparameterize(model)
    assert executed(deploy, X)["norm"] == 1


def test_backward_hooks_go_on():
    model = randomised(block())
    seen = []
    model[0].register_full_backward_hook(lambda m, i, o: seen.append(1))
    deploy = structrep.reparameterize(model)
    deploy(X.clone().requires_grad_()).sum().backward()
    assert seen
    assert equal(deploy, model, X)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hook_inside_a_merge_is_a_refusal(register):
    model = randomised(block())
    getattr(model[0][0], register)(lambda *_: None)
    assert "Hooked" in kinds(model)
    assert executed(structrep.reparameterize(model), X)["norm"] == 1


def test_state_dict_hooks_go_on():
    model = randomised(block())
    model.register_state_dict_post_hook(lambda m, state, prefix, _: state.update(mark=torch.ones(1)))
    deploy = structrep.reparameterize(model)
    assert "mark" in deploy.state_dict()


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


WEIGHTS = {
    "parametrize": lambda c: parametrize.register_parametrization(c, "weight", Doubled().eval()) and c,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda c: torch.nn.utils.prune.l1_unstructured(c, "weight", 0.5),
}


def ready(layer):
    """Randomised first, then dressed: what the dress computes is a function of the weights as they are."""
    return randomised(layer).eval()


@pytest.mark.parametrize("way", WEIGHTS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "ran-once"])
def test_computed_weights(way, inplace, fresh):
    import torch.nn.utils.prune

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(WEIGHTS[way](ready(conv())), ready(bn(4)), nn.ReLU(), ready(conv())).eval()
    if not fresh:
        call(model, X)
    keep = {k: v.clone() for k, v in model.state_dict().items()}
    deploy = structrep.reparameterize(model, inplace=inplace)
    if not inplace:
        assert all(torch.equal(v, keep[k]) for k, v in model.state_dict().items())
        assert distance(call(deploy, X), call(model, X)) <= EXACT
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = nn.Sequential(WEIGHTS[way](ready(conv())), ready(bn(4)), nn.ReLU(), ready(conv())).eval()
            model.load_state_dict(keep)
        assert distance(call(deploy, X), call(model, X)) <= EXACT


def test_computed_weight_in_a_sum():
    model = randomised(Written(lambda m, x: m.c(x) + m.d(x) + x, c=parametrizations.weight_norm(conv()), d=conv(k=1)))
    deploy = structrep.reparameterize(model)
    assert equal(deploy, model, X, TINY)
    assert executed(deploy, X)["conv"] == 1


def test_weight_that_is_a_property():
    class Standardised(nn.Conv2d):
        """Its parameter is called raw; weight is computed."""

        def __init__(self):
            super().__init__(4, 4, 3, padding=1)
            self.raw = nn.Parameter(self.weight.detach().clone())
            del self.weight

        @property
        def weight(self):
            return (self.raw - self.raw.mean()) * 3

        @weight.setter
        def weight(self, value):
            pass

    check(nn.Sequential(Standardised(), bn(4)))


# --- subclasses with a forward of their own -----------------------------------------------------------


class ScaledConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2.0


class StandardisedConv(nn.Conv2d):
    """timm's ScaledStdConv and others: another weight, in forward."""

    def forward(self, x):
        w = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / (
            self.weight.std((1, 2, 3), keepdim=True) + 1e-5
        )
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class InnerConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 3, bias)


class CalledConv(nn.Conv2d):
    def __call__(self, x):
        return super().__call__(x) + 1


class SamePad(nn.Conv2d):
    """TensorFlow's "same": the pad depends on the input's size."""

    def forward(self, x):
        h, w = x.shape[-2:]
        ph, pw = [
            max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip((h, w), self.stride, self.kernel_size, strict=True)
        ]
        x = F.pad(x, (pw // 2, pw - pw // 2, ph // 2, ph - ph // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride)


class ClampedNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


class CheckedNorm(nn.BatchNorm2d):
    """Overrides a method that the parent's forward calls."""

    def _check_input_dim(self, x):
        if x.dim() != 4:
            raise ValueError("4 dims, please")


class AffineLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.abs(), self.bias)


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("make", [
    lambda: nn.Sequential(ScaledConv(4, 4, 3, padding=1), bn(4)),
    lambda: nn.Sequential(StandardisedConv(4, 4, 3, padding=1), bn(4)),
    lambda: nn.Sequential(InnerConvForward(4, 4, 3, padding=1), bn(4)),
    lambda: nn.Sequential(CalledConv(4, 4, 3, padding=1), bn(4)),
    lambda: nn.Sequential(SamePad(4, 4, 3, stride=2), bn(4)),
    lambda: nn.Sequential(conv(), ClampedNorm(4)),
    lambda: nn.Sequential(conv(), CheckedNorm(4)),
    lambda: Written(lambda m, x: m.a(x) + m.b(x), a=ScaledConv(4, 4, 3, padding=1), b=SamePad(4, 4, 1)),
    lambda: Written(lambda m, x: m.a(x.mean((2, 3))) + m.b(x.mean((2, 3))), a=AffineLinear(4, 4), b=nn.Linear(4, 4)),
])  # fmt: skip
def test_subclasses_with_their_own_forward(make, example):
    check(make(), example=example)


@pytest.mark.parametrize("where", ["conv", "norm", "container", "root"])
@pytest.mark.parametrize("inplace", [False, True])
def test_instance_whose_forward_was_replaced(where, inplace):
    model = randomised(nn.Sequential(nn.Sequential(conv(), bn(4)), nn.ReLU(), nn.Sequential(conv(), bn(4))))
    target = {"conv": model[0][0], "norm": model[0][1], "container": model[0], "root": model}[where]
    inner = type(target).forward
    target.forward = lambda x: inner(target, x) * 2 + 1
    truth = call(model, X)
    deploy = structrep.reparameterize(model, inplace=inplace)
    assert distance(call(deploy, X), truth) <= EXACT


def test_method_bound_to_the_model_stays_with_its_own_model():
    """`model.forward = model.forward_fuse`, as detection code does: the copy must not run the original's layers."""

    class Fused(repvgg.Official):
        def forward_fuse(self, x):
            return self.rbr_dense(x) + self.rbr_1x1(x)

    model = randomised(Fused(4, 4))
    model.forward = model.forward_fuse
    truth = call(model, X)
    deploy = structrep.reparameterize(model)
    assert distance(call(deploy, X), truth) <= EXACT
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert distance(call(deploy, X), truth) <= EXACT


# --- arguments and outputs -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [traps.NamedTupleOut, traps.DataclassOut, traps.DictOut, traps.InputOut, traps.MidOut])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("example", [False, True])
def test_structured_outputs(make, nested, example):
    model = randomised(nn.Sequential(conv(), nn.ReLU(), make()) if nested else make())
    deploy = structrep.reparameterize(model, X if example else None)
    assert equal(deploy, model, X, TINY)
    ours, theirs = call(deploy, X), call(model, X)
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        assert ours["name"] == "y"
    assert executed(deploy, X)["conv"] == nested + (2 if make is traps.MidOut else 1)


@pytest.mark.parametrize("example", [False, True])
def test_structured_outputs_used_by_the_parent(example):
    def run(m, x):
        pair, out, rest = m.a(x), m.b(x), m.c(x)
        first, _ = pair
        return first * pair.second + out.logits.relu() + rest["y"].abs() + out.extra["list"][1][0]

    check(Written(run, a=traps.NamedTupleOut(), b=traps.DataclassOut(), c=traps.DictOut()), example=example, conv=3)


def equal_or_says_so(deploy, model, given):
    """A forward that was rewritten for one value of an argument gives an error for another, never wrong numbers."""
    try:
        ours = call(deploy, given)
    except ValueError as error:
        assert "reparameterized for" in str(error)  # noqa: PT017
    else:
        assert distance(ours, call(model, given)) <= EXACT


@pytest.mark.parametrize("example", [False, True])
def test_optional_arguments_stay_optional(example):
    model = randomised(traps.Optional())
    deploy = structrep.reparameterize(model, X if example else None)
    assert equal(deploy, model, X)
    for more in ({"mask": X.sigmoid()}, {"flip": True}):
        equal_or_says_so(deploy, model, {"x": X, **more})


@pytest.mark.parametrize("example", [False, True])
def test_optional_arguments_given_inside(example):
    check(traps.CallsOptional(), example=example)


@pytest.mark.parametrize("make", [traps.ListArgument, traps.Closures, traps.DeviceOfInput])
@pytest.mark.parametrize("example", [False, True])
def test_written_oddly(make, example):
    check(make(), example=example, conv=1)


def test_star_arguments():
    inputs = noise(2, 4, 5, 6), noise(2, 4, 5, 6, seed=2), noise(2, 4, 5, 6, seed=3)

    class Outer(traps.StarArguments):
        def forward(self, a, b, c):
            return super().forward(a, b, z=c)

    check(Outer(), inputs, example=True, conv=1)
    check(Outer(), inputs, conv=1)
    model = randomised(traps.InnerStar())
    for example in (None, X, {"x": X}, {"x": X, "mask": X.sigmoid()}):
        deploy = structrep.reparameterize(model, example)
        assert equal(deploy, model, X if example is None else example)
        for given in (X, {"x": X}, {"x": X, "mask": X.sigmoid()}, {"x": X, "flip": True}):
            equal_or_says_so(deploy, model, given)
    alone = randomised(traps.StarArguments())
    deploy = structrep.reparameterize(alone)
    for args in (inputs[:2],):
        y = [m(*args, z=inputs[2]) for m in (deploy, alone)]
        assert distance(*y) <= EXACT


def test_keyword_only_arguments():
    model = randomised(traps.KeywordOnly())
    for example in (None, {"image": X}):
        deploy = structrep.reparameterize(model, example)
        assert equal(deploy, model, {"image": X}, {"image": TINY}, {"image": X, "scale": 1.0})
        assert executed(deploy, {"image": X})["conv"] == 1


# --- in place ----------------------------------------------------------------------------------------------


def plus(a, b):
    a += b
    return a


def augmented(m, x):
    """y += b in a forward that is rewritten for another merge beside it."""
    y = torch.tanh(m.c(x))
    z = y
    y += torch.sigmoid(x)
    return z * (m.d(x) + m.e(x))


def augmented_product(m, x):
    y = torch.tanh(m.c(x))
    z = y
    y *= torch.sigmoid(x)
    return z + torch.relu(m.d(x) + m.e(x))


def augmented_input(m, x):
    """The caller's tensor changes too."""
    x += 1
    return m.d(x) + m.e(x)


def augmented_slice(m, x):
    y = torch.tanh(m.c(x))
    y[:, 1:] += torch.sigmoid(x[:, 1:])
    y[:, :1] *= 2
    return y * (m.d(x) + m.e(x))


IN_PLACE = {
    "+= beside a merge": lambda: Written(augmented, c=conv(), d=conv(), e=conv(k=1)),
    "*= beside a merge": lambda: Written(augmented_product, c=conv(), d=conv(), e=conv(k=1)),
    "+= on the input beside a merge": lambda: Written(augmented_input, d=conv(), e=conv(k=1)),
    "+= on a slice beside a merge": lambda: Written(augmented_slice, c=conv(), d=conv(), e=conv(k=1)),
    "addend read later": lambda: Written(lambda m, x: (y := m.c(x), plus(y, m.d(x)), y * 2)[-1], c=conv(), d=conv(k=1)),
    "addend read before": lambda: Written(
        lambda m, x: (y := m.c(x), z := y * 2, plus(y, m.d(x)) + F.relu(z))[-1], c=conv(), d=conv(k=1)),
    "alias of the addend read later": lambda: Written(
        lambda m, x: (y := m.c(x), z := y.view(y.shape), plus(y, m.d(x)), z)[-1], c=conv(), d=conv(k=1)),
    "flattened alias read later": lambda: Written(
        lambda m, x: (y := m.c(x), z := y.flatten(1), plus(y, m.d(x)), z)[-1], c=conv(), d=conv(k=1)),
    "detached alias read later": lambda: Written(
        lambda m, x: (y := m.c(x), z := y.detach(), plus(y, m.d(x)), z)[-1], c=conv(), d=conv(k=1)),
    "identity alias read later": lambda: Written(
        lambda m, x: (y := m.c(x), z := m.i(y), plus(y, m.d(x)), z)[-1], c=conv(), d=conv(k=1), i=nn.Identity()),
    "relu on the input between branches": lambda: Written(
        lambda m, x: (t := torch.tanh(x), a := m.c(t), F.relu(t, inplace=True), a + m.d(t))[-1], c=conv(), d=conv(k=1)),
    "relu on the input after all branches": lambda: Written(
        lambda m, x: (t := torch.tanh(x), a := m.c(t), b := m.d(t), F.relu_(t), a + b)[-1], c=conv(), d=conv(k=1)),
    "relu module on the input between branches": lambda: Written(
        lambda m, x: (t := torch.tanh(x), a := m.c(t), r := m.r(t), a + m.d(r))[-1],
        c=conv(), d=conv(k=1), r=nn.ReLU(inplace=True)),
    "relu on an alias of the input between branches": lambda: Written(
        lambda m, x: (t := torch.tanh(x), v := t.view(t.shape), a := m.c(t), v.relu_(), a + m.d(t))[-1],
        c=conv(), d=conv(k=1)),
    "slice of the input written between branches": lambda: Written(
        lambda m, x: (t := torch.tanh(x), a := m.c(t), operator.setitem(t, (slice(None), 0), 0.0), a + m.d(t))[-1],
        c=conv(), d=conv(k=1)),
    "skip added into the input": lambda: Written(
        lambda m, x: (t := torch.tanh(x), plus(t, m.c(t)), t)[-1], c=conv()),
    "skip added into the input, which is read later": lambda: Written(
        lambda m, x: (t := torch.tanh(x), y := m.d(t), plus(t, m.c(t)), y * t)[-1], c=conv(), d=conv(k=1)),
    "relu on the conv's output, which the norm reads": lambda: Written(
        lambda m, x: (y := m.c(x), y.relu_(), m.n(y))[-1], c=conv(), n=bn(4)),
    "relu whose result is thrown away": lambda: Written(
        lambda m, x: (y := m.c(x), F.relu(y), m.n(y))[-1], c=conv(), n=bn(4)),
    "norm's output written, conv's output read": lambda: Written(
        lambda m, x: (y := m.n(m.c(x)), z := y.relu_(), y + z)[-1], c=conv(), n=bn(4)),
    "mul_ by a constant": lambda: Written(lambda m, x: (y := m.c(x), y.mul_(2.0), m.n(y))[-1], c=conv(), n=bn(4)),
    "add_ with alpha": lambda: Written(lambda m, x: m.c(x).add_(m.d(x), alpha=-0.5), c=conv(), d=conv(k=1)),
    "out= argument": lambda: Written(
        lambda m, x: (y := m.c(x), torch.add(y, m.d(x), out=y), y)[-1], c=conv(), d=conv(k=1)),
    "copy_ into the conv's output": lambda: Written(
        lambda m, x: (y := m.c(x), y.copy_(m.d(x)), m.n(y))[-1], c=conv(), d=conv(k=1), n=bn(4)),
    "the model's own input": lambda: Written(
        lambda m, x: (a := m.c(x), x.relu_(), a + m.d(x))[-1], c=conv(), d=conv(k=1)),
    "accumulated from 0": lambda: Written(
        lambda m, x: functools.reduce(plus, [m.c(x), m.d(x)], 0), c=conv(), d=conv(k=1)),
}  # fmt: skip


@pytest.mark.parametrize("example", [False, True], ids=["bare", "with-example"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name, example):
    check(IN_PLACE[name](), X, example=example)


def test_input_is_not_overwritten_by_the_merge():
    """What the original left alone in its caller's tensor, the result leaves alone."""
    for make in IN_PLACE.values():
        model = randomised(make())
        deploy = structrep.reparameterize(model)
        with torch.no_grad():
            a, b = X.clone(), X.clone()
            model(a), deploy(b)
        assert torch.equal(a, b)


# --- geometry -------------------------------------------------------------------------------------------------

SIZES = [(5, 6), (6, 5), (7, 7), (8, 8), (4, 9)]


def added(**layers):
    return Written(lambda m, x: functools.reduce(operator.add, [layer(x) for layer in m.children()]), **layers)


GEOMETRY = {
    "same with even kernels": lambda: added(a=conv(k=4, padding="same"), b=conv(k=2, padding="same"), c=bn(4)),
    "same with even and odd": lambda: added(a=conv(k=(4, 3), padding="same", dilation=2), b=conv(k=1)),
    "same, then a norm": lambda: nn.Sequential(conv(k=4, padding="same"), bn(4)),
    "valid": lambda: added(a=conv(k=3, padding="valid"), b=conv(k=3, padding=0)),
    "even kernel, padded on both sides": lambda: added(a=conv(k=2, padding=1, dilation=2), b=conv(k=3, padding=1)),
    "average pool, counting the pad": lambda: added(a=conv(), p=nn.AvgPool2d(3, 1, 1)),
    "average pool, not counting the pad": lambda: added(a=conv(), p=nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
    "average pool, ceil_mode": lambda: added(a=conv(stride=2), p=nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
    "average pool, its own divisor": lambda: added(a=conv(), p=nn.AvgPool2d(3, 1, 1, divisor_override=2)),
    "average pool, then conv": lambda: nn.Sequential(nn.AvgPool2d(2, 2), conv(k=1)),
    "conv, then average pool": lambda: nn.Sequential(conv(k=1, padding=0), nn.AvgPool2d(2, 2)),
    "conv, then padded average pool": lambda: nn.Sequential(conv(k=1, padding=0), nn.AvgPool2d(3, 2, 1)),
    "conv, then F.avg_pool2d": lambda: Written(lambda m, x: F.avg_pool2d(m.c(x), 2), c=conv(k=2, padding=0)),
    "max pool": lambda: added(a=conv(), p=nn.MaxPool2d(3, 1, 1)),
    "stride 2, 3x3 and 1x1": lambda: added(a=conv(stride=2), b=conv(k=1, stride=2)),
    "stride 2, 5x5 and 3x3": lambda: added(a=conv(k=5, stride=2), b=conv(k=3, stride=2)),
    "1x1 conv with a bias, then zero padding": lambda: nn.Sequential(conv(k=1), conv(k=3, bias=False)),
    "norm before a zero-padded conv": lambda: nn.Sequential(bn(4), conv(k=3)),
    "norm before an unpadded conv": lambda: nn.Sequential(bn(4), conv(k=3, padding=0)),
    "norm before a reflect-padded conv": lambda: nn.Sequential(bn(4), conv(k=3, padding_mode="reflect")),
    "norm, ZeroPad2d, conv": lambda: nn.Sequential(bn(4), nn.ZeroPad2d(1), conv(k=3, padding=0)),
    "norm, ConstantPad2d, conv": lambda: nn.Sequential(nn.ConstantPad2d(1, 0.7), conv(k=3, padding=0), bn(4)),
    "3x3 then 3x3, both padded": lambda: nn.Sequential(conv(4, 8, bias=False), conv(8, 4, bias=False)),
    "1x3 then 3x1, padded per axis": lambda: nn.Sequential(
        conv(k=(1, 3), padding=(0, 1), bias=False), conv(k=(3, 1), padding=(1, 0), bias=False)),
    "1x3 then 3x1, padded per axis, bias": lambda: nn.Sequential(
        conv(k=(1, 3), padding=(0, 1)), conv(k=(3, 1), padding=(1, 0))),
    "reflect and zeros": lambda: added(a=conv(padding_mode="reflect"), b=conv()),
    "circular and replicate": lambda: added(a=conv(padding_mode="circular"), b=conv(padding_mode="replicate"), c=bn(4)),
    "reflect and an average pool": lambda: added(a=conv(padding_mode="reflect"), p=nn.AvgPool2d(3, 1, 1)),
    "groups that do not nest": lambda: nn.Sequential(
        nn.Conv2d(12, 12, 1, groups=4), nn.Conv2d(12, 12, 1, groups=6), bn(12)),
    "transposed conv and norm": lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, groups=2), bn(6)),
    "upsample between": lambda: nn.Sequential(conv(k=1), nn.Upsample(scale_factor=2), conv(k=1)),
    "pixel shuffle between": lambda: nn.Sequential(conv(4, 16, 1), nn.PixelShuffle(2), conv(k=1)),
    "crop with a step": lambda: Written(lambda m, x: m.a(x)[:, :, ::2, ::2] + m.b(x), a=conv(), b=conv(stride=2)),
    "crop of channels": lambda: Written(lambda m, x: m.a(x)[:, 1:3] + m.b(x), a=conv(), b=conv(4, 2)),
    "a batch index": lambda: Written(lambda m, x: m.n(m.a(x)[:1]), a=conv(), n=bn(4)),
    "crop to a fixed size": lambda: Written(lambda m, x: m.n(m.a(x)[:, :, :3, :3]), a=conv(), n=bn(4)),
    "crop from the far end": lambda: Written(lambda m, x: m.n(m.a(x)[:, :, -3:, :]), a=conv(), n=bn(4)),
    "broadcast of a pooled branch": lambda: Written(
        lambda m, x: m.a(x) + m.b(x.mean((2, 3), keepdim=True)), a=conv(), b=conv(k=1)),
    "broadcast over channels": lambda: Written(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv(4, 1)),
    "broadcast against the input": lambda: Written(lambda m, x: m.b(x) + x, b=conv(4, 1)),
    "sizes that broadcast": lambda: Written(
        lambda m, x: m.a(x) + m.b(x), a=conv(k=1), b=nn.Conv2d(4, 4, (1, 1), stride=(99, 1))),
    "concat of branches": lambda: Written(lambda m, x: torch.cat([m.a(x), m.b(x), x], 1), a=conv(), b=conv(k=1)),
    "concat along the width": lambda: Written(lambda m, x: torch.cat([m.a(x), m.b(x)], 3), a=conv(), b=conv(k=1)),
    "concat along the batch": lambda: Written(lambda m, x: torch.cat([m.a(x), m.b(x)]), a=conv(), b=conv(k=1)),
    "scale per column, not per channel": lambda: Written(
        lambda m, x: m.a(x)[:, :, :, :4] * torch.arange(4.0, dtype=x.dtype), a=conv()),
    "constant of another rank": lambda: Written(lambda m, x: m.a(x) * torch.ones(1, 1, 4, 1, 1) * 2, a=conv()),
    "identity without a channel count": lambda: Written(lambda m, x: x + x * 0.5, a=nn.Identity()),
    "identities and pools only": lambda: added(a=nn.Identity(), p=nn.AvgPool2d(3, 1, 1)),
    "scalars only": lambda: Written(lambda m, x: (x * 2 + 1) / 3 - x, a=nn.Identity()),
}  # fmt: skip


@pytest.mark.parametrize("example", [False, True], ids=["bare", "with-example"])
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry(name, example):
    model = randomised(GEOMETRY[name]())
    channels = next((m.in_channels for m in model.modules() if hasattr(m, "in_channels")), 4)
    truths = {}
    for size in SIZES:
        x = noise(2, channels, *size)
        with contextlib.suppress(RuntimeError):
            truths[x] = call(model, x)
    deploy = structrep.reparameterize(model, next(iter(truths)) if example else None)
    for x, truth in truths.items():
        assert distance(call(deploy, x), truth) <= EXACT
    for size in SIZES:
        if size not in [x.shape[2:] for x in truths]:
            with pytest.raises((RuntimeError, ValueError)):  # branches that do not agree on their size
                call(deploy, noise(2, channels, *size))
    assert not structrep.plan(deploy).merges


def test_branches_whose_sizes_agree_only_for_some_inputs():
    """Stride 2 with other paddings: the sum exists for odd sizes only, and must not become one conv for all."""
    model = randomised(added(a=conv(k=3, stride=2, padding=1), b=conv(k=3, stride=2, padding=0)))
    x = noise(1, 4, 5, 5)
    with pytest.raises(RuntimeError):
        call(model, x)
    model = randomised(added(a=conv(k=2, stride=2, padding=0), b=conv(k=1, stride=2, padding=0)))
    deploy = structrep.reparameterize(model)
    assert equal(deploy, model, noise(1, 4, 6, 8))
    with pytest.raises(RuntimeError):
        call(model, x)
    with pytest.raises(RuntimeError):
        call(deploy, x)


def test_unbatched_input():
    """(C, H, W) is legal for a conv; dim 1 is then not the channels."""
    model = randomised(Written(lambda m, x: torch.cat([m.a(x), m.b(x)], 0), a=conv(), b=conv(k=1)))
    x = noise(4, 5, 6)
    assert equal(structrep.reparameterize(model), model, x)
    assert equal(structrep.reparameterize(model, x), model, x)
    model = randomised(Written(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=conv(), b=conv(k=1)))
    assert equal(structrep.reparameterize(model, x), model, x)


# --- forwards with effects -------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("make", [traps.WritesAttributes, traps.WritesData, traps.WritesBuffer])
def test_forwards_that_write(make, inplace):
    model = randomised(make())
    before, count = fingerprint(model), getattr(model, "calls", None)
    plan = structrep.plan(model)
    assert fingerprint(model) == before
    assert getattr(model, "calls", None) == count
    assert not [v for v in vars(model).values() if isinstance(v, torch.fx.Proxy)]
    truth = call(copy.deepcopy(model), X)
    deploy = plan.apply(inplace)
    if not inplace:
        assert fingerprint(model) == before
    assert distance(call(deploy, X), truth) <= EXACT
    assert not [v for v in vars(deploy).values() if isinstance(v, torch.fx.Proxy)]


def test_buffers_that_a_forward_writes_are_still_written():
    model = randomised(traps.WritesBuffer())
    deploy = structrep.reparameterize(model, X)
    start = int(deploy.count)
    call(deploy, X), call(deploy, X)
    assert int(deploy.count) == start + 2


def test_random_numbers_are_not_baked_in():
    model = randomised(Written(lambda m, x: m.c(x) + m.d(x) * torch.rand(1, dtype=x.dtype), c=conv(), d=conv(k=1)))
    deploy = structrep.reparameterize(model)
    torch.manual_seed(3)
    a = call(model, X)
    torch.manual_seed(3)
    assert distance(call(deploy, X), a) <= EXACT


@pytest.mark.parametrize("example", [False, True])
def test_data_dependent_control_flow_is_left_alone(example):
    model = randomised(traps.Branching())
    deploy = structrep.reparameterize(model, X if example else None)
    assert equal(deploy, model, X, -X, TINY, -TINY)
    assert executed(deploy, X)["norm"] == 0
    refusals = structrep.plan(model).refusals
    assert any(r.kind == "Untraceable" and "gate" in r.where for r in refusals)


def test_control_flow_in_the_root():
    class Root(traps.Branching):
        def forward(self, x):
            y = self.first(x)
            return self.last(y) if y.mean() > 0 else self.gate(y)

    model = randomised(Root())
    deploy = structrep.reparameterize(model)
    assert equal(deploy, model, X, -X, TINY)
    assert executed(deploy, X)["norm"] == 0


def test_training_flag_is_read_in_eval():
    model = Written(lambda m, x: m.n(m.c(x)) if not m.training else x, c=conv(), n=bn(4))
    check(model, conv=1, norm=0)


@pytest.mark.parametrize("make", [traps.Unregistered, traps.ListOfRegistered])
@pytest.mark.parametrize("inplace", [False, True])
def test_modules_in_plain_lists(make, inplace):
    model = randomised(make())
    call(model, X)
    truth = call(copy.deepcopy(model), X)
    deploy = structrep.reparameterize(model, inplace=inplace)
    assert distance(call(deploy, X), truth) <= EXACT
    assert distance(call(copy.deepcopy(deploy), X), truth) <= EXACT


# --- odd models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda: nn.Identity(), lambda: conv(), lambda: bn(4), lambda: nn.ReLU(), lambda: nn.Sequential(),
    lambda: nn.Sequential(nn.Sequential()), lambda: nn.Sequential(nn.Identity(), nn.Identity()),
    lambda: nn.Sequential(conv(), nn.Sequential(), nn.Sequential(nn.Identity())), lambda: nn.Dropout(0.5),
    lambda: nn.Sequential(conv()), lambda: nn.AvgPool2d(2, 1), lambda: nn.PReLU(4), lambda: nn.MaxPool2d(1),
])  # fmt: skip
@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_to_merge(make, example, inplace):
    model = randomised(make())
    truth, before = call(model, X), fingerprint(model)
    deploy = structrep.reparameterize(model, X if example else None, inplace=inplace)
    assert distance(call(deploy, X), truth) == 0
    assert type(deploy) is type(model)
    assert fingerprint(model) == before
    assert (deploy is model) == inplace


def test_containers_without_a_forward():
    model = nn.ModuleList([nn.Sequential(conv(), bn(4)), nn.ModuleDict({"a": repvgg.Official(4, 4)})]).eval()
    deploy = structrep.reparameterize(randomised(model))
    assert equal(deploy[0], model[0], X)
    assert equal(deploy[1]["a"], model[1]["a"], X)
    assert executed(deploy[0], X)["norm"] == executed(deploy[1]["a"], X)["norm"] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_keep_their_dtype(dtype):
    model = randomised(nn.Sequential(repvgg.Official(4, 4), repvgg.Summed(4)), dtype=dtype)
    deploy = structrep.reparameterize(model, X.to(dtype))
    assert {p.dtype for p in deploy.parameters()} == {dtype}
    assert structrep.verify(model, deploy, X.to(dtype)).ok


def test_half_overflow_is_refused_or_reported():
    """Each branch is finite in half precision, the merged kernel is not."""
    model = randomised(repvgg.Official(4, 4), dtype=torch.float16)
    with torch.no_grad():
        for branch in (model.rbr_dense, model.rbr_1x1):
            branch.conv.weight.fill_(100.0)
            branch.bn.running_var.fill_(1e-3)
            branch.bn.weight.fill_(60.0)
    assert torch.isfinite(call(model, X.half() * 1e-3)).all()
    try:
        deploy = structrep.reparameterize(model)
    except errors.StructrepError:
        return
    assert all(torch.isfinite(p).all() for p in deploy.parameters())


def test_mixed_dtypes_stay():
    """Norms in float32 inside a half model, as mixed-precision code keeps them."""
    model = randomised(repvgg.Official(4, 4), dtype=torch.bfloat16)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.float()
    deploy = structrep.reparameterize(model)
    assert {p.dtype for p in deploy.parameters()} == {torch.bfloat16}
    assert deploy(X.bfloat16()).dtype == torch.bfloat16


def test_new_layers_are_on_the_models_device():
    model = randomised(repvgg.Official(4, 4)).to("meta")
    try:
        deploy = structrep.reparameterize(model, verify=False)
    except errors.StructrepError as error:
        assert "meta" in str(error)  # noqa: PT017
    else:
        assert {p.device.type for p in deploy.parameters()} == {"meta"}


def test_channels_last_stays():
    model = randomised(repvgg.Official(4, 4)).to(memory_format=torch.channels_last)
    deploy = structrep.reparameterize(model)
    weight = next(p for p in deploy.parameters() if p.ndim == 4)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_weights_of_the_original_and_the_result_are_apart():
    """Writing to one must not change the other, in any layer, merged or not."""
    for make in (lambda: repvgg.Official(4, 4), block, lambda: nn.Sequential(conv(), nn.ReLU(), conv(), bn(4)),
                 lambda: Written(lambda m, x: m.c(x) + m.d(x), c=conv(), d=conv(k=1, bias=False)),
                 lambda: Written(lambda m, x: m.c(x) * 1.0, c=conv()),
                 lambda: Written(lambda m, x: F.conv2d(x, m.c.weight * 1.0, m.c.bias), c=conv())):  # fmt: skip
        model = randomised(make())
        deploy = structrep.reparameterize(model)
        truth = call(deploy, X)
        with torch.no_grad():
            for t in (*model.parameters(), *model.buffers()):
                t.zero_()
        assert distance(call(deploy, X), truth) == 0


def test_model_that_cannot_be_copied():
    model = randomised(nn.Sequential(conv(), bn(4)))
    model.lock = threading.Lock()
    before = fingerprint(model)
    try:
        deploy = structrep.reparameterize(model)
    except errors.BadInput as error:
        assert "copied" in str(error)  # noqa: PT017
    else:
        assert equal(deploy, model, X)
    assert fingerprint(model) == before


def test_computed_tensor_in_an_attribute():
    """A non-leaf tensor, which torch refuses to deep-copy."""
    model = randomised(nn.Sequential(conv(), bn(4)))
    model.cached, model.more = model[0].weight * 2, [model[0].weight.sum()]
    deploy = structrep.reparameterize(model)
    assert equal(deploy, model, X)


def test_converting_twice_is_a_no_op_even_in_place():
    model = randomised(nn.Sequential(repvgg.Official(4, 4), repvgg.Summed(4)))
    truth = call(model, X)
    once = structrep.reparameterize(model, inplace=True)
    state = {k: v.clone() for k, v in once.state_dict().items()}
    twice = structrep.reparameterize(once, inplace=True)
    assert twice is once is model
    assert all(torch.equal(v, state[k]) for k, v in twice.state_dict().items())
    assert distance(call(twice, X), truth) <= EXACT


def test_a_plan_can_be_applied_more_than_once():
    model = randomised(nn.Sequential(repvgg.Official(4, 4), repvgg.Summed(4)))
    plan = structrep.plan(model)
    a, b = plan.apply(), plan.apply()
    assert equal(a, b, X, within=0.0)
    assert not {id(p) for p in a.parameters()} & {id(p) for p in b.parameters()}
    assert not {p.data_ptr() for p in a.parameters()} & {p.data_ptr() for p in b.parameters()}
    plan.apply(inplace=True)
    with pytest.raises(structrep.StructrepError, match=r"plan\(model\)"):
        plan.apply()


def test_weights_changed_between_plan_and_apply():
    model = randomised(repvgg.Official(4, 4))
    plan = structrep.plan(model)
    randomised(model, seed=5)
    with pytest.raises(structrep.StructrepError, match="weights changed since this plan was made"):
        plan.apply()


def test_conversion_under_grad_and_in_inference_mode():
    model = randomised(repvgg.Official(4, 4))
    with torch.enable_grad():
        deploy = structrep.reparameterize(model, X)
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
    structrep.reparameterize(model, X)
    assert torch.equal(torch.rand(3), a)
    assert torch.get_default_dtype() == torch.float32


def test_old_default_dtype_changes_nothing():
    torch.set_default_dtype(torch.float64)
    try:
        deploy = structrep.reparameterize(randomised(repvgg.Official(4, 4)).float())
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in deploy.parameters()} == {torch.float32}


# --- errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [
    noise(1, 5, 6, 6), (noise(1, 4, 6, 6), noise(1, 4, 6, 6)), {"image": X}, "an image", 3, (), (None,), noise(4),
    {"x": X, "more": 1}, (noise(0),), torch.zeros(1, 4, 5, 5, dtype=torch.long),
])  # fmt: skip
@pytest.mark.parametrize("inplace", [False, True])
def test_bad_example_inputs(example, inplace):
    model = randomised(repvgg.Summed(4))
    before = fingerprint(model)
    with pytest.raises(errors.BadInput):
        structrep.reparameterize(model, example, inplace=inplace)
    assert fingerprint(model) == before


def test_bad_example_inputs_say_what_they_were():
    with pytest.raises(errors.BadInput, match=r"\(1, 5, 6, 6\)"):
        structrep.plan(randomised(repvgg.Summed(4)), noise(1, 5, 6, 6))
    with pytest.raises(errors.BadInput, match=r"str.*tensor"):
        structrep.plan(randomised(repvgg.Summed(4)), "an image")


def test_float32_example_for_a_float64_model():
    """Numbers say nothing of the dtype that the model runs in; either a clear error or a plan."""
    model = randomised(repvgg.Summed(4))
    try:
        deploy = structrep.reparameterize(model, X.float())
    except errors.BadInput:
        return
    assert equal(deploy, model, X)


@pytest.mark.parametrize(
    "make", [lambda: nn.LazyConv2d(4, 3), lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())]
)
def test_lazy_modules(make):
    model = make().eval()
    with pytest.raises(errors.Uninitialized, match="run the model once"):
        structrep.reparameterize(model)
    with pytest.raises(errors.Uninitialized):
        structrep.plan(model, X)
    call(model, X.float())
    assert equal(structrep.reparameterize(model.double()), model, X)


@pytest.mark.parametrize("rules", [["repvg"], "repvg", ["repvgg", "nonsense"]])
def test_unknown_rules(rules):
    model = randomised(repvgg.Summed(4))
    with pytest.raises(errors.UnknownRule, match=r"repvg|nonsense"):
        structrep.reparameterize(model, rules=rules)
    with pytest.raises(errors.UnknownRule, match="did you mean 'repvgg'"):
        structrep.plan(model, rules=["repvg"])


@pytest.mark.parametrize("rules", ["repvgg", ["repvgg"], []])
def test_chosen_rules_only(rules):
    model = randomised(nn.Sequential(repvgg.Summed(4), nn.ReLU(), conv(), bn(4)))
    deploy = structrep.reparameterize(model, rules=rules)
    assert equal(deploy, model, X)
    assert executed(deploy, X)["norm"] == (1 if rules else 3 + 1)


@pytest.mark.parametrize("thing", [None, 3, torch.zeros(3), lambda x: x, nn.Conv2d, "resnet18"])
def test_not_a_model(thing):
    with pytest.raises((errors.StructrepError, TypeError), match=r"(?i)module"):
        structrep.plan(thing)


def test_rule_that_would_match_its_own_output_is_refused_at_registration():
    from structrep.pattern import Conv, Optional, Seq, conv_norm

    registry = structrep.Registry()
    for pattern in (Conv().named("a"), Seq(Conv().named("a")), Seq(Optional(Conv()), Conv().named("a"))):
        with pytest.raises(errors.InvalidRule, match="plain convolution"):
            registry.rule(pattern, source="none")(lambda a: a)
    with pytest.raises(errors.InvalidRule, match=r"named"):
        registry.rule(conv_norm().named("a"), source="none", name="other")(lambda b: b)


def test_wrong_merge_is_refused_before_any_forward():
    from structrep.pattern import Sum, conv_norm

    registry = structrep.Registry()

    @registry.rule(Sum(conv_norm().named("a"), conv_norm().named("b")), source="a mistake")
    def doubled(a, b):
        return a + a

    model = randomised(Written(lambda m, x: m.n(m.c(x)) + m.p(m.d(x)), c=conv(), d=conv(), n=bn(4), p=bn(4)))
    plan = structrep.plan(model, rules=registry)
    assert not plan.merges
    assert [r.kind for r in plan.refusals] == ["WrongMerge"]
    assert "coefficients differ by" in plan.refusals[0].reason
    assert equal(plan.apply(), model, X, within=0.0)


def test_verify_finds_a_wrong_model():
    model = randomised(repvgg.Official(4, 4)).float()
    deploy = structrep.reparameterize(model)
    with torch.no_grad():
        next(deploy.parameters())[0, 0, 0, 0] += 1e-2
    assert not structrep.verify(model, deploy, X.float()).ok
    assert flat(call(model, X.float()))
