"""Merges that are edits of the user's own text: what goes, what stays, and where an edit would be wrong.

Each program says which way its merge goes, and which lines its deploy forward has. Then model and deploy model are set
otherwise, and do the same.
"""

import copy
import functools
import inspect
import io
import pickle
import re
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.support import models
from tests.support.models import settled
from tests.support.truth import EXACT, relative_error, says

X = torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FACTOR = 2.0


class Many(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.n, self.m = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.many = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
        self.scale, self.nothing, self.idle = nn.Parameter(torch.rand(4, 1, 1) + 0.5), None, nn.Identity()
        self.flag, self.factor, self.rounds, self.seen = False, 1.5, 3, []

    def helper(self, x):
        return x.relu()


def made(forward, base=Many):
    return models.made(forward, base, named=getattr(forward, "method", "forward"))


def converted(forward, way, merges=1, base=Many, *inputs):
    model = made(forward, base)
    plan = structrep.plan(model, *inputs)
    assert [merge.edit for merge in plan.merges] == [way] * merges, (plan._selection.draft.unedited, plan.refusals)
    deploy = plan.apply()
    assert relative_error(deploy(X), model(X)) < EXACT
    return model, deploy


def text_of(deploy):
    lines = inspect.getsource(type(deploy).forward).splitlines()
    first = next(place for place, line in enumerate(lines) if line.lstrip().startswith("def "))
    return [line.strip() for line in lines[first + 1 :] if line.strip()]


EDITS = []


def edit(*lines):
    """A forward, and the lines that are left of it."""

    def add(forward):
        EDITS.append(pytest.param(forward, list(lines), id=forward.__name__))
        return forward

    return add


@edit("return self.reparam_conv(x).relu()  # a remark")
def an_expression(self, x):
    return (self.n(self.a(x)) + self.b(x)).relu()  # a remark


@edit("return (", "self.reparam_conv(x)", ").relu()  # fmt: skip")
def over_several_lines(self, x):
    return (
        self.n(self.a(x)) + self.b(x)
    ).relu()  # fmt: skip


@edit("y = self.reparam_conv(x)", "return y.relu()")
def by_names(self, x):
    y = self.n(self.a(x))
    z = self.b(x)
    y = y + z
    return y.relu()


@edit("x = self.reparam_conv(x)", "return x.relu()")
def by_the_name_of_the_input(self, x):
    skip = x
    x = self.a(x) + self.b(x)
    x += skip
    return x.relu()


@edit("out = self.reparam_conv(x)", "return out.relu()")
def in_a_loop(self, x):
    out = 0
    for layer in self.many:
        out = out + layer(x)
    return out.relu()


@edit("return self.reparam_conv(x).relu()")
def in_a_generator(self, x):
    return sum(layer(x) for layer in self.many).relu()


@edit("if self.scale is not None:", "raise ValueError", "return self.a(self.helper(x)).tanh()")
def of_an_expression(self, x):
    return (self.a(self.helper(x)) * self.scale).tanh()


@edit("if not (self.nothing is None):", "raise ValueError", "y = self.reparam_conv(x)", "return y.relu()")
def behind_a_part_that_is_not_there(self, x):
    if self.nothing is None:  # noqa: SIM108
        skip = 0
    else:
        skip = self.nothing(x)
    y = self.a(x) + self.b(x) + skip
    return y.relu()


@edit("x = x.relu()", "y = self.reparam_conv(x)", "return y.relu()")
def of_what_was_made_before(self, x):
    x = x.relu()
    z = self.b(x)
    y = self.a(x)
    y += z
    return y.relu()


@edit('"""Says what it does."""', "y = self.reparam_conv(x)", "return y.relu()")
def with_a_docstring(self, x):
    """Says what it does."""
    y = self.a(x); z = self.b(x)  # noqa: E702 # fmt: skip
    y = y + z
    return y.relu()


@pytest.mark.parametrize(("forward", "lines"), EDITS)
def test_what_is_left(forward, lines):
    _, deploy = converted(forward, "edit")
    assert [re.sub(r"ValueError\(.*", "ValueError", line) for line in text_of(deploy)] == lines


def test_all_else_goes_on_as_it_was():
    def forward(self, x, pre: bool = False, depth: int = 3):
        """Whatever it is called with."""
        if x.dim() == 3:
            return self.forward(x[None])[0]
        y = self.n(self.a(x)) + self.b(x)
        self.seen.append(len(self.seen))
        if pre:
            return y
        for _ in range(depth):
            y = F.relu(y) * self.factor
        return y if not self.flag else (y, self.helper(y))

    model = made(forward)
    plan = structrep.plan(model, X)
    if not plan.merges:
        pytest.skip("conditions on inputs are not followed")
    deploy = plan.apply()
    for more in ({}, {"pre": True}, {"depth": 1}, {"pre": True, "depth": 0}):
        assert relative_error(deploy(X, **more), model(X, **more)) < EXACT
    assert relative_error(deploy(X[0]), model(X[0])) < EXACT
    model.flag = deploy.flag = True
    assert relative_error(deploy(X)[1], model(X)[1]) < EXACT


def test_flags_both_ways():
    def forward(self, x, pre=False, twice=False):
        y = self.n(self.a(x)) + self.b(x)
        if twice:
            y = y * 2
        return y if pre else self.c(F.relu(y))

    model, deploy = converted(forward, "edit")
    for pre in (False, True):
        for twice in (False, True):
            assert relative_error(deploy(X, pre, twice), model(X, pre, twice)) < EXACT


# --- where an edit would be wrong ------------------------------------------------------------------------------------


def differs(model, deploy, *inputs):
    """The error that a deploy model raises; it gives what its model gives, if it raises none."""
    truth = model(*inputs)
    try:
        found = deploy(*inputs)
    except ValueError as error:
        return str(error)
    assert relative_error(found, truth) < EXACT
    return None


def returned_on_another_path(self, x):
    y = self.a(x)
    if self.flag:
        return y
    y = y + self.b(x)
    return y


def another_base_on_another_path(self, x):
    z = x
    if self.flag:
        z = x.relu()
    return (self.a(x) + self.b(z)).tanh()


def base_written_on_another_path(self, x):
    x = x * 1.25
    y = self.a(x)
    if self.flag:
        x.relu_()
    return (y + self.b(x)).tanh()


def counted_by_a_setting(self, x):
    out = 0
    for place in range(self.rounds):
        out = out + self.many[place](x)
    return out.tanh()


def a_factor_that_is_a_setting(self, x):
    return (self.n(self.a(x)) * self.factor).tanh()


def either_in_place_or_not(self, x):
    y = self.a(x)
    y = y.mul_(self.scale) if self.flag else y * self.scale
    return y.tanh()


def one_of_two_by_a_setting(self, x):
    y = self.a(x)
    y = self.b(x) if self.flag else y + self.b(x)
    return y.tanh()


@pytest.mark.parametrize(
    "forward",
    [returned_on_another_path, another_base_on_another_path, base_written_on_another_path, counted_by_a_setting,
     a_factor_that_is_a_setting, either_in_place_or_not, one_of_two_by_a_setting],
    ids=lambda forward: forward.__name__,
)  # fmt: skip
def test_another_path(forward):
    model = made(forward)
    deploy = says(structrep.plan(model), 1).reparameterize()
    assert relative_error(deploy(X), model(X)) < EXACT
    model.flag = deploy.flag = True
    model.rounds = deploy.rounds = 2
    model.factor = deploy.factor = 3.0
    error = differs(model, deploy, X)
    assert error is None or "self." in error


def test_a_name_that_is_deleted():
    def forward(self, x):
        y = self.a(x)
        z = self.b(x)
        y = y + z
        del z
        return y.relu()

    model = made(forward)
    assert differs(model, says(structrep.plan(model), 1).reparameterize(), X) is None


def test_a_cast_stays():
    """As the norms of language models do: what is done in another dtype comes back."""

    def forward(self, x):
        kind = x.dtype
        y = x.to(torch.float64).tanh()
        return self.a(self.scale * y.to(kind)).tanh()

    model, deploy = converted(forward, "edit")
    assert text_of(deploy)[-1] == "return self.a(y.to(kind)).tanh()"
    x = X.float()
    assert relative_error(deploy.float()(x), model.float()(x)) < 1e-5


def test_a_tensor_that_is_asked_for_stays_and_is_guarded():
    def forward(self, x):
        y = self.a(x)
        return (y * self.scale if self.scale is not None else y + 1).tanh()

    model, deploy = converted(forward, "edit")
    assert text_of(deploy)[-1] == "return (y if self.scale is not None else y + 1).tanh()"
    model.scale = deploy.scale = None
    assert "self.scale is None now" in differs(model, deploy, X)


def test_a_setting_that_computes_in_place_is_of_no_matter():
    def forward(self, x):
        y = self.n(self.a(x))
        return (y.mul_(self.scale) if self.flag else y * self.scale).tanh()

    model, deploy = converted(forward, "edit")
    assert text_of(deploy)[-1] == "return (y).tanh()"
    model.flag = deploy.flag = True
    assert differs(model, deploy, X) is None


def test_a_setting_that_computes_something_else_in_place_is_guarded():
    def forward(self, x):
        y = self.n(self.a(x))
        return (y.add_(self.scale) if self.flag else y * self.scale).tanh()

    model = made(forward)
    deploy = says(structrep.plan(model), 1).reparameterize()
    model.flag = deploy.flag = True
    assert "flag" in (differs(model, deploy, X) or "flag")


def test_a_list_that_is_filled_is_no_write():
    def forward(self, x):
        found = []
        y = self.a(x)
        y = self.n(y) + self.b(x)
        found.append(y)
        if self.flag:
            found.append(x)
        return torch.cat(found, 1)

    model, deploy = converted(forward, "edit")
    assert "found.append(y)" in text_of(deploy)
    model.flag = deploy.flag = True
    assert differs(model, deploy, X) is None


def test_a_name_that_the_class_finds_itself():
    class Finding(Many):
        def __getattr__(self, name):
            return 1.5 if name == "gain" else super().__getattr__(name)

    def forward(self, x):
        return (self.n(self.a(x)) * getattr(self, "gain", 2.0)).tanh()

    model = made(forward, Finding)
    deploy = structrep.reparameterize(model)
    model.gain = deploy.gain = 3.0
    assert "gain" in differs(model, deploy, X)


def test_a_module_by_another_name():
    def forward(me, x):
        out = 0
        for place in range(me.rounds):
            out = out + me.many[place](x)
        return out.tanh()

    model, deploy = converted(forward, "edit")
    model.rounds = deploy.rounds = 2
    assert "rounds" in differs(model, deploy, X)


def test_arguments_that_a_loop_goes_by():
    def forward(self, x, rounds=3):
        out = 0
        for place in range(rounds):
            out = out + self.many[place](x)
        return out.tanh()

    model = made(forward)
    deploy = structrep.reparameterize(model)
    assert differs(model, deploy, X) is None
    assert "rounds" in differs(model, deploy, X, 2)


def test_what_is_done_beside():
    """A call that is more than what is merged keeps its statement, and so the merge from being an edit."""

    def forward(self, x):
        y = self.a(x)
        z = self.b(remember(self.seen, x))
        return (y + z).tanh()

    def remember(seen, value):
        seen.append(1)
        return value

    forward.__globals__["remember"] = remember
    model = made(forward)
    deploy = structrep.reparameterize(model)
    before = len(deploy.seen)
    deploy(X)
    assert len(deploy.seen) == before + 1


def test_a_setting_of_the_file_that_a_merge_goes_by(monkeypatch):
    def forward(self, x):
        return (self.n(self.a(x)) * FACTOR).tanh()

    model, deploy = made(forward), structrep.reparameterize(made(forward))
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3.0)
    assert differs(model, deploy, X) not in (None, "")


