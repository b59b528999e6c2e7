"""Blocks in the place of layers: the same function at first, and the same model afterwards."""

import copy
import inspect
import logging
import re

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import structrep
from structrep.blocks.places import NormInBlock, plain_name
from structrep.errors import BadInput
from structrep.train.expand import FAMILIES
from tests.support.models import conv, settled
from tests.support.truth import EXACT, relative_error

SMALL = {
    "expandnet": {"rate": 2},
    "expandnet_linear": {"rate": 2},
    "conv3xc": {"gain": 1},
    "mobileone": {"branches": 2},
}
OF_CONVS = [name for name in FAMILIES if name not in ("replknet", "yolor")]  # those that have a place in Plain


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def kinds(model):
    return [(path, type(module)) for path, module in model.named_modules()]


class Plain(nn.Module):
    """Convolutions with norms and without, of one to three sizes, a shared activation, a Linear."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, eps=1e-3, momentum=0.3)
        self.c, self.d = nn.Conv2d(4, 6, 3, 2, padding=1), nn.BatchNorm2d(6, affine=False)
        self.e = nn.Conv2d(6, 6, 3, padding=1)
        self.act, self.fc = nn.ReLU(), nn.Linear(6, 5)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.act(self.b(self.a(x)) + x)
        return self.fc(self.act(self.e(self.act(self.d(self.c(x))))).mean((2, 3)))


X = torch.randn(4, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("block", OF_CONVS)
def test_the_same_function_then_the_same_model(block):
    for inplace in (False, True):
        model = settled(Plain())
        model.train()
        original, trained = copy.deepcopy(model), copy.deepcopy(model)
        expanded = structrep.expand(model, block, inplace=inplace, **SMALL.get(block, {}))
        assert (expanded is model) == inplace
        assert type(expanded) is Plain
        assert sum(p.numel() for p in expanded.parameters()) > sum(p.numel() for p in original.parameters())
        assert relative_error(copy.deepcopy(expanded)(X), trained(X)) < EXACT, "with statistics of batches"
        assert relative_error(expanded.eval()(X), original.eval()(X)) < EXACT
        with torch.no_grad():
            for parameter in expanded.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        back = structrep.reparameterize(expanded, X, norms="keep")
        assert relative_error(back(X), expanded(X)) < EXACT
        assert shapes(back) == shapes(original)
        assert kinds(back) == kinds(original)
        original.load_state_dict(back.state_dict())
        assert relative_error(original(X), expanded(X)) < EXACT
        folded, plain = structrep.reparameterize(expanded, X), structrep.reparameterize(original)
        assert relative_error(folded(X), expanded(X)) < EXACT
        assert shapes(folded) == shapes(plain)
        assert kinds(folded) == kinds(plain)


def test_large_depthwise_kernels():
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 7, padding=3, groups=4), nn.BatchNorm2d(4)))
    expanded = structrep.expand(model, "replknet", branches="dilated")
    assert isinstance(expanded[2], NormInBlock)
    assert relative_error(expanded(X), model(X)) < EXACT
    assert kinds(structrep.reparameterize(expanded, norms="keep")) == kinds(model)


MODELS = {
    "torchvision:resnet": lambda: torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1]),
    "torchvision:vgg11_bn": lambda: torchvision.models.vgg11_bn().features,
    "torchvision:mobilenet_v2": torchvision.models.mobilenet_v2,
    "torchvision:shufflenet": torchvision.models.shufflenet_v2_x0_5,
    "torchvision:squeezenet": torchvision.models.squeezenet1_1,
    "torchvision:densenet": lambda: torchvision.models.DenseNet(8, (2, 2, 2, 2), 16),
    "torchvision:regnet": torchvision.models.regnet_y_400mf,
    "timm:resnet10t": lambda: timm.create_model("resnet10t"),
    "timm:efficientnet": lambda: timm.create_model("test_efficientnet"),
    "timm:mobilenetv4": lambda: timm.create_model("mobilenetv4_conv_small_035"),
    "timm:regnet": lambda: timm.create_model("regnetx_002"),
    "timm:vit": lambda: timm.create_model("test_vit"),
    "timm:convnext": lambda: timm.create_model("test_convnext"),
    "timm:resnet": lambda: timm.create_model("test_resnet"),
}


BLOCKS = {
    "timm:vit": "lora",
    "timm:convnext": "lora",
    # no batch norm stands right behind their 3x3 convolutions
    "torchvision:squeezenet": "doconv",
    "torchvision:densenet": "doconv",
    # depthwise and pointwise layers, and norms with an activation
    "timm:efficientnet": "mobileone",
    "timm:mobilenetv4": "mobileone",
    "timm:regnet": "dbb",
    "torchvision:mobilenet_v2": "mobileone",
}


@pytest.mark.parametrize("name", MODELS)
def test_models_come_back_as_they_were(name):
    model = settled(MODELS[name]()).float()
    expanded = structrep.expand(model, BLOCKS.get(name, "repvgg"))
    x = torch.randn(2, 3, *({"timm:vit": (160, 160)}.get(name, (64, 64))))
    with torch.no_grad():
        assert relative_error(expanded(x), model(x)) < 1e-4
        back = structrep.reparameterize(expanded, norms="keep", verify=False)
        assert relative_error(back(x), model(x)) < 1e-4
    assert shapes(back) == shapes(model)
    assert kinds(back) == kinds(model)
    model.load_state_dict(back.state_dict())


class Other(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Plainly(nn.BatchNorm2d):
    pass


class Acts(nn.BatchNorm2d):
    """A norm with parts of its own, one of which has a weight."""

    def __init__(self, features, counts=True):
        super().__init__(features, momentum=None, track_running_stats=counts)
        self.drop, self.act = nn.Dropout(0.5), nn.PReLU(features)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Backwards(Acts):
    """Its parts run in another order than that of their names."""

    def forward(self, x):
        return self.drop(torch.sigmoid(self.act(nn.BatchNorm2d.forward(self, x))))


class Frozen(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


class WithMore(nn.BatchNorm2d):
    def __init__(self, features):
        super().__init__(features)
        self.gain = nn.Parameter(torch.ones(features))


class CountsTwice(nn.BatchNorm2d):
    """It does something else in training mode alone."""

    def forward(self, x):
        y = super().forward(x)
        if self.training:
            self.running_var.mul_(0.5)
        return y


@pytest.mark.parametrize("norm", [Plainly, Acts])
def test_what_a_norm_does_besides_stays_where_it_was(norm):
    model = settled(nn.Sequential(conv(3), nn.ReLU(), conv(bias=True), norm(4), nn.Conv2d(4, 2, 1))).train()
    expanded = structrep.expand(model, "repvgg")
    assert [name for name in expanded.state_dict() if name.startswith("3.")] == [
        f"3.{name}.{key}" for name, part in model[3].named_children() for key in part.state_dict()
    ]
    torch.manual_seed(0)
    y = copy.deepcopy(expanded)(X)
    torch.manual_seed(0)
    assert relative_error(y, copy.deepcopy(model)(X)) < EXACT, "what is dropped too"
    with torch.no_grad():
        for parameter in expanded.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    back = structrep.reparameterize(expanded.eval(), X, norms="keep")
    assert kinds(back) == kinds(model)
    assert shapes(back) == shapes(model)
    assert relative_error(back(X), expanded(X)) < EXACT
    model.load_state_dict(back.state_dict())
    assert relative_error(model.eval()(X), expanded(X)) < EXACT
    assert back[3].momentum is model[3].momentum
    folded = structrep.reparameterize(expanded, X)
    assert relative_error(folded(X), expanded(X)) < EXACT
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    assert relative_error(copy.deepcopy(back)(X), back(X)) == 0


class Clipped(nn.BatchNorm2d):
    """Which shows on large values alone."""

    def forward(self, x):
        return super().forward(x).clamp(-60, 60)


class OfSize(nn.BatchNorm2d):
    def forward(self, x):
        y = super().forward(x)
        return y if x.shape[-1] < 40 else y * 2


class Flagged(nn.BatchNorm2d):
    flag = False

    def forward(self, x):
        return -super().forward(x) if self.flag else super().forward(x)


@pytest.mark.parametrize("norm", [Other, Backwards, Frozen, WithMore, CountsTwice, Clipped, OfSize, Flagged])
def test_norms_that_no_block_takes_in(norm):
    model = settled(nn.Sequential(conv(), nn.ReLU(), conv(), norm(4)))
    names = list(model.state_dict())
    with pytest.raises(BadInput, match=f"1 of 2: .*: {norm.__name__} does something else than to normalize"):
        structrep.expand(model, "repvgg")
    assert list(model.state_dict()) == names


ASKED = {
    "by name": lambda self, y: self.n(x=y),
    "its weight": lambda self, y: self.n(y) * self.n.weight.mean(),
    "its size": lambda self, y: self.n(y) / self.n.num_features,
    "its eps": lambda self, y: self.n(y) + self.n.eps,
}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, Acts])
@pytest.mark.parametrize("forward", ASKED.values(), ids=ASKED)
def test_norms_of_which_code_asks_more(norm, forward):
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c, self.n = conv(3), conv(), norm(4)

        def forward(self, x):
            return forward(self, self.c(self.a(x).relu()))

    if norm is nn.BatchNorm2d and forward is ASKED["by name"]:
        forward = ASKED["its eps"]  # torch's own calls it otherwise
    model = settled(Asks())
    with pytest.raises(BadInput, match="no batch norm that is its alone"):
        structrep.expand(model, "repvgg")


def test_training_goes_on_in_the_blocks():
    model = structrep.expand(settled(Plain()).train(), "repvgg")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = [p.clone() for p in model.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert sum(moved) / len(moved) > 0.9


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("a", ["a"]),
        (["a", "stem"], ["stem", "a"]),
        ("*", ["stem", "a", "c"]),
        (nn.Conv2d, ["stem", "a", "c"]),
        (lambda path, layer: getattr(layer, "stride", 1) == (2, 2), ["c"]),
        (None, ["a", "c"]),
    ],
)
def test_where(where, expected, caplog):
    model = settled(Plain())
    with caplog.at_level(logging.INFO, "structrep"):
        expanded = structrep.expand(model, "repvgg", where=where)
    assert sorted(structrep.expand_layers(expanded)) == sorted(expected)
    assert ", ".join(path for path, _ in model.named_modules() if path in expected) in caplog.text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"block": "nothing"}, "no block is named 'nothing'"),
        ({"where": "layer9"}, "no module named 'layer9'"),
        ({"where": "fc"}, "it is a Linear"),
        ({"where": "a", "rate": 3}, "repvgg blocks have no option 'rate': there is online"),
        ({"block": "mobileone", "branch": 6}, "mobileone blocks have no option 'branch': there is branches"),
        ({"block": "mobileone", "branch": 6, "where": "a"}, "no option 'branch': there is branches"),
        ({"block": "expandnet", "rates": 2}, "no option 'rates': there is rate, mode, online"),
        ({"block": "doconv", "groups": 2}, "doconv blocks have no option 'groups': there is D_mul"),
        ({"block": "dbb", "dtype": torch.float16}, "no option 'dtype': it has none"),
        ({"block": "expandnet", "where": "a", "mode": "ck"}, "odd kernel"),
        ({"init": "zeros"}, "'preserve' or 'paper'"),
        ({"block": "replknet"}, "of those that the paper would choose"),
        ({"where": lambda path, layer: False}, "no layer in Plain that a repvgg block can stand for"),
    ],
)
def test_bad_input(arguments, told):
    model = settled(Plain())
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(BadInput, match=told):
        structrep.expand(model, **arguments)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_docstring_has_each_blocks_options():
    """As its class takes them, by keyword."""
    said = " ".join(structrep.expand.__doc__.split("options: ")[1].split("\n\n")[0].split())
    clauses = re.findall(r'((?:`\w+`(?:, | and )?)+) for ("\w+"(?: and "\w+")*)', said)
    assert len(clauses) == 11
    for block, family in FAMILIES.items():
        taken = {
            parameter.name
            for kind in family.of.values()
            for parameter in inspect.signature(kind).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
        named = {name for names, of in clauses if f'"{block}"' in of for name in re.findall(r"\w{2,}", names)} - {"and"}
        assert named == taken, block


class Small(nn.Sequential):
    """What none of a block's layers can be taken of, each for a reason of its own."""

    def __init__(self, bias=False, norm=nn.BatchNorm2d):
        super().__init__(
            nn.Conv2d(3, 4, 3, 1, 1, bias=bias), norm(4), nn.Conv2d(4, 4, 3, 1, 1, bias=bias), norm(4), nn.ReLU(),
            nn.Conv2d(4, 4, 3, 1, 1, bias=bias), norm(4), nn.Conv2d(4, 4, 1, bias=bias), norm(4),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "block", "options", "told"),
    [
        (
            Small,
            "ecbsr",
            {},
            "name some, where=...\n"
            "  2 of 4: its block has biases, and this convolution has none to become of them\n"
            "  1 of 4: it is the first convolution\n"
            "  1 of 4: it is not 3x3",
        ),
        (
            Small,
            "ecbsr",
            {"where": "*"},
            "no layer in Small that a ecbsr block can stand for\n  3 of 4: its block has biases, and",
        ),
        (
            lambda: Small(norm=Other),
            "repvgg",
            {},
            "\n  2 of 4: its branches have norms, and no batch norm that is its alone stands behind it: Other does "
            "something else than to normalize and to run its parts in turn\n  1 of 4: ",
        ),
        (Small, "replknet", {}, "\n  3 of 4: it is not depthwise and 7x7 or larger\n  1 of 4: it is the first"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)), "doconv", {}, "\n  1 of 2: it is pointwise"),
        (Small, "lora", {}, "name some, where=...\n  it has no Linear"),
        (Small, "mobileone", {"branches": "many"}, "\n  3 of 4: "),
        (lambda: nn.Sequential(nn.ReLU()), "dbb", {"where": "*"}, "it has no Conv1d or Conv2d or Conv3d"),
    ],
)
def test_why_none_of_the_layers_will_do(model, block, options, told):
    model = model()
    names = list(model.state_dict())
    with pytest.raises(BadInput) as error:
        structrep.expand(model, block, **options)
    assert told in str(error.value)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("block", [name for name in OF_CONVS if nn.Linear not in FAMILIES[name].of])
