"""Hooks: what they see and do is what they saw and did, so what they stand in stays, and the rest merges."""

import pytest
import torch
from torch import nn

import structrep
from tests.foreign import repvgg
from tests.support.models import bn, conv, noise, randomised
from tests.support.truth import EXACT, call, distance, equal, executed, says

X = noise(2, 4, 5, 6)


def block():
    return nn.Sequential(nn.Sequential(conv(), bn(4)), nn.ReLU(), nn.Sequential(conv(), bn(4)))


def summed():
    return nn.Sequential(repvgg.Summed(4), nn.ReLU(), repvgg.Summed(4))


# Where a hook is, in a chain and in a sum; how many merges are left in each; and for what the others are refused.
PLACES = {
    "conv": (("0.0", 1), ("0.paths.0.0", 2), "Hooked Isolated"),
    "norm": (("0.1", 1), ("0.paths.2", 2), "Hooked"),
    "container": (("0", 2), ("0.paths.0", 3), "Hooked"),
    "relu": (("1", 2), ("1", 2), "Hooked"),
    "root": (("", 2), ("", 2), ""),
}
HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda m, i, o: seen.append(("out", i[0].clone(), o.clone()))),
    "pre": lambda m, seen: m.register_forward_pre_hook(lambda m, i: seen.append(("in", i[0].clone()))),
    "changes output": lambda m, seen: m.register_forward_hook(lambda m, i, o: torch.tanh(o)),
    "changes input": lambda m, seen: m.register_forward_pre_hook(lambda m, i: (torch.sigmoid(i[0]),)),
    "with kwargs": lambda m, seen: m.register_forward_hook(lambda m, i, k, o: o * 2.5, with_kwargs=True),
    "always": lambda m, seen: m.register_forward_hook(
        lambda m, i, o: seen.append(("out", o.clone())), always_call=True),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_see_and_do_what_they_did(place, kind):
    *wheres, refused = PLACES[place]
    for make, (path, merges) in zip((block, summed), wheres, strict=True):
        for inplace in (False, True):
            model, seen = randomised(make()), []
            HOOKS[kind](model.get_submodule(path), seen)
            truth, was = call(model, X), list(seen)
            seen.clear()
            deploy = says(structrep.plan(model), merges, refused).reparameterize(inplace=inplace)
            assert not seen, "planning must not fire hooks"
            assert distance(call(deploy, X), truth) <= EXACT
            assert [w[0] for w in was] == [s[0] for s in seen]
            assert all(distance(list(a[1:]), list(b[1:])) <= EXACT for a, b in zip(seen, was, strict=True))


def test_backward_hooks_go_on():
    model = randomised(block())
    seen = []
    model[0].register_full_backward_hook(lambda m, i, o: seen.append(1))
    deploy = says(structrep.plan(model), 2, "Hooked").reparameterize()
    deploy(X.clone().requires_grad_()).sum().backward()
    assert seen
    assert equal(deploy, model, X)


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_full_backward_hook", "register_full_backward_pre_hook"]
)
def test_a_hook_inside_a_merge_is_a_refusal(register):
    model = randomised(block())
    getattr(model[0][0], register)(lambda *_: None)
    deploy = says(structrep.plan(model), 1, "Hooked Isolated").reparameterize()
    assert executed(deploy, X)["norm"] == 1


def test_state_dict_hooks_go_on():
    model = randomised(block())
    model.register_state_dict_post_hook(lambda m, state, prefix, _: state.update(mark=torch.ones(1)))
    deploy = says(structrep.plan(model), 2).reparameterize()
    assert "mark" in deploy.state_dict()
