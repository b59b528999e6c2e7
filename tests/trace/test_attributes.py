"""What a forward assigns: to its attributes, to its buffers, to the numbers of its layers, at every call or once."""

import copy

import pytest
import torch
from torch import nn

import structrep
from tests.foreign.span import SPAN, Conv3XC
from tests.support.models import bn, conv, noise, randomised, settled
from tests.support.truth import CLOSE, EXACT, call, check, distance, fingerprint, relative_error, says

X = noise(2, 3, 9, 8)


class WritesAttributes(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.d, self.n = conv(), conv(k=1), bn(4)
        self.last, self.calls, self.cache = None, 0, {}

    def forward(self, x):
        self.calls += 1
        y = self.n(self.c(x) + self.d(x))
        self.last = y
        self.cache["y"] = y
        return y


class WritesData(nn.Module):
    """Recomputes a conv's weight into .data on each call, as some SR nets do."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, 4, 3, 3))
        self.c, self.n = conv(), bn(4)

    def forward(self, x):
        self.c.weight.data = self.w * 2
        return self.n(self.c(x))


class WritesBuffer(nn.Module):
    """Counts its calls in a buffer and keeps a running statistic of its input."""

    def __init__(self):
        super().__init__()
        self.c, self.n = conv(), bn(4)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.count += 1
        return self.n(self.c(x))


@pytest.mark.parametrize(
    ("make", "merges", "refused"), [(WritesAttributes, 1, ""), (WritesData, 0, "Shared"), (WritesBuffer, 1, "")]
)
def test_forwards_that_write(make, merges, refused):
    for inplace in (False, True):
        model, x = randomised(make()), noise(2, 4, 5, 6)
        before, count = fingerprint(model), getattr(model, "calls", None)
        plan = says(structrep.plan(model), merges, refused)
        assert fingerprint(model) == before
        assert getattr(model, "calls", None) == count
        assert not [v for v in vars(model).values() if isinstance(v, torch.fx.Proxy)]
        truth = call(copy.deepcopy(model), x)
        deploy = plan.apply(inplace)
        if not inplace:
            assert fingerprint(model) == before
        assert distance(call(deploy, x), truth) <= EXACT
        assert not [v for v in vars(deploy).values() if isinstance(v, torch.fx.Proxy)]


def test_buffers_that_a_forward_writes_are_still_written():
    model, x = randomised(WritesBuffer()), noise(2, 4, 5, 6)
    deploy = says(structrep.plan(model, x), 1).reparameterize(x)
    start = int(deploy.count)
    call(deploy, x), call(deploy, x)
    assert int(deploy.count) == start + 2


class WritesToItself(nn.Module):
    """Its forward cannot be written anew; what is inside its parts merges all the same."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.block = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Sequential()
        self.register_buffer("mean", torch.randn(1, 4, 1, 1))
        self.shift = 0.5

    def forward(self, x):
        self.mean = self.mean * 1
        return self.norm(self.conv((x - self.shift) * 255.0))


def test_a_merge_that_cannot_be_written_leaves_the_smaller_ones():
    model, x = WritesToItself(), noise(2, 4, 6, 7)
    deploy = check(model, x, merges=1, within=CLOSE)
    assert not isinstance(deploy.norm, nn.BatchNorm2d)
    assert {merge.edit for merge in structrep.plan(model).merges} <= {
        "swap",
        "edit",
    }  # what it changes, it changes still


# --- numbers that are assigned --------------------------------------------------------------------------------


def test_span_in_eval_mode():
    for inplace in (False, True):
        model = SPAN().double().eval()
        model.train()
        trained = model(X)
        model.eval()
        plan = structrep.plan(model)
        assert [merge.rules for merge in plan.merges] == [
            ("conv3xc_computed", "fold_prenorm"),
            ("conv3xc_computed",),
            ("conv3xc_computed",),
        ]
        assert plan.merges[0].parameters[0] > plan.merges[0].parameters[1]
        deploy = structrep.reparameterize(model, X, inplace=inplace)
        assert relative_error(deploy(X), trained) < EXACT
        blocks = ("head", "body", "tail")
        assert set(deploy.state_dict()) == {f"{b}.eval_conv.{n}" for b in blocks for n in ("weight", "bias")}
        assert isinstance(deploy.body, Conv3XC)
        assert not structrep.plan(deploy).merges


def test_span_in_training_mode():
    model = SPAN().double()
    model.head.training = True
    model.body.eval()
    rules = [merge.rules for merge in structrep.plan(model).merges]
    assert rules == [("conv3xc", "fold_prenorm"), ("conv3xc_computed",), ("conv3xc",)]
    assert relative_error(structrep.reparameterize(model)(X), model(X)) < EXACT


class Assigns(nn.Module):
    """A convolution and a norm whose forward assigns what the convolution's numbers are."""

    def __init__(self, how):
        super().__init__()
        self.w, self.how = nn.Parameter(torch.randn(4, 3, 3, 3)), how
        self.average = torch.zeros(4, 3, 3, 3, dtype=torch.float64)
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        if self.how == "after":
            y = self.conv(x)
            self.conv.weight.data = self.w * 2
            return self.norm(y)
        if self.how == "between":
            self.conv.weight.data = self.w * 2
            y = self.conv(x)
            self.conv.weight.data = self.w * 3
            return self.norm(y)
        if self.how == "average":
            self.average = 0.5 * self.average + self.w
            self.conv.weight.data = self.average * 1.0
        elif self.how == "seen":
            self.conv.weight.data = self.w * 2
            return self.norm(self.conv(x)).relu() * self.conv.weight.sum()
        else:
            self.conv.weight.data = self.w * 2
        return self.norm(self.conv(x))


def test_what_is_assigned_is_computed_once():
    model = settled(Assigns("once"))
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(X), model(X)) < EXACT
    assert type(deploy.norm) is nn.Identity
    assert deploy.w is None