def test_a_model_is_expanded_once(block):
    """As the cell of a notebook is run again."""
    for inplace in (False, True):
        once = structrep.expand(settled(Plain()), block, **SMALL.get(block, {}))
        names, places = list(once.state_dict()), structrep.expand_layers(once)
        for other in {block, "repvgg"} if block in ("repvgg", "acb", "dbb", "mobileone") else {block}:
            with pytest.raises(BadInput, match=f"Plain is expanded already, {', '.join(places)}: .*again=True"):
                structrep.expand(once, other, inplace=inplace)
        assert list(once.state_dict()) == names


def test_a_model_is_expanded_again_where_that_is_said():
    model = settled(Plain())
    once = structrep.expand(model, "repvgg", where="a")
    with pytest.raises(BadInput, match=r"a\.dense\.conv is in a block: Plain is expanded already, a: "):
        structrep.expand(once, "repvgg", where=["stem", "a.dense.conv"])
    for where in ("*", nn.Conv2d, lambda path, layer: True):
        with pytest.raises(BadInput, match="is expanded already"):
            structrep.expand(once, "doconv", where=where)
    more = structrep.expand(once, "dbb", where=["stem", "c"])
    assert structrep.expand_layers(more) == ["stem", "a", "c"]
    linear = structrep.expand(more, "lora")
    assert structrep.expand_layers(linear) == ["stem", "a", "c", "fc"]
    nested = structrep.expand(once, "repvgg", where="a.dense.conv", again=True)
    assert structrep.expand_layers(nested) == ["a", "a.dense.conv"]
    for expanded in (more, linear, nested):
        assert relative_error(expanded(X), model(X)) < EXACT
    assert relative_error(structrep.reparameterize(nested)(X), model(X)) < EXACT


