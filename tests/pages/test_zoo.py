"""Models of other packages, as they come: random norms, full size, counted and compared with their float64 selves."""

import pytest
import timm
import torch
import torchvision
from torch import nn

import structrep
from tests.support.models import settled, small
from tests.support.truth import EXACT, relative_error


def count(model: nn.Module) -> tuple[int, int]:
    """Convolutions and batch norms."""
    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)
    convs, norms = (sum(isinstance(m, kind) for m in model.modules()) for kind in kinds)
    return convs, norms - sum(isinstance(m, kinds[1]) and m.running_mean is None for m in model.modules())


def additions(model: nn.Module) -> int:
    """Additions of two activations in a traced forward."""
    graph = torch.fx.symbolic_trace(model).graph
    names = ("add", "iadd", "add_")
    return sum(
        len(node.all_input_nodes) == 2 and getattr(node.target, "__name__", node.target) in names
        for node in graph.nodes
        if node.op in ("call_function", "call_method")
    )


@pytest.mark.parametrize(("name", "blocks"), [("repvgg_a0", 22), ("mobileone_s0", 43)])
def test_timm_models_of_the_families_are_left_with_one_conv_a_block(name: str, blocks: int) -> None:
    model = settled(timm.create_model(name))
    image = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    deploy = structrep.reparameterize(model)
    theirs = timm.utils.reparameterize_model(model)
    assert count(deploy) == (blocks, 0)
    assert count(theirs)[0] == blocks
    assert additions(deploy) == 0
    with torch.no_grad():
        assert relative_error(deploy(image), model(image)) <= EXACT
    assert type(deploy).__name__ == type(model).__name__
    assert isinstance(deploy, type(model))


def test_resnet18_keeps_only_its_skips() -> None:
    model = settled(torchvision.models.resnet18(weights=None))
    image = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    deploy = structrep.reparameterize(model)
    assert count(deploy) == (20, 0)
    assert additions(deploy) == 8
    with torch.no_grad():
        assert relative_error(deploy(image), model(image)) <= EXACT
    assert type(deploy) is type(model)
    assert {n for n in deploy.state_dict() if "conv" in n and n.endswith("weight")} == {
        n for n in model.state_dict() if "conv" in n and n.endswith("weight")
    }


def test_the_deploy_model_loads_into_timms_own_deploy_model() -> None:
    """Merged layers are called what timm calls them."""
    model = settled(timm.create_model("repvgg_a0")).float()
    deploy = structrep.reparameterize(model)
    theirs = timm.utils.reparameterize_model(model)
    theirs.load_state_dict(deploy.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(theirs(image), deploy(image))


@pytest.mark.parametrize(
    "name", ["tinynet_e", "repghostnet_050", "fastvit_t8", "mobilenetv3_small_050", "lcnet_035", "regnetx_002"]
)
def test_a_deploy_model_takes_a_state_dict_that_lost_its_versions(name: str) -> None:
    """safetensors keep no `_metadata`, and then torch makes norms count batches that they had no count of."""
    deploy = structrep.reparameterize(small(name).eval(), verify=False)
    deploy.load_state_dict(dict(deploy.state_dict()))
