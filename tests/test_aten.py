"""Models that are graphs already: exported programs, whose code calls ATen operators, and what torch.fx has traced."""

import copy
import io
import warnings

import pytest
import timm
import torch
from torch import fx, nn

import structrep
from structrep.registry import default
from tests.models import example_input, relative_error, settled

FAMILIES = [rule for rule in default if not rule.law]


def exported(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()


@pytest.mark.parametrize("rule", FAMILIES, ids=lambda rule: rule.name)
def test_an_exported_block_merges_as_it_did(rule):
    model = settled(nn.Sequential(rule.example()))
    x = example_input(rule, model)
    if rule.name == "repmlp":
        pytest.skip("its pieces are permuted by sizes that an exported program computes")
    graph = exported(model, x)
    plan = structrep.plan(graph, x)
    # of a computed kernel only the arithmetic is left, not the torch functions that tell its family
    assert [merge.rules for merge in plan.merges] in ([(rule.name,)], [("constant_kernel",)])
    assert relative_error(plan.reparameterize(x)(x), model(x)) < 1e-12


@pytest.mark.parametrize("name", ["repvgg_a0", "fastvit_t8", "test_resnet", "test_vit"])
@pytest.mark.parametrize("how", ["exported", "traced"])
def test_graphs_stay_graphs(name, how):
    model = settled(timm.create_model(name)).float()
    x = torch.randn(2, 3, 160, 160) if name == "test_vit" else torch.randn(2, 3, 64, 64)
    try:
        graph = exported(model, x) if how == "exported" else fx.symbolic_trace(model)
    except Exception:
        pytest.skip("torch itself makes no graph of it")
    plan = structrep.plan(graph, x)
    assert abs(len(plan.merges) - len(structrep.plan(model, x).merges)) <= 1
    deploy = plan.apply()
    with torch.no_grad():
        expected = model(x)
        assert relative_error(deploy(x), expected) < 1e-4
        assert relative_error(copy.deepcopy(deploy)(x), expected) < 1e-4
        assert isinstance(deploy, fx.GraphModule)
        assert relative_error(fx.Interpreter(deploy).run(x), expected) < 1e-4
        if how == "traced":  # torch pickles no exported module
            file = io.BytesIO()
            torch.save(deploy, file)
            file.seek(0)
            assert relative_error(torch.load(file, weights_only=False)(x), expected) < 1e-4
    assert not structrep.plan(deploy, x).merges