def test_norms_that_do_more_are_told_of(caplog):
    with caplog.at_level(logging.INFO, "structrep"):
        structrep.expand(Plain(), "repvgg")
    assert "normalize" not in caplog.text
    model = timm.create_model("test_efficientnet")
    norms = sum(type(one).__name__ == "BatchNormAct2d" for one in model.modules())
    with caplog.at_level(logging.INFO, "structrep"):
        structrep.expand(model, "doconv")
    assert f"{norms} BatchNormAct2d do more than normalize" in caplog.text
    assert norms > 0
    kept = timm.layers.convert_sync_batchnorm(copy.deepcopy(model))
    x = torch.randn(2, 3, 64, 64)
    assert relative_error(kept.eval()(x), model.eval()(x)) < 1e-6
    assert relative_error(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()(x), model(x)) > 0.1


def test_an_optimizer_that_was_made_too_early():
    for inplace in (False, True):
        model = Plain()
        early = torch.optim.SGD(model.parameters(), 0.1)
        expanded = structrep.expand(model, "repvgg", inplace=inplace)
        of_blocks = [name for name, _ in expanded.named_parameters() if name.startswith(("a.", "c."))]
        told = (
            rf"has 0 of the {len(of_blocks)} parameters of the blocks in Plain, not a\.dense"
            if inplace
            else f"has none of the {len(list(expanded.parameters()))} parameters of Plain: make it of model.parameters"
        )
        with pytest.raises(BadInput, match=told):
            structrep.check_optimizer(expanded, early)
        with pytest.raises(BadInput, match=told.partition(" in Plain")[0].partition(" of Plain")[0]):
            structrep.check_optimizer(nn.DataParallel(expanded), iter([early]))


