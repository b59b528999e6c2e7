"""Values that look at the same memory, and are written to: through every kind of view, before and after what a merge
reads. What merges and what is refused is said of each."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import structrep
from tests.models import relative_error, settled

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Written(nn.Module):
    """A batch norm and a 1x1 convolution, which would merge; `between` runs after the norm, on its input."""

    def __init__(self, between, after=None):
        super().__init__()
        self.a, self.n, self.b, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)
        self.register_buffer("scale", torch.rand(4, 1, 1) + 0.5)
        self.between, self.after = between, after

    def forward(self, x):
        x = torch.tanh(self.a(x))
        y = self.n(x)
        self.between(self, x)
        y = self.b(y)
        if self.after is not None:
            self.after(self, x)
        return y


def check(model, merges, x=X, example=False):
    """Convert; the deploy model is the model, and merges what is said."""
    model = settled(model).double()
    plan = structrep.plan(model, x if example else None)
    found = sum(len(merge.rules) for merge in plan.merges)
    deploy = plan.reparameterize()
    for _ in range(2):  # a forward may write to what it finds at the next call
        ours, truth = x.clone(), x.clone()
        with torch.no_grad():
            assert relative_error(deploy(ours), model(truth)) < 1e-12
        assert torch.equal(ours, truth)
    assert found == merges, plan
    return plan


@fx.wrap
def library_function(x):
    return x


ALIASES = {
    "itself": lambda m, x: x,
    "positive": lambda m, x: x.positive(),
    "+x": lambda m, x: +x,
    "torch.positive": lambda m, x: torch.positive(x),
    "mT": lambda m, x: x.mT,
    "real": lambda m, x: x.real,
    "data": lambda m, x: x.data,
    "detach": lambda m, x: x.detach(),
    "view": lambda m, x: x.view(2, 4, 36),
    "as_strided": lambda m, x: x.as_strided((2, 2), (2, 1)),
    "transpose": lambda m, x: torch.transpose(x, 1, 2),
    "swapdims": lambda m, x: x.swapdims(1, 2),
    "movedim": lambda m, x: torch.movedim(x, 1, 2),
    "unflatten": lambda m, x: x.unflatten(1, (2, 2)),
    "flatten": lambda m, x: x.flatten(1),
    "ravel": lambda m, x: x.ravel(),
    "narrow": lambda m, x: x.narrow(1, 0, 2),
    "select": lambda m, x: x.select(1, 0),
    "diagonal": lambda m, x: torch.diagonal(x),
    "linalg.diagonal": lambda m, x: torch.linalg.diagonal(x),
    "unfold": lambda m, x: x.unfold(2, 2, 1),
    "expand_as": lambda m, x: x.expand_as(x),
    "view_as": lambda m, x: x.view_as(x),
    "squeeze": lambda m, x: torch.squeeze(x),
    "index": lambda m, x: x[:, 1:],
    "chunk": lambda m, x: x.chunk(2, 1)[1],
    "split": lambda m, x: torch.split(x, 2, 1)[0],
    "split_with_sizes": lambda m, x: torch.split_with_sizes(x, (1, 3), 1)[0],
    "hsplit": lambda m, x: x.hsplit(2)[0],
    "tensor_split": lambda m, x: x.tensor_split(2, 1)[0],
    "unbind": lambda m, x: x.unbind(1)[0],
    "of two tuples": lambda m, x: (x.chunk(2, 1) + x.chunk(2, 1))[1],
    "contiguous": lambda m, x: x.contiguous(),
    "to": lambda m, x: x.to(x.dtype),
    "type_as": lambda m, x: x.type_as(x),
    "double": lambda m, x: x.double(),
    "atleast_2d": lambda m, x: torch.atleast_2d(x),
    "broadcast_tensors": lambda m, x: torch.broadcast_tensors(x, x)[1],
    "as_tensor": lambda m, x: torch.as_tensor(x),
    "asarray": lambda m, x: torch.asarray(x),
    "dropout": lambda m, x: F.dropout(x, 0.5, False),
    "torch.dropout": lambda m, x: torch.dropout(x, 0.5, False),
    "feature_alpha_dropout": lambda m, x: F.feature_alpha_dropout(x, 0.5, False),
    "einsum": lambda m, x: torch.einsum("nchw->ncwh", x),
    "chain": lambda m, x: x.positive().mT.detach()[:, 3:],
    "F.relu in place": lambda m, x: F.relu(x, inplace=True),
    "by name": lambda m, x: F.relu(input=x, inplace=True),
    "a module by name": lambda m, x: m.act(input=x),
    "operator": lambda m, x: torch.ops.aten.alias(x),
    "unsafe": lambda m, x: torch.ops.aten._unsafe_view(x, (2, 4, 36)),
    "of somebody's": lambda m, x: library_function(x),
}  # fmt: skip

COPIES = {
    "clone": lambda m, x: x.clone(),
    "arithmetic": lambda m, x: x * 1.0,
    "zeros_like": lambda m, x: torch.zeros_like(x),
    "cat": lambda m, x: torch.cat([x]),
    "a convolution": lambda m, x: F.conv2d(x, torch.ones(1, 4, 1, 1, dtype=torch.float64)),
    "softmax": lambda m, x: torch.softmax(x, 1),
    "interpolate": lambda m, x: F.interpolate(x, scale_factor=2),
    "avg_pool": lambda m, x: F.avg_pool2d(x, 2),
    "repeat": lambda m, x: x.repeat(1, 1, 1, 1),
    "index_select": lambda m, x: x.index_select(1, torch.tensor([0, 1])),
    "a comparison": lambda m, x: ((x > 0) & (x < 1)).to(x.dtype),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIASES)
def test_what_is_written_through_an_alias(name):
    alias = ALIASES[name]
    # in `between` the norm has read its input, and a layer for both would not have
    check(Written(lambda m, x: alias(m, x).mul_(2)), 0)
    check(Written(lambda m, x: None, after=lambda m, x: alias(m, x).mul_(2)), 1 if "in place" not in name else 1)


@pytest.mark.parametrize("name", COPIES)
def test_what_is_written_to_a_copy(name):
    copied = COPIES[name]
    check(Written(lambda m, x: copied(m, x).mul_(2)), 1)