def test_a_layer_that_another_path_runs_stays():
    def forward(self, x):
        if self.flag:
            return self.a(x).tanh()
        return (self.a(x) + self.b(x)).tanh()

    model, deploy = converted(forward, "edit")
    assert isinstance(deploy.a, nn.Conv2d)
    assert deploy.b is None
    model.flag = deploy.flag = True
    assert differs(model, deploy, X) is None
    whole = structrep.reparameterize(copy.deepcopy(model), inplace=True)
    assert differs(model, whole, X) is None


# --- whatever is around a method -------------------------------------------------------------------------------------


def keeping(function):
    @functools.wraps(function)
    def wrapper(self, *args):
        return function(self, *args) * 2

    return wrapper


class Mangled(Many):
    def __init__(self):
        super().__init__()
        self.__low = 0.25

    @keeping
    def forward(self, x):
        return (self.a(x) + self.b(x)).clamp(min=self.__low)


class Inherited(Mangled):
    pass


class Calling(Many):
    def forward(self, x):
        return super().__call__(x) if False else (self.a(x) + self.b(x)) * self.of(x)

    def of(self, x):
        return x.mean() + super().helper(x).mean()


def closed():
    bound = 0.125

    class Closed(Many):
        def forward(self, x):
            y = self.a(x) + self.b(x)
            return y.clamp(min=bound) + super().helper(x)

    return Closed