def test_an_optimizer_that_trains_the_blocks():
    model = structrep.expand(Plain(), "repvgg")
    late = torch.optim.SGD(model.parameters(), 0.1)
    structrep.check_optimizer(model, late)
    structrep.check_optimizer(torch.compile(model), late)
    blocks = [parameter for place in ("a", "c") for parameter in model.get_submodule(place).parameters()]
    others = [parameter for parameter in model.parameters() if not any(parameter is one for one in blocks)]
    some, rest = torch.optim.SGD(blocks, 0.1), torch.optim.Adam(others, 0.1)
    structrep.check_optimizer(model, [some, rest])
    structrep.check_optimizer(model, some)
    with pytest.raises(BadInput, match=f"has 0 of the {len(blocks)} parameters of the blocks"):
        structrep.check_optimizer(model, rest)
    few = torch.optim.SGD([*others, *blocks[1:]], 0.1)
    with pytest.raises(BadInput, match=rf"has {len(blocks) - 1} of the {len(blocks)} .* not a\.dense\.conv\.weight: "):
        structrep.check_optimizer(model, few)
    blocks[0].requires_grad_(False)
    structrep.check_optimizer(model, few)
    plain = Plain()
    structrep.check_optimizer(plain, torch.optim.SGD(plain.fc.parameters(), 0.1))
    structrep.check_optimizer(plain.requires_grad_(False), few)
    with pytest.raises(BadInput, match="has none of the"):
        structrep.check_optimizer(Plain(), few)


