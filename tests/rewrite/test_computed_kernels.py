"""Kernels that a method computes of weights, in the module that convolves with them or in a part of it: which way that
merges, what becomes of the parts, and what takes effect later.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import EXACT, check, relative_error, says

X = torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FACTOR, SEEN = 1.5, []


class Settings:
    factor = 2.0


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Parameter(torch.randn(4, 4, 1, 1))
        self.flag, self.factor, self.calls, self.cached, self.settings = False, 2.0, 0, None, Settings()
        self.factors, self.function = [1.0, 2.0], helper

    @property
    def scaled(self):
        return self.w * self.factor

    @property
    def by_a_name_outside(self):
        return self.w * FACTOR

    @staticmethod
    def padded(kernel):
        return F.pad(kernel, [1, 1, 1, 1])

    @classmethod
    def of_class(cls, kernel):
        return kernel * FACTOR

    def filled(self, kernel):
        kernel[:, :, 1, 1] = self.v[:, :, 0, 0]
        return kernel


class Net(nn.Module):
    """One of two paths convolves and does not merge."""

    def __init__(self, part):
        super().__init__()
        self.part, self.conv, self.early = part(), nn.Conv2d(4, 4, 3, padding=1), False

    def forward(self, x):
        if self.early:
            return F.conv2d(x, self.part.kernel(), padding=1) * 3
        return F.relu(self.conv(x) + F.conv2d(x, self.part.kernel(), padding=1))


def plain(self):
    return self.w


def by_a_flag(self):
    return self.w * 2 if self.flag else self.w


def by_a_factor(self):
    return self.w * self.factor


def by_an_object(self):
    return self.w * self.settings.factor


def by_a_list(self):
    return sum(self.w * one for one in self.factors)


def by_a_property(self):
    return self.scaled


def by_a_static_method(self):
    return self.padded(self.v) + self.w


def in_place_of_its_own(self):
    kernel = torch.zeros_like(self.w)
    kernel[:, :, 1, 1] = self.v[:, :, 0, 0]
    kernel += self.w
    for _ in range(2):
        kernel += self.w
    return kernel


def by_a_name(self):
    return self.w * FACTOR


def by_a_property_and_a_name(self):
    return self.by_a_name_outside


def by_a_class_method(self):
    return self.of_class(self.w)


def helper(kernel):
    return kernel * FACTOR


def by_a_helper(self):
    return helper(self.w)


def fills_what_it_is_given(self):
    return self.filled(torch.zeros_like(self.w)) + self.w


def counts(self):
    self.calls += 1
    return self.w * self.calls


def by_a_cell():
    factor = 1.5

    def kernel(self):
        return self.w * factor

    return kernel


def by_a_function_that_it_holds(self):
    return self.function(self.w)


def caches(self):
    if self.cached is None:
        self.cached = self.w * 2
    return self.cached


def tells_others(self):
    SEEN.append(1)
    return self.w


def sets_name(part):
    global FACTOR
    FACTOR = 2.5


def net(kernel):
    torch.manual_seed(0)
    return settled(Net(type("Kernel", (Part,), {"kernel": kernel, "__module__": __name__})))


@pytest.fixture(autouse=True)
def _as_before():
    yield
    global FACTOR
    FACTOR = 1.5


@pytest.mark.parametrize(
    ("kernel", "way", "later", "named"),
    [
        (plain, "edit", None, ""),
        (by_a_static_method, "edit", None, ""),
        (in_place_of_its_own, "edit", None, ""),
        (by_a_flag, "edit", lambda part: setattr(part, "flag", True), "self.part.flag=False"),
        (by_a_factor, "edit", lambda part: setattr(part, "factor", 3.0), "self.part.factor=2.0"),
        (by_a_property, "edit", lambda part: setattr(part, "factor", 3.0), "self.part.factor=2.0"),
        (by_an_object, "edit", lambda part: setattr(part.settings, "factor", 3.0), "self.part.settings.factor=2.0"),
        (by_a_list, "edit", lambda part: part.factors.append(4.0), "self.part.factors=[1.0, 2.0]"),
        (by_a_name, "rewrite", sets_name, "FACTOR=1.5"),
        (by_a_helper, "rewrite", sets_name, "FACTOR=1.5"),
        (by_a_class_method, "rewrite", sets_name, "FACTOR=1.5"),
        (by_a_function_that_it_holds, "rewrite", sets_name, "FACTOR=1.5"),
        (by_a_property_and_a_name, "rewrite", sets_name, "FACTOR=1.5"),
        (fills_what_it_is_given, "rewrite", None, ""),
        (caches, "rewrite", None, ""),
    ],
)
def test_a_method_that_only_computes_goes_with_its_kernel(kernel, way, later, named):
    model = net(kernel)
    plan = structrep.plan(model)
    assert [merge.edit for merge in plan.merges] == [way], plan._selection.draft.unedited
    deploy = plan.apply()
    assert relative_error(deploy(X), model(X)) < EXACT
    if way == "edit":  # the other path is as it was, with all that it runs
        model.early = deploy.early = True
        assert torch.equal(deploy(X), model(X))
        model.early = deploy.early = False
    if later is not None:
        for one in (model, deploy):
            later(one.part)
        with pytest.raises(ValueError, match="was reparameterized for") as raised:
            deploy(X)
        assert named in str(raised.value)


@pytest.mark.parametrize("kernel", [tells_others, counts])
def test_a_method_that_does_more_stays(kernel):
    model = net(kernel)
    plan = says(structrep.plan(model), merges=0, refused="Unreadable")
    assert "changes its arguments or itself" in plan.refusals[0].reason


class Composed(nn.Module):
    """Two layers in a row, and the kernel of both."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 3, bias=False)

    def forward(self, x):
        return self.b(self.a(F.pad(x, (1, 1, 1, 1))))

    def kernel(self):
        return F.conv2d(self.b.weight, self.a.weight.transpose(0, 1))


