"""What a plan lists is done, or the caller hears of it, at the line that called; the plan stays as it is."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from structrep.errors import BadInput, Unmerged
from structrep.integrations.shared import merge
from structrep.read.modules import _MODULES
from tests.support.models import settled
from tests.support.truth import EXACT, relative_error

X = torch.randn(2, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x):
        return 2 * F.conv2d(x, self.weight)


@pytest.fixture
def forgetful(monkeypatch):
    """A reader that forgets a factor of 2."""
    monkeypatch.setattr("structrep.read.modules._MODULES", dict(_MODULES))
    structrep.reader(Doubling)(lambda module: structrep.ConvMap(module.weight))


def net():
    return settled(
        nn.Sequential(Doubling(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    )


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("inplace", [False, True])
def test_a_wrong_reader_is_reported_and_the_rest_is_merged(inplace):
    for example in (None, X):
        model = net()
        truth = model(X)
        with pytest.warns(structrep.MergeDropped) as told:
            deploy = structrep.reparameterize(model, example, inplace=inplace)
        assert [one.filename for one in told] == [__file__]
        assert str(told[0].message).startswith("0 (fold_norm) is not merged, as planned: on an input of shape")
        assert relative_error(deploy(X), truth) < EXACT
        assert [type(part) for part in deploy[:2]] == [Doubling, nn.BatchNorm2d]
        assert isinstance(deploy[4], nn.Identity)


@pytest.mark.usefixtures("forgetful")
def test_a_plan_stays_as_it_is():
    plan = structrep.plan(net(), X)
    before = (repr(plan), plan.record)
    with pytest.warns(structrep.MergeDropped):
        plan.reparameterize(X)
    assert (repr(plan), plan.record) == before
    with pytest.warns(structrep.MergeDropped):
        left = plan.proved()
    assert (len(left.merges), [refusal.where for refusal in left.refusals]) == (1, ["0"])
    assert left.refusals[0].layers == ("1",)
    assert (repr(plan), plan.record) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left.reparameterize(X)  # which was told already
    plan.prove()
    assert plan.record == left.record


@pytest.mark.usefixtures("forgetful")
def test_a_plan_that_was_applied_in_place_is_done():
    plan = structrep.plan(net(), X)
    with pytest.warns(structrep.MergeDropped):
        plan.reparameterize(X, inplace=True)
    with pytest.raises(structrep.StructrepError, match="applied in place already"):
        plan.apply()


@pytest.mark.usefixtures("forgetful")
def test_what_is_never_merged_is_not_left_to_merge():
    with pytest.warns(structrep.MergeDropped):
        deploy = structrep.reparameterize(net(), X)
    structrep.assert_merged(deploy, X)
    with pytest.raises(Unmerged):
        structrep.assert_merged(net(), X)


@pytest.mark.usefixtures("forgetful")
def test_a_trainer_hears_that_nothing_would_be_merged():
    model = settled(nn.Sequential(Doubling(), nn.BatchNorm2d(4)))
    with pytest.warns(structrep.MergeDropped), pytest.raises(BadInput, match="there is nothing to merge in Sequential"):
        merge(model, norms="fold")


def test_that_there_is_nothing_to_merge_is_said():
    with pytest.warns(structrep.NothingMerged, match="there is nothing to merge in Sequential") as told:
        deploy = structrep.reparameterize(nn.Sequential(nn.ReLU()))
    assert [one.filename for one in told] == [__file__]
    assert isinstance(deploy[0], nn.ReLU)
    with pytest.warns(structrep.NothingMerged, match="there is no convolution or Linear beside it"):
        structrep.reparameterize(settled(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))))


def test_of_a_deploy_model_it_is_not():
    for inplace in (False, True):
        model = settled(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            deploy = structrep.reparameterize(model, inplace=inplace)
            structrep.reparameterize(structrep.reparameterize(deploy, X))
