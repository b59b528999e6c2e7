"""Detection, classification, depth and segmentation models of transformers: same class, same outputs, merged.

Random weights from small configurations; nothing is downloaded.
"""

import copy
import functools
import io

import pytest
import torch
import transformers as hf
from torch import nn

import structrep
from structrep.prove.run import tensors
from tests.support.truth import relative_error

DETECTOR = dict(
    encoder_hidden_dim=32, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, decoder_layers=2, num_queries=20,
    decoder_in_channels=[32, 32, 32], num_labels=5, encoder_attention_heads=4, decoder_attention_heads=4,
)  # fmt: skip
RESNET = dict(embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1])
STAGES = ["stage2", "stage3", "stage4"]


def rt_detr(version="", **more):
    backbone = hf.RTDetrResNetConfig(**RESNET, layer_type="bottleneck", out_features=STAGES)
    config = getattr(hf, f"RTDetr{version}Config")(
        backbone_config=backbone, encoder_in_channels=[16, 32, 64], **DETECTOR | more
    )
    return getattr(hf, f"RTDetr{version}ForObjectDetection")(config)


def d_fine():
    backbone = hf.HGNetV2Config(
        stage_in_channels=[8, 16, 32, 64], stage_mid_channels=[8, 8, 16, 32], stage_out_channels=[16, 32, 64, 128],
        stage_num_blocks=[1] * 4, stage_numb_of_layers=[2] * 4, stem_channels=[3, 8, 8], embedding_size=8,
        hidden_sizes=[16, 32, 64, 128], out_features=STAGES,
    )  # fmt: skip
    return hf.DFineForObjectDetection(
        hf.DFineConfig(backbone_config=backbone, encoder_in_channels=[32, 64, 128], **DETECTOR)
    )


def upernet():
    backbone = hf.ResNetConfig(**RESNET, out_features=["stage1", *STAGES])
    return hf.UperNetForSemanticSegmentation(
        hf.UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_in_channels=32)
    )


def dpt():
    return hf.DPTForDepthEstimation(
        hf.DPTConfig(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=64,
            backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 16, 32, 32], fusion_hidden_size=16, patch_size=16,
            use_batch_norm_in_fusion_residual=True,
        )
    )  # fmt: skip


def classifier(name, **options):
    return lambda: getattr(hf, f"{name}ForImageClassification")(getattr(hf, f"{name}Config")(**options))