def test_layers_that_must_stay():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(self.stem(x)))

    model = settled(Bare())
    with pytest.raises(BadInput, match="no batch norm"):
        structrep.expand(model, "repvgg", where="stem")
    with pytest.raises(BadInput, match="another module holds its weight"):
        structrep.expand(model, "doconv", where="a")
    model.stem.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(BadInput, match="hook"):
        structrep.expand(model, "doconv", where="stem")
    with pytest.raises(BadInput, match="no such block"):
        structrep.reparameterize(model, norms="keep")


def test_parts_that_were_expanded_apart():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Plain(), Plain()

        def forward(self, x):
            return self.a(x) + self.b(x)

    model = settled(Both())
    original = copy.deepcopy(model)
    model.a = structrep.expand(model.a, "repvgg")
    model.b = structrep.expand(model.b, "dbb", where="a")
    assert structrep.expand_layers(model) == ["a.a", "a.c", "b.a"]
    back = structrep.reparameterize(model, norms="keep")
    assert relative_error(back(X), original(X)) < EXACT
    assert (shapes(back), kinds(back)) == (shapes(original), kinds(original))


def test_parts_in_wrappers():
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4))))
    expanded = structrep.expand(model, "repvgg")
    apply_activation_checkpointing(expanded, check_fn=lambda module: module is expanded[1])
    back = structrep.reparameterize(expanded, norms="keep")
    assert relative_error(back(X), model(X)) < EXACT
    assert {plain_name(name): shape for name, shape in shapes(back).items()} == shapes(model)


