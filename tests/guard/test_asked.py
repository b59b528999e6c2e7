"""A question about a layer keeps a merge away if a line that ran has asked it, and not for what code might ask.

Each program says in words what it asks. Either all merges, or the layer that is asked about stays, and the refusal
shows the line that asked. In any case the outputs are those of the model, and stay so, or an error says why, when the
model and what it became are changed in the same way later.
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from structrep.blocks import RepVGGBlock2d
from tests.guard.asking import DEVICE, X, merges, one, sets, stays, train, walk
from tests.support.models import settled
from tests.support.truth import EXACT, SAME, check, relative_error, says

# --- what asks nothing ------------------------------------------------------------------------------------------------


QUIET = {
    "a method that is never called": one(lambda self, x: getattr(self, "bn")(self.conv(x)), freeze=walk),  # noqa: B009
    "a computed name": one(lambda self, x: getattr(self, self.name)(self.conv(x)), init_weights=walk),
    "train": one(lambda self, x: getattr(self, self.name)(self.conv(x)), train=train),
    "a property that hands out a part": one(
        lambda self, x: self.norm(self.conv(x)), norm=property(lambda self: getattr(self, self.name)), freeze=walk
    ),
    "a method that hands out a part": one(lambda self, x: self.norm()(self.conv(x)), norm=lambda self: self.bn),
    "parts by number": one(lambda self, x: self.both(x) + 0 * self.layers[1](self.layers[0](x))[:, :, 1:-1, 1:-1]),
}


def loop_over_children(self, x):
    for part in self.layers.children():
        x = part(x)
    return self.both(x)


def loop_over_named_children(self, x):
    for _, part in self.layers.named_children():
        x = part(x)
    return self.both(x)


def loop_and_ask_of_others(self, x):
    for part in self.layers:
        if isinstance(part, nn.Upsample):
            x = x + 1
        x = part(x)
    return self.both(x)


QUIET["a loop that calls"] = one(loop_over_children)
QUIET["a loop over names and parts"] = one(loop_over_named_children)
QUIET["a class that no merge gives or takes"] = one(loop_and_ask_of_others)


@pytest.mark.parametrize("program", QUIET)
def test_what_is_not_asked_keeps_nothing_away(program):
    merges(QUIET[program], left=0 if "loop" in program or "parts" in program or "class" in program else 1)


def choose(self, x):
    if self.fast is not None:
        return self.fast(self.bn, self.conv)(x)
    return self.bn(self.conv(x))


def ask_for_a_setting_if_set(self, x):
    y = self.both(x)
    return y * self.bn.eps if self.flag else y


def walk_if_set(self, x):
    y = self.both(x)
    return y * sum(p.sum() for p in self.parameters()) if self.flag else y


def ask_by_a_method_if_set(self, x):
    y = self.both(x)
    return self.relu_behind_norms(y) if self.flag else y


def ask_by_a_property_if_set(self, x):
    y = self.both(x)
    return y.relu() if self.depth > 3 and self.has_norm else y


def relu_behind_norms(self, x):
    return x.relu() if isinstance(self.bn, nn.BatchNorm2d) else x


NOT_TAKEN = {
    "parts handed to a function": (choose, sets(fast=lambda bn, conv: conv), sets(fast=lambda *parts: parts[0])),
    "a setting": (ask_for_a_setting_if_set, sets(flag=True)),
    "a walk": (walk_if_set, sets(flag=True)),
    "a method": (ask_by_a_method_if_set, sets(flag=True)),
    "a property": (ask_by_a_property_if_set, sets(depth=5)),
}


@pytest.mark.parametrize("program", NOT_TAKEN)
def test_a_branch_that_is_not_taken_asks_nothing_until_it_is(program):
    forward, *changes = NOT_TAKEN[program]
    has_norm = property(lambda self: isinstance(self.bn, nn.BatchNorm2d))
    merges(one(forward, relu_behind_norms=relu_behind_norms, has_norm=has_norm), *changes, left=1)


def add_a_loss(self, x):
    y = self.both(x)
    if self.training:
        self.loss = sum(p.pow(2).sum() for p in self.parameters())
    return y


def return_a_loss(self, x):
    y = self.both(x)
    if not self.training:
        return y
    return y, sum(p.pow(2).sum() for p in self.parameters())


@pytest.mark.parametrize("forward", [add_a_loss, return_a_loss])
def test_what_is_asked_in_training_mode_alone(forward):
    merges(one(forward), left=1)


# --- the first parameter ----------------------------------------------------------------------------------------------


def profile(self, x):
    return time_on(next(self.parameters()).device), x


def time_on(device):
    return str(device)


def first_in_a_name(self, x):
    first = next(self.parameters())
    return self.both(x.to(first.device).to(first.dtype))


FIRST = {
    "device": one(lambda self, x: self.both(x.to(next(self.parameters()).device))),
    "dtype": one(lambda self, x: self.both(x.to(next(self.parameters()).dtype))),
    "a name": one(first_in_a_name),
    "a property": one(lambda self, x: self.both(x.to(self.device)), device=DEVICE),
    "of a part": one(lambda self, x: self.both(x.to(next(self.conv.parameters()).device))),
    "named": one(lambda self, x: self.both(x.to(next(self.named_parameters())[1].device))),
    "a method that is never called": one(lambda self, x: self.both(x), profile=profile),
    "a flag": one(lambda self, x, timed=False: self.profile(x) if timed else self.both(x), profile=profile),
}


@pytest.mark.parametrize("program", FIRST)
def test_the_dtype_and_the_device_of_the_first_parameter(program):
    merges(FIRST[program], lambda model: model.to(torch.float64), left=1)


def test_the_first_parameter_in_single_precision():
    for program in ("device", "dtype", "a name"):
        model = copy.deepcopy(FIRST[program])
        deploy = says(structrep.plan(model, X), 1).reparameterize(X)
        assert relative_error(deploy.float()(X.float()), model.float()(X.float())) < 1e-5


@pytest.mark.parametrize("of", ["device", "dtype"])
@pytest.mark.parametrize("layers", [(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)), (nn.LayerNorm(6), nn.Linear(6, 5))])
def test_a_module_that_would_be_left_without_parameters_and_is_asked_for_one(of, layers):
    class Before(nn.Module):
        def __init__(self, more):
            super().__init__()
            self.norm, self.more = copy.deepcopy(layers[0]), more

        def forward(self, x):
            return self.more(self.norm(x.to(getattr(next(self.parameters()), of))))

    alone = settled(nn.Sequential(Before(nn.Identity()), copy.deepcopy(layers[1])))
    plan = structrep.plan(alone)
    assert not plan.merges
    assert "asks for its first parameter, and would be left without any" in str(plan.refusals)
    assert relative_error(plan.apply()(X), alone(X)) < EXACT
    beside = settled(nn.Sequential(Before(copy.deepcopy(layers[1]))))
    merges(beside)
    deploy = structrep.reparameterize(beside)
    assert relative_error(deploy.float()(X.float()), beside.float()(X.float())) < 1e-5


def test_a_forward_that_is_not_followed_asks_for_a_dtype_that_a_merge_would_change():
    """The first parameter is the norm's, in another dtype than the rest."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            if str(x) == "never":
                x = x + 1
            x = x * (2 if next(self.parameters()).dtype is torch.float64 else 3)
            return self.part(x)

        def part(self, x):
            return self.conv(self.bn(x).float()).double()

    model = settled(Mixed())
    model.conv.float()
    assert relative_error(structrep.reparameterize(model)(X), model(X)) < 1e-6


