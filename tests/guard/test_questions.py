"""Layers that a forward asks about stay: a merge would change the answer."""

import pytest
from torch import nn

from tests.support.models import noise
from tests.support.truth import SAME, check

X = noise(1, 4, 3, 3)


class AsksItsLayers(nn.Module):
    """Forwards that go by what their layers are, which a merge changes."""

    def __init__(self, question):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.question = question

    def forward(self, x):
        x = self.norm(self.conv(x))
        return x.relu() if self._holds() else x

    def _holds(self):
        if self.question == "bias":
            return self.conv.bias is None
        if self.question == "type":
            return isinstance(self.norm, nn.BatchNorm2d)
        return self.norm.eps > 0


@pytest.mark.parametrize("question", ["bias", "type", "eps"])
def test_layers_that_a_forward_asks_about_stay(question):
    check(AsksItsLayers(question), X, merges=0, refused="Shared", within=SAME)


class Asking(nn.Module):
    """Forwards that go by what a layer is, each asking in another way; a merge would change the answer."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.layers = nn.ModuleList([self.conv])
        self.how = how

    @property
    def bare(self):
        return self.conv.bias is None

    def helper(self, layer):
        return layer.bias is None

    def forward(self, x):
        y = self.norm(self.conv(x))
        return y.relu() if getattr(self, f"by_{self.how}")() else y

    def by_alias(self):
        conv = self.conv
        return conv.bias is None

    def by_property(self):
        return self.bare

    def by_children(self):
        return any(isinstance(m, nn.BatchNorm2d) for m in self.children())

    def by_parameters(self):
        return len(list(self.conv.parameters())) == 1

    def by_helper(self):
        return self.helper(self.conv)

    def by_getattr(self):
        return getattr(self, "conv").bias is None  # noqa: B009

    def by_match(self):
        match self.norm:
            case nn.BatchNorm2d():
                return True
        return False


@pytest.mark.parametrize("how", ["alias", "property", "children", "parameters", "helper", "getattr", "match"])
def test_questions_asked_in_passing(how):
    check(Asking(how), X, merges=0, refused="Shared", within=SAME)
