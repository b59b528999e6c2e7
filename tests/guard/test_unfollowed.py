"""What a forward that is not followed may ask about a layer keeps a merge away, and what it does not ask does not."""

import pytest
import torch
from torch import nn

import structrep
from tests.guard.asking import DEVICE, X, train, walk
from tests.support.models import settled
from tests.support.truth import EXACT, relative_error, says


def left(behind):
    """A forward that cannot be followed, and what it does then."""

    def forward(self, x):
        if str(x) == "never":
            x = x + 1
        return behind(self, x)

    return forward


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))

    def has_norm(self):
        return isinstance(self.bn, nn.BatchNorm2d)


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower, self.bn, self.name, self.how = Tower(), nn.BatchNorm2d(4), "tower", "norm"
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def embeddings(self):
    name = getattr(self, "name", "tower")
    return getattr(self, name, None)


def around(forward, **more):
    torch.manual_seed(0)
    return settled(type("Net", (Around,), {"forward": forward, **more})())


def get_embeddings(self, x):
    if str(x) == "never":
        x = x + 1
    self.embeddings()
    return self.bn(self.tower(x))


def get_a_device(self, x):
    if str(x) == "never":
        x = x + 1
    return self.bn(self.tower(x.to(next(self.parameters()).device)))


def get_a_device_by_a_property(self, x):
    if str(x) == "never":
        x = x + 1
    return self.bn(self.tower(x.to(self.device)))


def get_a_part_by_its_name(self, x):
    if str(x) == "never":
        x = x + 1
    return self.bn(getattr(self, "tower")(x))  # noqa: B009


def loop_over_names(self, x):
    if str(x) == "never":
        x = x + 1
    for name in ("tower", "body"):
        x = getattr(self, name)(x)
    return x


def ask_in_training(self, x):
    if str(x) == "never":
        x = x + 1
    if self.training:
        x = x * sum(p.sum() for p in self.parameters())
    return self.tower(x)


def walk_over_all(self, x):
    return x * len(list(self.modules()))


LEFT = {
    "a part by a computed name": around(get_embeddings, embeddings=embeddings),
    "a device": around(get_a_device),
    "a device by a property": around(get_a_device_by_a_property, device=DEVICE),
    "a part by its name": around(get_a_part_by_its_name, freeze=walk, train=train),
    "parts by names": around(loop_over_names, init_weights=walk, train=train),
    "in training": around(ask_in_training),
    "a method that is never called": around(get_a_device, walk=walk_over_all),
}


@pytest.mark.parametrize("program", LEFT)
def test_what_a_forward_that_is_not_followed_does_not_ask(program):
    model = LEFT[program]
    for inputs in ((), (X,)):
        deploy = structrep.reparameterize(model, *inputs)
        assert isinstance(deploy.tower.bn, nn.Identity)
        assert relative_error(deploy(X), model(X)) < EXACT


def of_setting(self, x):
    if str(x) == "never":
        x = x + 1
    y = self.tower(x)
    return y.relu() if self.tower.bn.eps > 0 else y


def of_type_by_a_method(self, x):
    if str(x) == "never":
        x = x + 1
    y = self.tower(x)
    return y.relu() if self.asks() else y


def of_type_by_a_method_of_the_part(self, x):
    if str(x) == "never":
        x = x + 1
    y = self.tower(x)
    return y.relu() if self.tower.has_norm() else y


def of_a_method_by_a_computed_name(self, x):
    if str(x) == "never":
        x = x + 1
    y = self.tower(x)
    return y.relu() if getattr(self, f"by_{self.how}")() else y


def of_itself_by_a_function(self, x):
    if str(x) == "never":
        x = x + 1
    y = self.tower(x)
    return y.relu() if tower_has_norm(self) else y


def tower_has_norm(model):
    return type(model.tower.bn) is nn.BatchNorm2d


def of_all_parameters(self, x):
    if str(x) == "never":
        x = x + 1
    return self.tower(x) * len(list(self.parameters()))


def of_more_of_the_first(self, x):
    if str(x) == "never":
        x = x + 1
    first = next(self.tower.parameters())
    return self.tower(x).to(first.dtype) * first.abs().sum()


def tower_is_normed(self):
    return isinstance(self.tower.bn, nn.BatchNorm2d)


UNFOLLOWED = {
    "a setting": (around(of_setting), "self.tower.bn.eps > 0"),
    "a method": (around(of_type_by_a_method, asks=tower_is_normed), "isinstance(self.tower.bn"),
    "a method of the part": (around(of_type_by_a_method_of_the_part), "isinstance(self.bn"),
    "a computed name": (around(of_a_method_by_a_computed_name, by_norm=tower_is_normed), "isinstance(self.tower.bn"),
    "a function": (around(of_itself_by_a_function), "type(model.tower.bn)"),
    "all parameters": (around(of_all_parameters), "list(self.parameters())"),
    "more of the first": (around(of_more_of_the_first), "next(self.tower.parameters())"),
}


@pytest.mark.parametrize("program", UNFOLLOWED)
def test_what_a_forward_that_is_not_followed_may_ask(program):
    model, line = UNFOLLOWED[program]
    for inputs in ((), (X,)):
        plan = says(structrep.plan(model, *inputs), int(program != "all parameters"), "Shared Untraceable")
        said = [refusal.reason for refusal in plan.refusals]
        assert any(line in one and "test_unfollowed.py:" in one for one in said), said
        assert relative_error(plan.apply()(X), model(X)) < EXACT