# --- what asks --------------------------------------------------------------------------------------------------------


def ask(function):
    """A forward that does one thing or another, as a question about its parts is answered."""

    def forward(self, x):
        y = self.both(x)
        return y.relu() if function(self) else y

    return one(forward, helper=lambda self, part: is_norm(part), has_norm=property(lambda self: is_norm(self.bn)))


def is_norm(part):
    return isinstance(part, nn.BatchNorm2d)


def has_type(part):
    return type(part) is nn.BatchNorm2d


def by_name(self):
    part = self.bn
    return type(part) is nn.BatchNorm2d


def by_match(self):
    match self.bn:
        case nn.BatchNorm2d():
            return True
    return False


def by_match_of_a_name(self):
    part = self.bn
    match part:
        case nn.BatchNorm2d():
            return True
    return False


def by_loop(self):
    return [1 for part in (self.conv, self.bn) if type(part) is nn.BatchNorm2d]


def by_loop_over_modules(self):
    found = []
    for part in self.modules():
        found.append(type(part))
    return nn.BatchNorm2d in found


def by_items(self):
    found = {}
    for name, part in self._modules.items():
        found[name] = type(part)
    return found["bn"] is nn.BatchNorm2d


def by_computed_name(self):
    return is_norm(getattr(self, self.name))


