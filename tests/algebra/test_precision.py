"""What the caller has set changes no number, and is as it was afterwards."""

import pytest
import torch
from torch import nn

import structrep
from structrep.algebra import precision
from structrep.registry import default
from tests.support.models import example_input, settled

COMPUTED = ["dbb", "diracnet", "doconv", "orepa", "expandnet_computed"]
MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn


def test_tf32_is_off_within_and_as_it_was_after() -> None:
    before = MATMUL.allow_tf32, CUDNN.allow_tf32
    with precision.whole():
        assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == (False, False)
    with precision.whole(tf32=True):
        assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == (True, True)
    assert before == (MATMUL.allow_tf32, CUDNN.allow_tf32)


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_the_precision_of_products_is_as_it_was_after(setting: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        with precision.whole():
            assert not MATMUL.allow_tf32
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)


def test_flags_that_may_no_more_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever imports `torch.testing._internal` has called `torch.backends.disable_global_flags()`, for good."""
    monkeypatch.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", False)
    before = MATMUL.allow_tf32, CUDNN.allow_tf32
    with precision.whole(tf32=True):
        assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == (True, True)
        assert torch.backends.flags_frozen()
    assert before == (MATMUL.allow_tf32, CUDNN.allow_tf32)


@pytest.mark.skipif(not hasattr(CUDNN, "conv"), reason="this torch has the old settings alone")
@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_settings_that_torch_does_not_let_be_read_the_old_way(setting: str) -> None:
    """A verification read `allow_tf32`, which raises once `fp32_precision` was set."""
    owners = (MATMUL, CUDNN.conv, CUDNN.rnn)
    before = [one.fp32_precision for one in owners]
    try:
        for one in owners:
            one.fp32_precision = setting
        with precision.whole():
            assert {one.fp32_precision for one in owners} == {"ieee"}
        assert {one.fp32_precision for one in owners} == {setting}
        model = settled(nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)))
        structrep.reparameterize(model, torch.randn(1, 2, 5, 5, dtype=torch.float64))
    finally:
        for one, value in zip(owners, before, strict=True):
            one.fp32_precision = value


@pytest.mark.skipif(not hasattr(CUDNN, "conv"), reason="this torch has the old settings alone")
@pytest.mark.parametrize("setting", ["bf16", "tf32", "ieee"])
def test_settings_of_the_cpu(setting: str) -> None:
    """A plan read the precision of products, which raises once that of the CPU's alone was set."""
    owner = torch.backends.mkldnn.matmul
    before = owner.fp32_precision
    try:
        owner.fp32_precision = setting
        assert structrep.plan(settled(nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)))).merges
        assert owner.fp32_precision == setting
    finally:
        owner.fp32_precision = before


@pytest.mark.parametrize("name", COMPUTED)
def test_autocast_changes_nothing(name: str) -> None:
    model = settled(nn.Sequential(default[name].example())).float()
    x = example_input(default[name], model).float()
    expected = structrep.reparameterize(model, x).state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        found = structrep.reparameterize(model, x).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