@pytest.mark.parametrize(
    ("how", "refused"),
    [("after", "Shared"), ("between", "Shared"), ("average", "Unreadable"), ("seen", "Untraceable")],
)
def test_what_is_assigned_otherwise_stays(how, refused):
    model, twin = settled(Assigns(how)), settled(Assigns(how))
    twin.load_state_dict(model.state_dict())
    deploy = says(structrep.plan(model), 0, refused).reparameterize()
    for _ in range(2):
        assert relative_error(deploy(X), twin(X)) < EXACT


class Again(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Conv3XC(3, 3)

    def forward(self, x):
        return self.block(self.block(x).relu())


def test_a_block_that_is_called_twice():
    check(Again(), X, merges=0)


# Lines of forwards, by what they do; and for what the merge is refused, if it is.
ORDERS = {
    "before": ("Untraceable",
        "s.b.weight.data = s.a.weight * 2; s.a.weight.data = s.w * 3; return s.bn(s.b(x)) + s.a(x).relu()"),
    "swap": ("Untraceable",
        "s.a.weight.data, s.b.weight.data = s.b.weight.data, s.a.weight.data; return s.bn(s.b(s.a(x)))"),
    "decay": ("Untraceable", "s.a.weight.data = s.a.weight * 0.5; return s.bn(s.a(x))"),
    "own": ("Untraceable", "s.w.data = s.w * 0.5; return s.bn(F.conv2d(x, s.w))"),
    "late": ("Unreadable", "y = F.conv2d(x, s.k if s.k is not None else s.w); s.k = s.w * 2; return s.bn(y)"),
    "first": ("Unreadable", "s.k = s.w * 2 if s.k is None else s.k * 0.5; return s.bn(F.conv2d(x, s.k))"),
    "both": ("Untraceable", "s.w.data = s.w * s.s; s.a.weight.data = s.w * 1.0; return s.bn(s.a(x))"),
    "chain": ("Untraceable",
        "s.a.weight.data = s.w * 3; s.b.weight.data = s.a.weight * 2; return s.bn(s.b(x)) + s.a(x).relu()"),
    "shared": ("", "return s.bn(F.conv2d(x, s.a.weight)) + s.a(x).relu()"),
    "view": ("Untraceable", "s.a.weight.data.mul_(0.5); return s.bn(s.a(x))"),
}  # fmt: skip


def ordered(how):
    """A module whose forward is a line of text."""
    scope = {"F": torch.nn.functional}
    exec(f"def forward(s, x):\n    {ORDERS[how][1]}", scope)

    class Ordered(nn.Module):
        forward = scope["forward"]

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
            self.w, self.s, self.bn = (
                nn.Parameter(torch.randn(4, 4, 1, 1)),
                nn.Parameter(torch.rand(1)),
                nn.BatchNorm2d(4),
            )
            self.k = None

    torch.manual_seed(0)
    return settled(Ordered())


@pytest.mark.parametrize("how", ORDERS)
def test_what_a_forward_does_at_its_next_call_stays(how):
    for inplace in (False, True):
        model, twin = ordered(how), ordered(how)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        refused, _ = ORDERS[how]
        deploy = says(structrep.plan(model), int(not refused), refused).reparameterize(inplace=inplace)
        if not inplace:
            assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
        for _ in range(3):
            assert relative_error(deploy(x), twin(x)) < EXACT