LOUD = {
    "isinstance": (lambda self: isinstance(self.bn, nn.BatchNorm2d), "isinstance(self.bn"),
    "type": (lambda self: type(self.bn) is nn.BatchNorm2d, "type(self.bn)"),
    "class": (lambda self: self.bn.__class__ is nn.BatchNorm2d, "self.bn.__class__"),
    "a name for it": (by_name, "type(part)"),
    "match": (by_match, "match self.bn"),
    "match of a name": (by_match_of_a_name, "match part"),
    "a setting": (lambda self: self.bn.eps > 0, "self.bn.eps"),
    "a setting by name": (lambda self: getattr(self.bn, "eps", 0) > 0, 'getattr(self.bn, "eps"'),
    "hasattr": (lambda self: hasattr(self.bn, "eps"), "hasattr(self.bn"),
    "text": (lambda self: "BatchNorm" in str(self.bn), "str(self.bn)"),
    "its name": (lambda self: self.bn._get_name() == "BatchNorm2d", "_get_name"),
    "what it prints": (lambda self: bool(self.bn.extra_repr()), "extra_repr"),
    "a function": (lambda self: is_norm(self.bn), "isinstance(part"),
    "a function that asks for the type": (lambda self: has_type(self.bn), "has_type(self.bn)"),
    "a method": (lambda self: self.helper(self.bn), "isinstance(part"),
    "a property": (lambda self: self.has_norm, "isinstance(part"),
    "a computed name": (by_computed_name, "isinstance(part"),
    "a list of them": (by_loop, "type(part)"),
    "children": (lambda self: any(is_norm(part) for part in self.children()), "self.children()"),
    "modules": (lambda self: any(is_norm(part) for part in self.modules()), "self.modules()"),
    "a loop over modules": (by_loop_over_modules, "self.modules()"),
    "a part by its path": (lambda self: type(self.get_submodule("bn")) is nn.BatchNorm2d, "get_submodule"),
    "all parts that it holds": (
        lambda self: any(type(part) is nn.BatchNorm2d for part in self._modules.values()),
        "self._modules.values()",
    ),
    "names and parts that it holds": (by_items, "type(part)"),
    "parts by names": (
        lambda self: [type(getattr(self, name)) for name in ("conv", "bn")][1] is nn.BatchNorm2d,
        "type(getattr(self, name))",
    ),
    "how many parameters": (lambda self: len(list(self.parameters())) == 8, "self.parameters()"),
    "its own parameters": (lambda self: len(self.bn._parameters) == 2, "self.bn._parameters"),
    "its own buffers": (lambda self: "running_mean" in self.bn._buffers, "self.bn._buffers"),
    "how many of its": (lambda self: len(list(self.bn.parameters())) == 2, "self.bn.parameters()"),
    "names of parameters": (lambda self: "bn.weight" in dict(self.named_parameters()), "self.named_parameters()"),
    "a state dict": (lambda self: "bn.weight" in self.state_dict(), "self.state_dict()"),
    "buffers": (lambda self: len(list(self.buffers())) == 6, "self.buffers()"),
}


@pytest.mark.parametrize("program", LOUD)
def test_what_a_line_that_ran_has_asked_stays(program):
    function, line = LOUD[program]
    stays(ask(function), line)


def foreign(source):
    """A function of a module that no class of the model's names, so that nothing of it is shadowed there."""
    space = {"nn": nn, "__name__": "somewhere_else"}
    exec(source, space)
    return space["told"]


ELSEWHERE = {
    "isinstance": foreign("def told(part): return isinstance(part, nn.BatchNorm2d)"),
    "a setting": foreign("def told(part): return part.eps > 0"),
    "dispatch": functools.singledispatch(lambda part: False),
}
ELSEWHERE["dispatch"].register(nn.BatchNorm2d)(lambda part: True)
HELPERS = [ELSEWHERE]