def test_norms_of_a_process_group():
    class Group:
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle 'ProcessGroup' object")

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.SyncBatchNorm(4, process_group=Group()))
    expanded = structrep.expand(model, "repvgg").eval()
    groups = {module.process_group for module in expanded.modules() if isinstance(module, nn.SyncBatchNorm)}
    assert groups == {model[2].process_group}
    back = structrep.reparameterize(expanded, norms="keep")[2]
    assert isinstance(back, nn.SyncBatchNorm)
    assert back.process_group is model[2].process_group


def test_convolutions_and_norms_in_a_row():
    model = settled(
        nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8),
            nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4),
        )
    )  # fmt: skip
    expanded = structrep.expand(model)
    assert structrep.expand_layers(expanded) == ["2"]
    assert structrep.expand_layers(structrep.expand(model, where="*")) == ["2", "4"]
    back = structrep.reparameterize(expanded, norms="keep")
    assert relative_error(back(X), model(X)) < EXACT
    assert (shapes(back), kinds(back)) == (shapes(model), kinds(model))


def test_as_the_paper_starts():
    model = settled(Plain())
    expanded = structrep.expand(model, "repvgg", init="paper").eval()
    assert relative_error(expanded(X), model(X)) > 1e-3
    assert shapes(structrep.reparameterize(expanded, norms="keep")) == shapes(model)


class Branching(nn.Module):
    """A forward that cannot be followed, around layers that can."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.norm(self.b(self.a(x)))
        return y if y.sum() > 0 else -y


@pytest.mark.parametrize("block", ["doconv", "expandnet", "ecbsr", "conv3xc", "diracnet", "orepa"])
def test_blocks_come_back_where_the_forward_around_cannot_be_followed(block):
    model = settled(Branching())
    back = structrep.reparameterize(structrep.expand(model, block, where="b").eval(), norms="keep")
    assert (shapes(back), kinds(back)) == (shapes(model), kinds(model))


def test_a_block_that_cannot_be_merged_is_said_before_anything_changes():
    expanded = structrep.expand(settled(Plain()), "repvgg").eval()
    watched, *_ = structrep.expand_layers(expanded)
    expanded.get_submodule(watched).register_forward_hook(lambda *given: None)
    before = list(expanded.state_dict())
    with pytest.raises(structrep.Unmerged, match=f"these cannot be merged: {watched}\n.*hook"):
        structrep.reparameterize(expanded, norms="keep", inplace=True)
    assert list(expanded.state_dict()) == before


@pytest.mark.parametrize("given", [None, "adam", 0.1, {"param_groups": []}])
def test_what_is_no_optimizer(given):
    model = structrep.expand(Plain(), "repvgg")
    for one in (given, list(model.parameters())):
        with pytest.raises(BadInput, match="is no optimizer, it has no param_groups"):
            structrep.check_optimizer(model, one)


def test_what_wraps_an_optimizer_is_one():
    class Wrapper:
        def __init__(self, optimizer):
            self.param_groups = optimizer.param_groups

    model = structrep.expand(Plain(), "repvgg")
    structrep.check_optimizer(model, Wrapper(torch.optim.SGD(model.parameters(), 0.1)))
    with pytest.raises(BadInput, match="has none of the"):
        structrep.check_optimizer(model, Wrapper(torch.optim.SGD(Plain().parameters(), 0.1)))