@pytest.mark.parametrize(
    "cls", [Mangled, Inherited, Calling, closed()], ids=["mangled", "inherited", "calling", "closed"]
)
def test_surroundings(cls):
    torch.manual_seed(0)
    model = settled(cls())
    plan = structrep.plan(model)
    assert [merge.edit for merge in plan.merges] == ["edit"], plan._selection.draft.unedited
    deploy = plan.apply()
    assert type(deploy).__name__ == cls.__name__
    assert isinstance(deploy, cls)
    for one in (deploy, copy.deepcopy(deploy), torch.jit.trace(deploy, X), structrep.reparameterize(deploy, X)):
        assert relative_error(one(X), model(X)) < EXACT
    assert "reparam_conv" in inspect.getsource(type(deploy).forward)


def test_everywhere():
    torch.manual_seed(0)
    model = settled(Mangled())
    deploy = says(structrep.plan(model, X), 1).reparameterize(X)
    held = io.BytesIO()
    torch.save(deploy, held)
    held.seek(0)
    ways = {
        "pickled": pickle.loads(pickle.dumps(deploy)),
        "saved": torch.load(held, weights_only=False),
        "exported": torch.export.export(deploy, (X,)).module(),
        "compiled": torch.compile(deploy, backend="eager", fullgraph=True),
    }
    for way, one in ways.items():
        assert relative_error(one(X), model(X)) < EXACT, way