@pytest.mark.parametrize("how", ELSEWHERE)
def test_what_a_function_of_somebody_elses_asks(how):
    stays(ask(lambda self: HELPERS[0][how](self.bn)), "HELPERS[0][how](self.bn)")


def set_a_setting(self, x):
    self.bn.eps = 0.5
    return self.both(x)


def set_a_setting_by_another_name(self, x):
    part = self.bn
    part.eps = 0.5
    return self.both(x)


def run_with_other_weights(self, x):
    y = torch.func.functional_call(self.conv, {"weight": self.conv.weight * 2}, (x,))
    return self.bn(y)


def hand_on_in_a_comprehension(self, x):
    y = self.both(x)
    return y.relu() if len([1 for _ in range(2) if has_type(self.bn)]) else y


def hand_on_in_a_lambda(self, x):
    y = self.both(x)
    return y.relu() if (lambda: has_type(self.bn))() else y


def take_more_than_the_first(self, x):
    return self.both(x) * len([p.dtype for p in self.parameters()])


def use_the_first(self, x):
    return self.both(x) * next(self.bn.parameters()).sum()


def use_all(self, x):
    return self.both(x) * sum(p.pow(2).sum() for p in self.parameters())


def use_all_buffers(self, x):
    return self.both(x) * sum(b.sum() for b in self.buffers())


def ask_for_the_first_dtype_and_use_it(self, x):
    first = next(self.bn.parameters())
    return self.both(x).to(first.dtype).to(first.device) * first.sum()


def no_bias(self, x):
    y = self.bn(self.plain(x))
    return y.relu() if self.plain.bias is None else y


MERGED = [take_more_than_the_first, use_the_first, use_all, use_all_buffers]
SET = [set_a_setting, set_a_setting_by_another_name]  # which is seen to be done with an example alone
STAYS = [run_with_other_weights, hand_on_in_a_comprehension, hand_on_in_a_lambda, ask_for_the_first_dtype_and_use_it]


@pytest.mark.parametrize("forward", [*MERGED, *SET, *STAYS])
def test_what_runs_is_kept_right(forward):
    model = one(forward)
    for inputs in ((), (X,)):
        refused = "Shared" if forward in STAYS or (inputs and forward in SET) else ""
        plan = says(structrep.plan(model, *inputs), int(forward in MERGED), refused)
        assert relative_error(plan.reparameterize(*inputs)(X), model(X)) < EXACT


def test_a_bias_that_is_not_there():
    model = one(no_bias)
    model.plain = nn.Conv2d(4, 4, 3, bias=False).double()
    stays(model, "self.plain.bias is None")


class Padded(nn.Conv2d):
    """Becomes a plain convolution."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Branches(nn.Module):
    """Gets a forward that is written anew, of a class that is made for it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.a(x) + self.b(x)


class Outer(nn.Module):
    def __init__(self, part, function):
        super().__init__()
        self.part, self.function = part, function

    def forward(self, x):
        y = self.part(x)
        return y.relu() if self.function(self.part) else y


def is_block(part):
    return isinstance(part, RepVGGBlock2d)


def is_padded(part):
    return type(part) is Padded


def is_branches(part):
    return type(part) is Branches


def is_of_branches(part):
    return isinstance(part, Branches)


@pytest.mark.parametrize(
    ("part", "function", "count"),
    [
        (RepVGGBlock2d(4, 4, 3, padding=1), is_block, 2),  # the convolution of each branch, with its norm
        (nn.Sequential(RepVGGBlock2d(4, 4, 3, padding=1)), is_block, 1),
        (Padded(4, 4, 3), is_padded, 0),
        (Branches(), is_branches, 0),
        (Branches(), is_of_branches, 1),
    ],
)
def test_a_block_that_is_asked_for_its_type(part, function, count):
    model = settled(Outer(copy.deepcopy(part), function))
    plan = structrep.plan(model)
    assert len(plan.merges) == count
    assert relative_error(plan.apply()(X), model(X)) < EXACT


# --- in other ways ------------------------------------------------------------------------------------------------


