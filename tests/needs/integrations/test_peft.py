"""Models that peft has adapted: they come back without what adapts them, as after peft's own merge."""

import copy

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import EXACT, relative_error, says

X = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IDS = {"input_ids": torch.arange(8)[None]}
WHERE = dict(target_modules=["a", "b"])


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        y = torch.relu(self.b(torch.relu(self.a(x))))
        return self.head(torch.relu(self.norm(y)))


def lora(**options):
    return peft.LoraConfig(**{"r": 2, "init_lora_weights": False, **WHERE, **options})


def adapted(config, model=None, **options):
    torch.manual_seed(0)
    model = peft.get_peft_model(model or settled(MLP()), config, **options).double().eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "ia3_", "hada_", "vera_", "ln_tuning", "oft_", "modules_to_save")):
            parameter.data.normal_(0, 0.3, generator=generator)
    return model


def two(*active):
    model = adapted(lora())
    model.add_adapter("other", lora(r=3))
    model.double().base_model.set_adapter(list(active))
    return model.eval()


def disabled():
    model = adapted(lora(modules_to_save=["head"]))
    model.base_model.disable_adapter_layers()
    return model


def merged():
    model = adapted(lora())
    model.merge_adapter()
    return model


# how, and what structrep merges
ADAPTED = {
    "LoRA": (lambda: adapted(lora()), {"a", "b"}),
    "a trained copy beside it": (lambda: adapted(lora(modules_to_save=["head"])), {"a", "b"}),
    "the first of two": (lambda: two("default"), {"a", "b"}),
    "the second of two": (lambda: two("other"), {"a", "b"}),
    "both": (lambda: two("default", "other"), {"a", "b"}),
    "an adapter on one layer": (lambda: adapted(lora(target_modules=["b"])), {"b"}),
    "disabled": (disabled, set()),
    "merged already": (merged, set()),
    "mixed": (lambda: adapted(lora(), mixed=True), {"a", "b"}),
    "the tuner alone": (lambda: adapted(lora()).base_model, {"a", "b"}),
    "DoRA": (lambda: adapted(lora(use_dora=True)), {"a", "b"}),
    "AdaLoRA": (lambda: adapted(peft.AdaLoraConfig(init_r=2, target_r=2, total_step=9, **WHERE)), {"a", "b"}),
    "LoHa": (lambda: adapted(peft.LoHaConfig(r=2, **WHERE)), {"a", "b"}),
    "VeRA": (lambda: adapted(peft.VeraConfig(r=2, **WHERE)), {"a", "b"}),
    "IA3": (lambda: adapted(peft.IA3Config(feedforward_modules=[], **WHERE)), {"a", "b"}),
    "LN tuning": (lambda: adapted(peft.LNTuningConfig(target_modules=["norm"])), set()),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_the_model_inside_comes_back_with_plain_layers(name):
    for inputs in ((), (X,)):
        make, where = ADAPTED[name]
        model = make()
        truth = model(X).detach()
        plan = structrep.plan(model, *inputs)
        assert {merge.where for merge in plan.merges} == where
        deploy = plan.reparameterize(*inputs)
        assert type(deploy) is MLP
        assert {type(layer) for layer in deploy.children()} == {nn.Linear, nn.LayerNorm}
        assert deploy.state_dict().keys() == MLP().state_dict().keys()
        assert relative_error(deploy(X), truth) < EXACT
        assert relative_error(model(X), truth) == 0  # the model itself is as it was
        assert not hasattr(deploy, "peft_config")
        deploy.train()  # a layer of peft's or of loralib's may take its adapter out again
        assert relative_error(deploy.eval()(X), truth) < EXACT


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(30, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


TABLES = {
    "LoRA": lambda: lora(target_modules=["a"]),
    "rank-stabilised": lambda: lora(target_modules=["a"], use_rslora=True),
    "DoRA": lambda: lora(target_modules=["a"], use_dora=True),
    "HiRA": lambda: peft.HiraConfig(r=2, target_modules=["a"]),
    "TinyLoRA": lambda: peft.TinyLoraConfig(r=2, target_modules=["a"]),
}


@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES)
def test_adapters_of_embeddings_are_rows(make):
    model, ids = adapted(make(), settled(Words())), torch.arange(30).view(2, 15)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    for inputs in ((), (ids,)):
        deploy = structrep.reparameterize(model, *inputs)
        assert deploy.state_dict().keys() == Words().state_dict().keys()
        assert relative_error(deploy(ids), model(ids)) < EXACT


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return self.a(self.norm(x))


def test_a_scale_of_inputs_is_merged():
    """Its layer asks for the dtype of the scale, which is no more then: that of the layer that took it is the same."""
    for inputs in ((), (X,)):
        model = adapted(peft.IA3Config(target_modules=["a"], feedforward_modules=["a"]), settled(Normed()))
        deploy = says(structrep.plan(model, *inputs), 1).reparameterize(*inputs)
        assert relative_error(deploy(X), model(X)) < EXACT
        assert not [name for name, _ in deploy.named_parameters() if "ia3" in name]


@pytest.mark.parametrize("name", ["LoRA", "both", "AdaLoRA", "LoHa", "VeRA", "IA3", "LN tuning"])
def test_it_is_what_peft_merges(name):
    model = ADAPTED[name][0]()
    theirs = copy.deepcopy(model).merge_and_unload().state_dict()
    for key, tensor in structrep.reparameterize(model, X).state_dict().items():
        assert relative_error(tensor, theirs[key]) < EXACT, key


def test_in_place():
    model = adapted(lora(modules_to_save=["head"]))
    inside, truth = model.base_model.model, model(X).detach()
    with pytest.warns(UserWarning, match=r"inside the PeftModel was merged in place: .* go on with the model that is"):
        deploy = structrep.reparameterize(model, X, inplace=True)
    assert deploy is inside
    assert deploy.state_dict().keys() == MLP().state_dict().keys()
    assert relative_error(deploy(X), truth) < EXACT


def test_a_wrong_input_changes_nothing():
    model = adapted(lora(modules_to_save=["head"]))
    keys, truth = list(model.state_dict()), model(X).detach()
    with pytest.raises(structrep.errors.BadInput):
        structrep.reparameterize(model, X[:, :3], inplace=True)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(X), truth)


