"""Questions about an input whose answers nothing fixes: another one gets what the model gives it, or an error."""

import copy

import pytest
import torch
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import CLOSE, relative_error

X = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.size = (6, 6)


def net(forward):
    return settled(type("Asks", (Net,), {"forward": forward})())


def of_sizes(self, x):
    y = self.a(x)
    if x.shape[-2:] == self.size:
        return y
    return self.n(y)


def of_all_sizes(self, x):
    y = self.a(x)
    if x.shape != (2, 4, 6, 6):
        y = self.n(y)
    return torch.relu(y)


def of_a_torch_size(self, x):
    y = self.a(x)
    return y if torch.Size((6, 6)) == x.size()[2:] else self.n(y)


def within_a_branch(self, x):
    y = self.b(x)
    return self.n(self.a(x * (3 if x.shape == (2, 4, 6, 6) else 1))) + y


def of_gradients(self, x):
    y = self.a(x)
    return y if x.requires_grad else self.n(y)


def of_gradients_in_a_loop(self, x):
    y = self.a(x)
    while not x.requires_grad:
        return self.n(y)
    return y


def of_keys(self, x):
    y = self.a(x)
    return self.n(y) if hasattr(x, "keys") else y


def of_calls(self, x):
    y = self.a(x)
    return self.n(y) if callable(x) else y


def of_a_layout(self, x):
    y = self.a(x)
    return y if x.layout is torch.strided else self.n(y)


def of_a_device(self, x):
    y = self.a(x)
    return y if x.device.index is None else self.n(y)


def of_a_view(self, x):
    y = self.a(x)
    return y if x._base is None else self.n(y)


def of_a_name(self, x):
    y = self.a(x)
    return y if x.name is None else self.n(y)


ASKED = (of_sizes, of_all_sizes, of_a_torch_size, within_a_branch, of_gradients, of_gradients_in_a_loop, of_keys,
         of_calls, of_a_layout, of_a_device, of_a_view, of_a_name)  # fmt: skip


@pytest.mark.parametrize("asked", ASKED)
def test_another_input_is_asked_again(asked):
    for example in ((), (X,)):
        torch.manual_seed(0)
        model = net(asked)
        deploy = structrep.plan(model, *example).apply()
        larger = torch.cat((X, X), -1)
        for x in (X, larger, X.clone().requires_grad_(), larger[..., :6]):
            told = ""
            try:
                assert relative_error(deploy(x), model(x)) < CLOSE
            except AssertionError as error:
                told = str(error)
            assert not told or (example and "reparameterized for" in told)


def of_a_dtype(self, x):
    y = self.n(self.a(x)) + self.b(x)
    if x.dtype == torch.float64:
        y = y * 2
    return y


def of_a_value_s_dtype(self, x):
    y = self.n(self.a(x)) + self.b(x)
    if y.dtype != torch.float32:
        y = y * 2
    return y


def of_some_dtypes(self, x):
    return self.n(self.a(x * (3 if x.dtype in (torch.half, torch.float64) else 1))) + self.b(x)


@pytest.mark.parametrize("asked", [of_a_dtype, of_a_value_s_dtype, of_some_dtypes])
def test_a_dtype_that_vanishing_text_goes_by_is_asked_again(asked):
    for example in ((), (X,)):
        torch.manual_seed(0)
        model = net(asked)
        plan = structrep.plan(model, *example)
        assert len(plan.merges) == 1
        deploy = plan.apply()
        assert relative_error(deploy(X), model(X)) < CLOSE
        with pytest.raises(AssertionError, match="reparameterized for an input of another dtype"):
            copy.deepcopy(deploy).float()(X.float())


def least(self, x):
    y = self.n(self.a(x)) + self.b(x)
    return y.masked_fill(x > 0, torch.finfo(y.dtype).min)


def least_whole(self, x):
    return (self.n(self.a(x)) + self.b(x)) * torch.iinfo(torch.int8).max + torch.finfo(x.dtype).eps


def of_a_number(self, x):
    return (self.n(self.a(x)) + self.b(x)) / torch.sqrt(torch.tensor(x.shape[1]))


@pytest.mark.parametrize("asked", [least, least_whole, of_a_number])
def test_limits_of_a_dtype_and_tensors_of_sizes_are_followed(asked):
    for example in ((), (X,)):
        torch.manual_seed(0)
        model = net(asked)
        plan = structrep.plan(model, *example)
        assert len(plan.merges) == 1
        deploy = plan.apply()
        assert torch.allclose(deploy(X), model(X), rtol=1e-12, atol=1e-12)
        half, truth = copy.deepcopy(deploy).float(), copy.deepcopy(model).float()
        assert torch.allclose(half(X.float()), truth(X.float()), rtol=1e-4, atol=1e-4)  # float32's own limits
