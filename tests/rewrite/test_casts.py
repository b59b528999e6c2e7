"""Deploy models that are cast or moved after they were converted, and forwards that ask for a dtype."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.rewrite.asking import X, both, converted, differs, made
from tests.support.models import settled
from tests.support.truth import EXACT, relative_error

# --- dtypes and devices ---------------------------------------------------------------------------------------------

CASTS = {
    "parameter": lambda self, x: self.h((self.n(self.a(x)) + self.b(x)).relu().to(self.h.weight.dtype)),
    "merged": lambda self, x: self.h((self.n(self.a(x)) + self.b(x)).relu().to(self.a.weight.dtype)),
    "norm": lambda self, x: self.h((self.n(self.a(x)) + self.b(x)).relu().to(self.n.running_mean.dtype)),
    "next": lambda self, x: self.h((self.n(self.a(x)) + self.b(x)).relu().to(dtype=next(self.h.parameters()).dtype)),
    "by a name": lambda self, x: (lambda dtype: self.h((self.n(self.a(x)) + self.b(x)).relu().to(dtype)))(
        self.h.weight.dtype
    ),
    "kernel": lambda self, x: self.h(
        (self.n(self.a(x)) + self.b(x)) * torch.ones(4, 1, 1, dtype=self.h.weight.dtype, device=self.h.weight.device)
    ),
    "computed": lambda self, x: self.h((self.n(self.a(x)) + self.b(x)).relu().to(self.h.weight.flatten(1).t().dtype)),
    "arange": lambda self, x: self.h(
        (self.n(self.a(x)) + self.b(x)) * torch.arange(4, dtype=self.h.bias.dtype).view(4, 1, 1)
    ),
    "and back": lambda self, x: self.h(
        (self.n(self.a(x)) + self.b(x)).relu().to(torch.float32).to(self.h.weight.dtype)
    ),
    "device": lambda self, x: self.h((self.n(self.a(x)) + self.b(x)).relu().to(self.h.weight.device)),
    "both": lambda self, x: self.h(
        (self.n(self.a(x)) + self.b(x)).relu().to(device=self.h.weight.device, dtype=self.h.weight.dtype)
    ),
    "zeros": lambda self, x: self.h(
        (self.n(self.a(x)) + self.b(x)) + torch.zeros(x.shape[0], 4, 1, 1, dtype=self.h.weight.dtype)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("forward", CASTS.values(), ids=CASTS)
def test_cast_after_it_was_converted(forward, dtype):
    model, deploy = converted(forward)
    assert differs(model.to(dtype), deploy.to(dtype), X.to(dtype)) is None
    assert deploy(X.to(dtype)).dtype == dtype


@pytest.mark.parametrize("forward", [CASTS[name] for name in ("parameter", "merged", "kernel", "device", "both")])
def test_moved_after_it_was_converted(forward):
    _, deploy = converted(forward)
    assert deploy.to("meta")(X.to("meta")).device.type == "meta"


def test_an_attribute_that_is_a_dtype():
    model, deploy = converted(
        lambda self, x: self.h((self.n(self.a(x)) + self.b(x)).relu().to(self.kept_dtype).double())
    )
    model.kept_dtype = deploy.kept_dtype = torch.float16
    truth, found = model(X), deploy(X)
    assert relative_error(found, truth) < 5e-3
    assert relative_error(truth, made(CASTS["device"])(X)) > 1e-6


def test_a_condition_on_a_dtype():
    model, deploy = converted(
        lambda self, x: (self.n(self.a(x)) + self.b(x)) * (2 if self.h.weight.dtype == torch.bfloat16 else 1)
    )
    assert differs(model.float(), deploy.float(), X.float()) is not None  # told of one dtype, for which alone it holds
    forward = lambda self, x: (self.n(self.a(x)) + self.b(x)) * (2 if x.dtype == torch.float16 else 1)  # noqa: E731
    model, deploy = converted(forward)
    assert differs(model, deploy, X) is None
    assert differs(model.half(), deploy.half(), X.half()) is None

    def inner(self, x):
        y = self.n(self.a(x)) + self.b(x)
        return y * (2 if y.dtype == torch.float16 else 1)

    model, deploy = converted(inner)
    assert differs(model.half(), deploy.half(), X.half()) is None


OTHERS = {
    "mask": lambda x: x > 0,
    "part of a mask": lambda x: ((x > 0) & (x < 1)).split(1, 1)[0],
    "place": lambda x: x.argmax(1),
    "place beside a value": lambda x: x.max(1)[1],
    "cast": lambda x: x.long(),
    "bits": lambda x: x.view(torch.int64),
    "places": lambda x: torch.arange(x.shape[1], device=x.device),
    "mask in general": lambda x: torch.ones(x.shape[0], dtype=torch.bool),
    "count": lambda x: (x > 0).sum(),
    "of another": lambda x: torch.zeros_like(x, dtype=torch.int32),
}
OWN = {
    "input": lambda x: x,
    "masked": lambda x: x * (x > 0),
    "mean": lambda x: x.pow(2).mean(1, keepdim=True).rsqrt(),
    "largest": lambda x: x.max(1)[0],
    "product": lambda x: x @ x.transpose(2, 3),
    "part": lambda x: x.chunk(2, 1)[1],
    "new": lambda x: x.new_zeros(3),
}


@pytest.mark.parametrize("cast", [lambda y, m: y.to(m.dtype), lambda y, m: y.type_as(m)])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_cast_to_what_is_not_of_the_dtype_of_the_model(other, cast):
    """A value that is cut off to whole numbers is merged across nowhere."""
    model = made(lambda self, x: self.n(cast(self.a(x), other(x)).to(self.h.weight.dtype)))
    assert not structrep.plan(model).merges
    assert torch.equal(structrep.reparameterize(model)(X), model(X))


@pytest.mark.parametrize("cast", [lambda y, m: y.to(m.dtype), lambda y, m: y.type_as(m)])
@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_a_cast_to_what_is_of_the_dtype_of_the_model(own, cast):
    converted(lambda self, x: self.n(cast(self.a(x), own(x))))


def test_a_condition_on_the_dtype_of_a_mask():
    forward = lambda self, x: both(self, x) * (2 if (x > 0).dtype == torch.bool else 1)  # noqa: E731
    model, deploy = converted(forward)
    assert differs(model, deploy, X) is None


def test_the_default_dtype():
    forward = lambda self, x: both(self, x) * torch.ones(4, 1, 1, dtype=torch.get_default_dtype())  # noqa: E731
    model, deploy = converted(forward)
    try:
        torch.set_default_dtype(torch.float64)
        assert differs(model, deploy, X) is None
    finally:
        torch.set_default_dtype(torch.float32)


def test_in_place_or_not_is_no_matter():
    model, deploy = converted(lambda self, x: F.relu(self.n(self.a(x)) + self.b(x), inplace=self.inplace))
    model.inplace = deploy.inplace = True
    assert differs(model, deploy, X) is None

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.g, self.inplace = nn.Parameter(torch.rand(4, 1, 1)), False

        def forward(self, x):
            return x.mul_(self.g) if self.inplace else x * self.g

    model = settled(nn.Sequential(nn.Conv2d(4, 4, 1), Scale()))
    plan = structrep.plan(model)
    assert len(plan.merges) == 1
    deploy = plan.apply()
    model[1].inplace = deploy[1].inplace = True
    assert relative_error(deploy(X), model(X)) < EXACT


class Placed(nn.Module):
    """Branches that are cast to where a buffer is that stays, and to its dtype."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.register_buffer("place", torch.zeros(0))

    def forward(self, x):
        y = self.a(x.to(self.place.device, self.place.dtype)) + self.b(x)
        return F.relu(y)


class PlacedInALine(Placed):
    def forward(self, x): return F.relu(self.a(x.to(self.place.device)) + self.b(x))  # fmt: skip


@pytest.mark.parametrize("kind", [Placed, PlacedInALine])
def test_a_buffer_beside_what_is_merged_is_cast_and_moved_with_it(kind):
    model = settled(kind()).float()
    deploy = structrep.reparameterize(model, X.float())
    assert deploy.bfloat16()(X.bfloat16()).dtype == torch.bfloat16
    assert deploy.to("meta")(X.bfloat16().to("meta")).device == torch.device("meta")
    if kind is Placed:
        deploy.place = torch.zeros(0)
        with pytest.raises(ValueError, match=r"self\.place\.device and"):
            deploy(X.bfloat16().to("meta"))