@pytest.mark.parametrize("config", [
    peft.BOFTConfig(boft_block_size=2, **WHERE),
    peft.OFTConfig(oft_block_size=2, **WHERE),
], ids=["BOFT", "OFT"])  # fmt: skip
def test_what_cannot_be_merged_stays_whole(config):
    """Also for its own `merge`, which would do a part again that was merged before."""
    model = adapted(config)
    truth = model(X).detach()
    deploy = structrep.reparameterize(model)
    assert type(deploy) is MLP
    assert relative_error(deploy(X), truth) < EXACT
    for layer in (deploy.a, deploy.b):
        assert isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)
        layer.merge()
    assert relative_error(deploy(X), truth) < 1e-9


PROBED = {
    "OFT": peft.OFTConfig(oft_block_size=2, **WHERE),
    "BOFT": peft.BOFTConfig(boft_block_size=2, **WHERE),
    "RoAd": peft.RoadConfig(group_size=4, **WHERE),
    "MiSS": peft.MissConfig(r=2, **WHERE),
    "GraLoRA": peft.GraloraConfig(r=2, gralora_k=2, **WHERE),
}


def test_vectors_that_are_picked_from_a_bank_are_read():
    """VB-LoRA's `topk` of its logits is a constant: without inputs too."""
    config = peft.VBLoRAConfig(r=2, num_vectors=4, vector_length=4, topk=2, **WHERE)
    model, x = random_adapters(config), torch.randn(2, 3, 8, dtype=torch.float64)
    truth = model(x).detach()
    for inputs in ((), (x,)):
        plan = structrep.plan(model, *inputs)
        assert {merge.where for merge in plan.merges} == {"a", "b"}
        assert not any("probed" in " ".join(merge.notes) for merge in plan.merges)
        assert relative_error(plan.reparameterize(*inputs)(x), truth) < EXACT


@pytest.mark.parametrize("config", PROBED.values(), ids=PROBED)
@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 8)])
def test_adapters_that_are_not_read_are_probed(config, shape):
    """With example inputs: their layers are made to be linear, and whether they are is tried."""
    model, x = random_adapters(config), torch.randn(shape, dtype=torch.float64)
    truth = model(x).detach()
    plan = structrep.plan(model, x)
    assert {merge.where for merge in plan.merges} == {"a", "b"}
    assert all("was probed, not read" in " ".join(merge.notes) for merge in plan.merges)
    deploy = plan.reparameterize(x)
    assert relative_error(deploy(x), truth) < EXACT
    assert deploy.state_dict().keys() == MLP().state_dict().keys()


def test_adapters_on_convolutions():
    """DoRA's vector of magnitudes reads the weights beside it: code of the layer itself, which is probed as a whole."""
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    model = random_adapters(lora(use_dora=True, target_modules=["0", "2"]), model)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    deploy = structrep.reparameterize(model, x)
    assert [type(part) for part in deploy] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert relative_error(deploy(x), model(x)) < EXACT


