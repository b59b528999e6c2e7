"""What a model has to be to be planned: in eval mode, its parameters made; else an error says what to do."""

import functools

import pytest
from torch import nn

import structrep
from structrep import errors
from structrep.errors import TrainingMode
from tests.support.models import Written, bn, conv, noise, randomised
from tests.support.truth import call, check, executed, fingerprint, says

X = noise(2, 4, 5, 6)


@pytest.mark.parametrize("what", ["whole", "one norm", "sync"])
def test_training_mode_is_an_error_that_names_the_norm(what):
    model = randomised(
        nn.Sequential(conv(), nn.Sequential(nn.ReLU(), nn.SyncBatchNorm(4) if what == "sync" else bn(4)))
    )
    if what == "whole":
        model.train()
    else:
        model[1][1].train()
    before = fingerprint(model)
    for convert in (
        structrep.plan,
        structrep.reparameterize,
        functools.partial(structrep.reparameterize, inplace=True),
    ):
        with pytest.raises(errors.TrainingMode, match=r"1\.1 .*BatchNorm.*model\.eval\(\)"):
            convert(model)
    assert fingerprint(model) == before


def test_forwards_in_training_mode_are_told_of():
    model = nn.Sequential(nn.BatchNorm2d(4))
    with pytest.raises(TrainingMode, match=r"call model.eval\(\) first$"):
        structrep.plan(model)
    for _ in range(3):
        model(X.float())
    with pytest.raises(
        TrainingMode, match=r"0\.num_batches_tracked has counted 3: if these were not all of its training"
    ):
        structrep.plan(model)
    model[0].num_batches_tracked = None
    with pytest.raises(TrainingMode, match=r"call model.eval\(\) first$"):
        structrep.plan(model)


def test_dropout_left_in_training_mode_stays():
    model = randomised(Written(lambda m, x: m.d(m.o(m.c(x))), c=conv(k=1), o=nn.Dropout(0.5), d=conv(k=1)))
    model.o.train()
    deploy = says(structrep.plan(model), 0).reparameterize()
    assert executed(deploy, X)["conv"] == 2
    assert deploy.o.training


@pytest.mark.parametrize(
    ("make", "merges"),
    [(lambda: nn.LazyConv2d(4, 3), 0), (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()), 1)],
)
def test_lazy_modules(make, merges):
    model = make().eval()
    with pytest.raises(errors.Uninitialized, match="run the model once"):
        structrep.reparameterize(model)
    with pytest.raises(errors.Uninitialized):
        structrep.plan(model, X)
    call(model, X.float())
    check(model, X, merges=merges)