class Edge(nn.Module):
    """ECBSR's way: branches while it trains, then one convolution of a computed kernel."""

    def __init__(self):
        super().__init__()
        self.conv, self.part = nn.Conv2d(4, 4, 3, padding=1, bias=False), Composed()

    def forward(self, x):
        if self.training:
            return self.conv(x) + self.part(x)
        return F.conv2d(x, self.conv.weight + self.part.kernel(), padding=1)


class Slow(Edge):
    def forward(self, x, slow=False):
        if slow:
            return self.conv(x) + self.part(x)
        return F.conv2d(x, self.conv.weight + self.part.kernel(), padding=1)


class Unfollowed(Edge):
    def forward(self, x):
        y = F.conv2d(x, self.conv.weight + self.part.kernel(), padding=1)
        return y + self.part(x) if x.sum() > 1e6 else y


def numbers(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_variable_around_a_method_of_another_class():
    plan = says(structrep.plan(net(by_a_cell())), merges=0, refused="Unreadable")
    assert "goes by factor, which may be set" in plan.refusals[0].reason


class Within(Edge):
    """A kernel of its own that is made of a part's, whose forward would merge too."""

    def kernel(self):
        return self.part.kernel() * 2

    def forward(self, x):
        return F.conv2d(x, self.kernel(), padding=1).relu()


class Other(Edge):
    def forward_part(self, x):
        return self.part.a(x)


def test_a_part_that_merges_by_itself_stays():
    check(settled(Within()), X, merges=1, refused="Shared", conv=1)


def test_another_forward_that_runs_a_layer_of_the_part():
    says(structrep.plan(settled(Other())), merges=0, refused="Shared")


def test_layers_that_nothing_calls_vanish_with_the_kernel_that_was_computed_of_them():
    deploy = check(settled(nn.Sequential(Edge(), nn.ReLU(), Edge())), X, merges=2, refused="Shared", conv=2)
    assert numbers(deploy) == 2 * 144
    assert deploy[0].part is None


def test_layers_that_another_path_calls_stay():
    model = settled(Slow())
    deploy = structrep.reparameterize(model)
    assert numbers(deploy) == 144 + numbers(model)
    for slow in (False, True):
        assert relative_error(deploy(X, slow=slow), model(X, slow=slow)) < EXACT


def test_layers_that_code_which_cannot_be_followed_may_call_stay():
    model = settled(Unfollowed())
    deploy = structrep.reparameterize(model)
    for x in (X, X + 1e6):
        assert relative_error(deploy(x), model(x)) < EXACT


class Edges(nn.Module):
    """ECBSR's branch: a convolution and a filter, whose own forward merges, and which is never run in eval mode."""

    def __init__(self):
        super().__init__()
        self.k, self.b = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.Parameter(torch.randn(4))
        self.scale = nn.Parameter(torch.rand(4, 1, 1, 1))
        self.mask = nn.Parameter(torch.randn(4, 1, 3, 3), requires_grad=False)

    def forward(self, x):
        return F.conv2d(F.conv2d(x, self.k, self.b), self.scale * self.mask, groups=4)

    def kernel(self):
        wide, filters = torch.zeros(4, 4, 3, 3, dtype=self.k.dtype), self.scale * self.mask
        for i in range(4):
            wide[i, i] = filters[i, 0]
        return F.conv2d(wide, self.k.permute(1, 0, 2, 3)), wide.sum((2, 3)) @ self.b


class Filtered(nn.Module):
    def __init__(self, part=Edges):
        super().__init__()
        self.conv, self.part = nn.Conv2d(4, 4, 3), part()

    def forward(self, x):
        kernel, bias = self.part.kernel()
        return F.conv2d(x, self.conv.weight + kernel, self.conv.bias + bias)


class WithMore(Edges):
    """It has a number that no kernel is computed of."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(1))

    def forward(self, x):
        return super().forward(x) * self.gain


class Looked(Filtered):
    """What a part holds is of use elsewhere."""

    def forward(self, x):
        return super().forward(x).relu() * self.part.scale.sum()


def test_a_part_goes_with_what_was_computed_of_it_and_what_merges_in_it():
    deploy = check(settled(Filtered()), X, merges=1, conv=1)
    assert numbers(deploy) == 4 * 4 * 9 + 4
    assert deploy.part is None


def test_a_part_of_which_something_else_is_of_use_stays():
    for model in (settled(Filtered(WithMore)), settled(Looked())):
        deploy = structrep.reparameterize(model)
        assert isinstance(deploy.part, Edges)
        assert relative_error(deploy(X), model(X)) < EXACT
        assert relative_error(deploy.part(X), model.part(X)) < EXACT