MODELS = {
    "RT-DETR": (rt_detr, 64),
    "RT-DETRv2": (lambda: rt_detr("V2"), 64),
    "D-FINE": (d_fine, 64),
    "UperNet": (upernet, 64),
    "DPT": (dpt, 64),
    "ResNet": (classifier("ResNet", **RESNET), 64),
    "RegNet": (classifier("RegNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8), 64),
    "MobileNetV1": (classifier("MobileNetV1", depth_multiplier=0.25), 64),
    "MobileNetV2": (classifier("MobileNetV2", depth_multiplier=0.35), 64),
    "MobileViTV2": (classifier("MobileViTV2", width_multiplier=0.25), 64),
    "LeViT": (classifier("Levit", depths=[1, 1, 1]), 224),
}


BEIT = dict(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=64, patch_size=16,
    use_relative_position_bias=True, layer_scale_init_value=0.5,
)  # fmt: skip


def beit():
    config = hf.BeitConfig(**{**BEIT, "num_hidden_layers": 3})
    return hf.BeitForImageClassification(config), {"pixel_values": torch.randn(1, 3, 64, 64)}


def zoe_depth():
    stages = [f"stage{n}" for n in (1, 2, 3, 4)]
    config = hf.ZoeDepthConfig(
        backbone_config=hf.BeitConfig(**BEIT, out_features=stages, reshape_hidden_states=False),
        backbone_hidden_size=32, neck_hidden_sizes=[16, 16, 32, 32], fusion_hidden_size=32, bottleneck_features=32,
        num_relative_features=16, use_batch_norm_in_fusion_residual=True, bin_embedding_dim=16,
        num_attractors=[4, 2, 2, 1], bin_configurations=[{"n_bins": 16, "min_depth": 0.001, "max_depth": 10.0}],
    )  # fmt: skip
    return hf.ZoeDepthForDepthEstimation(config), {"pixel_values": torch.randn(1, 3, 64, 64)}


def group_vit():
    sizes = dict(hidden_size=32, num_attention_heads=4, intermediate_size=64)
    config = hf.GroupViTConfig(
        text_config=dict(**sizes, num_hidden_layers=2, vocab_size=50, max_position_embeddings=16),
        vision_config=dict(
            **sizes, num_hidden_layers=3, depths=[1, 1, 1], num_group_tokens=[8, 4, 0], num_output_groups=[8, 4, 0],
            image_size=32, patch_size=8,
        ),
        projection_dim=16, projection_intermediate_dim=32,
    )  # fmt: skip
    words = {"input_ids": torch.tensor([[5, 6, 7, 49]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    return hf.GroupViTModel(config), {"pixel_values": torch.randn(1, 3, 32, 32), **words}


def dab_detr():
    config = hf.DabDetrConfig(
        backbone_config=hf.ResNetConfig(**RESNET, out_features=["stage4"]), use_timm_backbone=False, backbone=None,
        use_pretrained_backbone=False, hidden_size=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4, num_queries=10, num_labels=5,
    )  # fmt: skip
    return hf.DabDetrForObjectDetection(config), {"pixel_values": torch.randn(1, 3, 64, 64)}


def trained(model):
    """Eval mode, float64, norms with statistics of their own."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(getattr(module, "running_var", None), torch.Tensor):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
    return model.double().eval()


@functools.cache
def converted(name):
    torch.manual_seed(0)
    model = trained(MODELS[name][0]())
    return model, structrep.plan(model).apply()


def norms(model):
    return sum(isinstance(m, nn.modules.batchnorm._NormBase) for m in model.modules())


def outputs_of(model, image):
    with torch.no_grad():
        output = model(pixel_values=image)
    return output, [t for t in tensors(output) if t.is_floating_point()]


@pytest.mark.parametrize("name", MODELS)
def test_it_comes_back_as_the_same_class_with_nothing_left_to_merge(name):
    (model, deploy), size = converted(name), MODELS[name][1]
    image = torch.randn(1, 3, size, size, dtype=torch.float64)
    (before, truth), (after, mine) = outputs_of(model, image), outputs_of(deploy, image)
    assert isinstance(deploy, type(model))
    assert type(after) is type(before)
    assert deploy.config is not None
    for one, two in zip(mine, truth, strict=True):
        assert relative_error(one, two) < 1e-11
    assert norms(model) > 0 or name.startswith("RT")
    assert norms(deploy) == 0


@pytest.mark.parametrize("name", ["RT-DETR", "RT-DETRv2", "D-FINE"])
def test_its_repvgg_blocks_are_one_convolution_each(name):
    """transformers has no conversion for them."""
    model, deploy = converted(name)
    for network, alone in ((model, False), (deploy, True)):
        blocks = [m for m in network.modules() if "RepVggBlock" in type(m).__name__]
        assert blocks
        for block in blocks:
            assert (sum(isinstance(m, nn.Conv2d) for m in block.modules()) == 1) == alone
            assert (block.conv1 is None) == alone
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    file = io.BytesIO()
    torch.save(deploy, file)
    file.seek(0)
    for again in (copy.deepcopy(deploy), torch.load(file, weights_only=False)):
        for one, two in zip(outputs_of(again, image)[1], outputs_of(deploy, image)[1], strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("make", [beit, zoe_depth, group_vit, dab_detr])
def test_its_parts_are_called_as_they_were(make):
    """Each gives to parts of itself, from code that cannot be followed, what is not as their defaults are."""
    for known in (True, False):
        torch.manual_seed(0)
        model, inputs = make()
        model = trained(model)
        if make is dab_detr:  # whose positions are float32, whatever the rest is
            model = model.float()
        inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        plan = structrep.plan(model, inputs if known else None)
        assert len(plan.merges) > 4
        deploy = plan.apply()
        with torch.no_grad():
            truth, mine = (list(tensors(one(**inputs))) for one in (model, deploy))
        for one, two in zip(mine, truth, strict=True):
            assert relative_error(one, two) < (1e-5 if make is dab_detr else 1e-11)