def test_source_that_is_not_what_runs(tmp_path, monkeypatch):
    """Where a tool has changed the code since, the text is not edited."""
    source = textwrap.dedent(
        """
        from torch import nn
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
            def forward(self, x):
                return (self.a(x) + self.b(x)).relu()
        """
    )
    file = tmp_path / "net_of_others.py"
    file.write_text(source.replace("relu", "tanh"))
    space = {"__name__": "net_of_others"}
    exec(compile(source, str(file), "exec"), space)
    model = settled(space["Net"]())
    plan = structrep.plan(model)
    assert [merge.edit for merge in plan.merges] == ["rewrite"]
    assert relative_error(plan.apply()(X), model(X)) < EXACT


# --- as a patch ------------------------------------------------------------------------------------------------------

NET = '''from torch import nn


class Block(nn.Module):
    """A block."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        # both branches
        y = self.a(x)
        z = self.b(x)
        return (y + z).relu()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = Block(), Block()

    def forward(self, x):
        return self.two(self.one(x))
'''


def test_a_patch_that_git_applies(tmp_path, monkeypatch):
    (tmp_path / "net_to_patch.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import net_to_patch

    model = settled(net_to_patch.Net())
    plan = structrep.plan(model)
    deploy = plan.apply()
    patch = plan.diff()
    assert "--- a/net_to_patch.py\n+++ b/net_to_patch.py\n@@ -10,9 +10,7 @@" in patch
    assert "+        return self.reparam_conv(x).relu()" in patch
    (tmp_path / "edits.patch").write_text(patch)
    subprocess.run(["git", "apply", "edits.patch"], check=True, cwd=tmp_path)
    del sys.modules["net_to_patch"]
    patched = __import__("net_to_patch")
    for block in (deploy.one, deploy.two):
        block.__class__ = patched.Block
    again = patched.Net()
    again._modules = deploy._modules
    assert relative_error(again(X), model(X)) < EXACT
    assert not structrep.plan(again).merges


def test_a_method_that_is_edited_in_two_ways_is_shown_and_not_applied(tmp_path, monkeypatch):
    text = NET.replace("(y + z).relu()", "(y + z + x).relu() if self.skip else (y + z).relu()")
    text = text.replace(
        "def __init__(self):\n        super().__init__()\n        self.a",
        "def __init__(self, skip=True):\n        super().__init__()\n        self.skip = skip\n        self.a",
    )
    (tmp_path / "net_of_two.py").write_text(text.replace("Block(), Block()", "Block(), Block(False)"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import net_of_two

    model = settled(net_of_two.Net())
    plan = structrep.plan(model)
    assert [merge.edit for merge in plan.merges] == ["edit", "edit"], plan._selection.draft.unedited
    rows = plan.diff().splitlines()
    assert rows
    assert all(row.startswith("# ") for row in rows)
    assert {"# one:", "# two:"} <= set(rows)
    assert relative_error(plan.apply()(X), model(X)) < EXACT


class Wrapped(nn.Conv2d):
    """As detectron2's: a convolution that holds its norm, and asks for empty inputs."""

    def __init__(self, *args, norm):
        super().__init__(*args, bias=False)
        self.norm = norm

    def forward(self, x):
        if x.numel() == 0 and self.training:
            raise ValueError("empty")
        return self.norm(super().forward(x))


def test_a_convolution_that_holds_its_norm():
    for inputs in ((), (X,)):
        model = settled(nn.Sequential(Wrapped(4, 4, 3, norm=nn.BatchNorm2d(4)), nn.ReLU()))
        plan = structrep.plan(model, *inputs)
        assert len(plan.merges) == 1, plan
        deploy = plan.apply()
        assert not any(isinstance(one, nn.BatchNorm2d) for one in deploy.modules())
        assert relative_error(deploy(X), model(X)) < EXACT
