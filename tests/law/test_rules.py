"""Every rule of the registry, by its own example."""

import pytest
import torch
from torch import nn

import structrep
from structrep import Rule
from structrep.registry import default
from structrep.testing import check_rule, overlaps
from tests.support.models import example_input, settled
from tests.support.truth import CLOSE, relative_error

FAMILIES = [rule for rule in default if not rule.law]
every_rule = pytest.mark.parametrize("rule", FAMILIES, ids=lambda rule: rule.name)


@every_rule
def test_it_conforms(rule: Rule) -> None:
    """Alone, and with all that is asked of rules that users write."""
    assert len(check_rule(rule)) >= 6


@every_rule
def test_its_example_becomes_one_plain_layer_under_its_name(rule: Rule) -> None:
    """Among all rules, and in any dtype: what a block computes from its weights, a border say, is rounded in its dtype,
    and in float64 it is not."""
    assert rule.example is not None
    for dtype in (torch.float32, torch.bfloat16):
        model = settled(nn.Sequential(rule.example())).to(dtype)
        plan = structrep.plan(model)
        assert [(merge.rules, merge.sources) for merge in plan.merges] == [((rule.name,), (rule.source,))]
        plan.prove()
        assert len(plan.merges) == 1
        truth = settled(nn.Sequential(rule.example())).double()
        truth.load_state_dict(model.state_dict())
        deploy = structrep.reparameterize(truth)
        (layer,) = (module for module in deploy.modules() if list(module.parameters(recurse=False)))
        assert type(layer) in (nn.Conv2d, nn.Linear)
        assert relative_error(deploy(x := example_input(rule, truth)), truth(x)) < CLOSE
        exact, rounded = deploy.state_dict(), plan.apply().state_dict()
        assert rounded.keys() == exact.keys()
        for name, value in rounded.items():
            assert value.dtype == dtype
            assert relative_error(value.double(), exact[name]) < 2 * torch.finfo(dtype).eps


def test_of_rules_that_overlap_the_narrower_says_so_and_is_credited() -> None:
    found = overlaps(default)
    assert {("dbb", "dyrep"), ("conv_lora", "doconv")} <= {(one.rule, one.other) for one in found}
    assert not [one for one in found if not one.rule == one.credited == one.narrower]


def test_families_come_before_laws() -> None:
    laws = [rule.law for rule in default]
    assert laws == sorted(laws)
    assert {"repvgg", "acb", "diracnet", "doconv", "expandnet"} <= {rule.name for rule in default if not rule.law}