def test_adapters_of_ones_own_are_not_probed():
    """Of peft's classes it is known that they are made to be linear; of others whatever one input shows may be all."""

    class Gated(peft.tuners.lora.Linear):
        def forward(self, x, *args, **kwargs):
            return super().forward(x, *args, **kwargs).clamp(-100, 100)

    model = random_adapters(lora())
    model.base_model.model.b.__class__ = Gated
    plan = structrep.plan(model, X)
    assert [merge.where for merge in plan.merges] == ["a"]
    deploy = plan.reparameterize(X)
    assert relative_error(deploy(1e4 * X), model(1e4 * X)) < EXACT


@pytest.mark.parametrize("config", [
    peft.OFTConfig(oft_block_size=4, coft=True, eps=1e-3, **WHERE),
    peft.LilyConfig(r=2, **WHERE),
], ids=["weights that change", "no linear map"])  # fmt: skip
def test_adapters_that_cannot_be_probed_stay(config):
    model = random_adapters(config)
    with torch.no_grad():
        model(X)
    plan = structrep.plan(model, X)
    deploy = plan.reparameterize(X)
    assert relative_error(deploy(X), model(X)) < 1e-9
    assert any(isinstance(part, peft.tuners.tuners_utils.BaseTunerLayer) for part in deploy.modules())


class ReadsAWeight(MLP):
    def forward(self, x):
        return super().forward(x) + self.a.weight.sum()


@pytest.mark.parametrize("config", [lora(), peft.OFTConfig(oft_block_size=4, **WHERE)], ids=["LoRA", "OFT"])
def test_a_layer_whose_weight_is_asked_for_stays(config):
    model = random_adapters(config, ReadsAWeight())
    plan = structrep.plan(model, X)
    assert {merge.where for merge in plan.merges} - {"head"} == {"b"}
    assert relative_error(plan.reparameterize(X)(X), model(X)) < EXACT


def test_adapters_that_share_their_vectors():
    model = random_adapters(peft.TinyLoraConfig(**WHERE))
    for given in ([], [X]):
        assert relative_error(structrep.reparameterize(model, *given)(X), model(X)) < EXACT


def random_adapters(config, model=None):
    model = settled(model or MLP())
    own = set(map(id, model.parameters()))
    model = peft.get_peft_model(model, config).double().eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def test_a_hook_keeps_a_layer_and_its_adapter():
    model = adapted(lora())
    seen = []
    model.base_model.model.b.register_forward_hook(lambda module, args, output: seen.append(output))
    plan = structrep.plan(model, X)
    assert [merge.where for merge in plan.merges] == ["a"]
    assert any(refusal.kind == "Hooked" and "b has a forward hook" in refusal.reason for refusal in plan.refusals)
    deploy = plan.reparameterize(X)
    deploy.b.merge()
    assert relative_error(deploy(X), model(X)) < EXACT


# --- wrappers that do more than to run what is inside -----------------------------------------------------------------


class Asking(nn.Module):
    """A part whose adapters are off for a reference, as in preference optimization."""

    def __init__(self):
        super().__init__()
        self.backbone = adapted(lora())
        self.out = nn.Linear(3, 2).double()

    def forward(self, x):
        with self.backbone.disable_adapter():
            reference = self.backbone(x)
        return self.out(self.backbone(x) - reference)


class Prompted(peft.PeftModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) * 2


def hooked():
    model = adapted(lora())
    model.register_forward_hook(lambda module, args, output: output * 3)
    return model


@pytest.mark.parametrize(("make", "stays", "reason"), [
    (Asking, "backbone", "code around it asks for its disable_adapter"),
    (lambda: Prompted(settled(MLP()), lora()).double().eval(), "", "it has a forward of its own"),
    (hooked, "", "it has a forward hook"),
], ids=["asked", "own forward", "hook"])  # fmt: skip
def test_a_wrapper_that_does_more_stays_with_its_adapters(make, stays, reason):
    model = make()
    truth = model(X).detach()
    plan = structrep.plan(model, X)
    assert any(reason in refusal.reason for refusal in plan.refusals)
    deploy = plan.reparameterize(X)
    assert relative_error(deploy(X), truth) < EXACT
    wrapper, theirs = deploy.get_submodule(stays), model.get_submodule(stays)
    assert isinstance(wrapper, peft.PeftModel)
    assert relative_error(wrapper.base_model.merge_and_unload()(X), theirs.base_model.merge_and_unload()(X)) < EXACT


def causal(config=None, **options):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=2, vocab_size=50, max_position_embeddings=64)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **options)).double().eval()
    return adapted(config, model) if config else model