class AsksItsLayers(nn.Module):
    """Forwards that go by what their layers are, which a merge changes."""

    def __init__(self, question):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.question = question

    def forward(self, x):
        x = self.norm(self.conv(x))
        return x.relu() if self._holds() else x

    def _holds(self):
        if self.question == "bias":
            return self.conv.bias is None
        if self.question == "type":
            return isinstance(self.norm, nn.BatchNorm2d)
        return self.norm.eps > 0


@pytest.mark.parametrize("question", ["bias", "type", "eps"])
def test_layers_that_a_forward_asks_about_stay(question):
    check(AsksItsLayers(question), X, merges=0, refused="Shared", within=SAME)


class Asking(nn.Module):
    """Forwards that go by what a layer is, each asking in another way; a merge would change the answer."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.layers = nn.ModuleList([self.conv])
        self.how = how

    @property
    def bare(self):
        return self.conv.bias is None

    def helper(self, layer):
        return layer.bias is None

    def forward(self, x):
        y = self.norm(self.conv(x))
        return y.relu() if getattr(self, f"by_{self.how}")() else y

    def by_alias(self):
        conv = self.conv
        return conv.bias is None

    def by_property(self):
        return self.bare

    def by_children(self):
        return any(isinstance(m, nn.BatchNorm2d) for m in self.children())

    def by_parameters(self):
        return len(list(self.conv.parameters())) == 1

    def by_helper(self):
        return self.helper(self.conv)

    def by_getattr(self):
        return getattr(self, "conv").bias is None  # noqa: B009

    def by_match(self):
        match self.norm:
            case nn.BatchNorm2d():
                return True
        return False


@pytest.mark.parametrize("how", ["alias", "property", "children", "parameters", "helper", "getattr", "match"])
def test_questions_asked_in_passing(how):
    check(Asking(how), X, merges=0, refused="Shared", within=SAME)


class Summed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return (self.n(self.a(x)) + self.b(x)).relu()

    @property
    def size(self):
        return sum(one.numel() for one in self.parameters())


class Chained(Summed):
    def forward(self, x):
        return self.n(self.a(x)).relu()


class AsksLater(nn.Module):
    """On a path that is not taken it asks a part, which merges by itself, for all that it holds."""

    def __init__(self, part):
        super().__init__()
        self.part, self.low = part, False

    def forward(self, x):
        y = self.part(x)
        return y * self.ask() if self.low else y


class AsksForText(AsksLater):
    def ask(self):
        return len(str(self.part))


class AsksForShownText(AsksLater):
    def ask(self):
        return len(f"{self.part}")


class AsksForStored(AsksLater):
    def ask(self):
        return sum(p.numel() for one in self.part._modules.values() if one is not None for p in one.parameters())


class AsksForItsDict(AsksLater):
    def ask(self):
        return len([one for one in self.part.__dict__["_modules"].values() if one is not None])


class AsksByName(AsksLater):
    def ask(self):
        return getattr(self.part, "size")  # noqa: B009


class AsksForParameters(AsksLater):
    def ask(self):
        return len(list(self.part.parameters()))


class ShowsItself(AsksLater):
    def ask(self):
        return len(str(self))


@pytest.mark.parametrize("part", [Summed, Chained])
@pytest.mark.parametrize("kind", [AsksForText, AsksForShownText, AsksForStored, AsksForItsDict, AsksByName,
                                  AsksForParameters, ShowsItself])  # fmt: skip
def test_a_path_that_is_not_taken_and_asks_a_part_for_all_that_it_holds_is_guarded(kind, part):
    model, x = settled(kind(part())), X
    deploy = structrep.reparameterize(model, x)
    assert relative_error(deploy(x), model(x)) < EXACT
    assert len(list(deploy.part.parameters())) < len(list(model.part.parameters()))
    deploy.low = True
    with pytest.raises(ValueError, match="low"):
        deploy(x)


class Complains(AsksLater):
    """What an error says is no answer."""

    def forward(self, x):
        if self.low:
            raise RuntimeError(f"{self.part} is too low")
        return self.part(x)


def test_an_error_that_shows_a_part_asks_nothing():
    plan = structrep.plan(settled(Complains(Summed())), X)
    assert [merge.edit for merge in plan.merges] == ["edit"]
    assert "Complains" not in plan.diff()
