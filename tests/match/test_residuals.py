"""Residuals carried through activations, where the user asks for it (RMNet)."""

import pytest
import torch
import torchvision
from torch import nn

import structrep
from structrep.errors import BadInput
from tests.support.models import settled
from tests.support.truth import EXACT, relative_error

X = torch.randn(2, 4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("block", [torchvision.models.resnet.BasicBlock, torchvision.models.resnet.Bottleneck])
def test_a_resnet_becomes_plain(block):
    model = settled(torchvision.models.ResNet(block, [1, 2, 1, 1], num_classes=3))
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    deploy = structrep.reparameterize(model, x, reserve="layer*")
    assert type(deploy.layer1[0]).__mro__[1] is type(model.layer1[0])
    assert relative_error(deploy(x), model(x)) < EXACT
    assert all(block.downsample is None for block in (deploy.layer2[0], deploy.layer3[0]))
    graph = torch.fx.symbolic_trace(deploy).graph
    assert not [n for n in graph.nodes if "add" in str(n.target)]
    assert not structrep.plan(deploy, reserve="layer*").merges


class Block(nn.Module):
    """relu(x + conv(relu(conv(x)))), in several ways."""

    def __init__(self, how="", act=nn.ReLU):
        super().__init__()
        self.how, self.act = how, act()
        groups = 2 if how == "grouped" else 1
        self.a, self.n = nn.Conv2d(4, 6, 3, padding=1, groups=groups), nn.BatchNorm2d(6)
        self.b, self.m = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.gate = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        if self.how != "any sign":
            x = self.act(x)
        y = self.act(self.n(self.a(x)))
        if self.how == "gated":
            y = y * torch.sigmoid(self.gate(y))
        if self.how == "kept":
            self.seen = y
        y = self.m(self.b(y))
        if self.how == "in place":
            y += x
            return y.relu_()
        z = x + y
        return self.act(z) + y.mean() if self.how == "used" else self.act(z)


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, lambda: nn.ReLU(inplace=True)])
@pytest.mark.parametrize("how", ["", "in place"])
def test_a_block_becomes_plain(how, act):
    for inplace in (False, True):
        model = settled(nn.Sequential(Block(how, act), nn.Conv2d(4, 2, 1)))
        truth = model(X.clone())
        assert {merge.rules for merge in structrep.plan(model).merges} == {("fold_norm",)}, "unless it is asked for"
        plan = structrep.plan(model, reserve="0")
        assert [merge.rules for merge in plan.merges] == [("fold_norm", "rmnet"), ("fold_norm", "rmnet")]
        assert plan.merges[0].multiply_adds[1] > plan.merges[0].multiply_adds[0]
        assert plan.verify(X.float()).ok
        deploy = structrep.reparameterize(model, reserve="0", inplace=inplace)
        assert relative_error(deploy(X.clone()), truth) < EXACT
        assert (deploy[0].a.out_channels, deploy[0].b.in_channels) == (10, 10)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Block("any sign"), "one's own output"),
        (Block("grouped"), "one group"),
        (Block("gated"), "activation"),
        (Block("used"), "used elsewhere"),
        (Block("kept"), "used elsewhere"),
        (Block("", nn.GELU), "activation"),
    ],
)
def test_a_residual_that_cannot_be_carried_stays(model, reason):
    model = settled(nn.Sequential(model))
    plan = structrep.plan(model, reserve="*")
    assert any(reason in refusal.reason for refusal in plan.refusals if refusal.rule == "rmnet")
    deploy = plan.apply()
    assert relative_error(deploy(X), model(X)) < EXACT
    assert deploy[0].a.out_channels == 6


def test_a_linear_bottleneck_is_refused():
    model = settled(torchvision.models.mobilenet_v2(num_classes=2))
    told = [r for r in structrep.plan(model, reserve="features*").refusals if r.rule == "rmnet"]
    assert len(told) == 10
    assert {refusal.kind for refusal in told} <= {"Incompatible", "Unreadable"}


def test_a_name_that_is_none():
    with pytest.raises(BadInput, match="no module named 'layer9"):
        structrep.plan(nn.Sequential(nn.ReLU()), reserve="layer9*")


WRITES = {
    "early": "x = x.relu(); x.sub_(1); return (s.b(s.a(x).relu()) + x).relu()",
    "late": "x = x.relu(); y = s.b(s.a(x).relu()); x.sub_(3); return (y + x).relu()",
    "item": "x = x.relu(); x[:, 0] = -1; return (s.b(s.a(x).relu()) + x).relu()",
    "into": "x = x.relu(); x += s.b(s.a(x).relu()); return x.relu()",
    "scaled": "x = x.relu(); return (s.b(s.a(x).relu()) + 0.5 * x).relu()",
}


@pytest.mark.parametrize("how", WRITES)
def test_what_is_carried_is_as_the_activation_left_it(how):
    scope = {}
    exec(f"def forward(s, x):\n    {WRITES[how]}", scope)

    class Written(nn.Module):
        forward = scope["forward"]

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    model = settled(nn.Sequential(Written()))
    deploy = structrep.reparameterize(model, reserve="0")
    assert relative_error(deploy(X), model(X)) < EXACT
    assert (deploy[0].a.out_channels == 8) == (how == "scaled")