@pytest.mark.parametrize("config", [
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    lora(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[4, 5]),
], ids=["prompts", "prefixes", "aLoRA"])  # fmt: skip
def test_what_is_given_to_the_model_inside_stays(config, tmp_path):
    model = causal(config)
    truth = model(**IDS).logits.detach()
    deploy = structrep.reparameterize(model)
    assert type(deploy) is type(model)
    assert relative_error(deploy(**IDS).logits, truth) < 1e-9
    deploy.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(causal(), tmp_path).double().eval()
    assert relative_error(again(**IDS).logits, truth) < 1e-6  # what peft stores is float32 for some


# --- models of transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "tied"),
    [(["q_proj", "v_proj"], False), (["q_proj", "lm_head"], False), (["q_proj", "lm_head"], True)],
    ids=["attention", "head", "tied head"],
)
def test_it_is_saved_and_loaded_as_a_model_without_adapters(target, tied, tmp_path):
    model = causal(lora(task_type="CAUSAL_LM", target_modules=target), tie_word_embeddings=tied)
    truth = model(**IDS).logits.detach()
    deploy = structrep.reparameterize(model, IDS)
    assert type(deploy) is hf.LlamaForCausalLM
    assert not any("lora" in name or "base_layer" in name for name in deploy.state_dict())
    assert relative_error(deploy(**IDS).logits, truth) < EXACT
    written = [one.generate(**IDS, max_new_tokens=5, do_sample=False) for one in (deploy, model)]
    assert torch.equal(*written)
    deploy.save_pretrained(tmp_path)
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert relative_error(again(**IDS).logits, truth) < EXACT
    assert model.base_model.model.config.tie_word_embeddings is tied


def test_an_adapter_that_transformers_has_added(tmp_path):
    model = causal()
    model.add_adapter(lora(target_modules=["q_proj", "v_proj"]))
    truth = model.double().eval()(**IDS).logits.detach()
    deploy = structrep.reparameterize(model, IDS)
    assert relative_error(deploy(**IDS).logits, truth) < EXACT
    deploy.save_pretrained(tmp_path)
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert relative_error(again(**IDS).logits, truth) < EXACT


@pytest.mark.parametrize("dora", [False, True])
def test_gpt2_comes_back_with_its_transposed_layers(dora, tmp_path):
    """transformers' `Conv1D` has weights of (in, out), and is what a saved model is loaded into."""
    torch.manual_seed(0)
    sizes = dict(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32)
    config = lora(task_type="CAUSAL_LM", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=dora)
    model = adapted(config, hf.GPT2LMHeadModel(hf.GPT2Config(**sizes)).double())
    truth = model(**IDS).logits.detach()
    deploy = structrep.reparameterize(model, IDS)
    assert type(deploy) is hf.GPT2LMHeadModel
    assert not any(isinstance(part, peft.tuners.tuners_utils.BaseTunerLayer) for part in deploy.modules())
    assert relative_error(deploy(**IDS).logits, truth) < EXACT
    theirs = model.merge_and_unload()
    assert {k: v.shape for k, v in deploy.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    deploy.save_pretrained(tmp_path)
    again = hf.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert relative_error(again(**IDS).logits, truth) < EXACT


# --- parts of a model -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.out = adapted(lora()), nn.Linear(3, 2).double()

    def forward(self, x):
        return self.out(torch.relu(self.backbone(x)))


class Moody(Net):
    def forward(self, x):
        if str(x) == "never":
            x = x + 1
        return self.out(torch.relu(self.backbone(x)))


@pytest.mark.parametrize("kind", [Net, Moody])
def test_an_adapted_part_is_the_part_inside(kind):
    for inplace in (False, True):
        model = kind().eval()
        truth = model(X).detach()
        plan = structrep.plan(model, X)
        assert [merge.where for merge in plan.merges] == ["backbone.a", "backbone.b"]
        assert isinstance(model.backbone, peft.PeftModel)  # a plan changes nothing
        deploy = plan.reparameterize(X, inplace=inplace)
        assert (deploy is model) == inplace
        assert type(deploy.backbone) is MLP
        assert relative_error(deploy(X), truth) < EXACT


def test_a_model_whose_embeddings_cannot_be_asked_for_is_converted():
    """transformers raises in `get_input_embeddings` of those that it knows no embeddings of; its classes all have
    the attribute that says whether adapters were loaded."""
    config = hf.RTDetrResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    model = hf.RTDetrResNetBackbone(config).double().eval()
    model.config.tie_word_embeddings = True
    with pytest.raises(NotImplementedError):
        model.get_input_embeddings()
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    deploy = structrep.reparameterize(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deploy.modules())
    assert deploy.config.tie_word_embeddings
    with torch.no_grad():
        theirs, ours = model(image), deploy(image)
    assert relative_error(ours.feature_maps[0], theirs.feature_maps[0]) < EXACT
