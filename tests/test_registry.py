"""Installed packages bring rules and readers along; one that cannot be loaded is told and left out."""

import sys
import tomllib
import warnings
from importlib import metadata

import pytest
import torch
from torch import nn

import structrep
from structrep import Registry, Rule, registry
from structrep.read.modules import _MODULES
from structrep.testing import check_rule
from tests.support import ROOT
from tests.support.models import settled
from tests.support.truth import relative_error

PLUGIN = ROOT / "examples" / "plugin"


@pytest.fixture
def installed(monkeypatch):
    """The example plugin, as if it was installed, and what other entry points a test gives; all undone afterwards."""
    declared = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]["entry-points"]
    points = [metadata.EntryPoint(n, v, group) for group, found in declared.items() for n, v in found.items()]

    def install(*more):
        known = {group: metadata.EntryPoints(p for p in (*points, *more) if p.group == group) for group in declared}
        monkeypatch.setattr(metadata, "entry_points", lambda group: known[group])

    monkeypatch.syspath_prepend(str(PLUGIN))
    monkeypatch.setattr(registry, "_loaded", set())
    monkeypatch.setattr(registry.default, "_rules", dict(registry.default._rules))
    monkeypatch.setattr("structrep.read.modules._MODULES", dict(_MODULES))
    yield install
    for name in [name for name in sys.modules if name.startswith("structrep_twins")]:
        del sys.modules[name]


def test_a_plugin_s_rule_and_reader_are_there_without_being_asked_for(installed):
    installed()
    registry.load_plugins()
    from structrep_twins import Gained, Twins

    torch.manual_seed(0)
    model = settled(nn.Sequential(Twins(4), nn.ReLU(), Gained(4, 6), nn.BatchNorm2d(6)))
    plan = structrep.plan(model)
    assert [merge.rules for merge in plan.merges] == [("twins",), ("fold_norm",)]
    x = torch.randn(1, 4, 6, 5, dtype=torch.float64)
    assert relative_error(plan.apply()(x), model(x)) < 1e-13
    check_rule(registry.default["twins"])
    registry.load_plugins()  # once is enough


def test_a_first_plan_loads_them(installed):
    installed()
    structrep.plan(nn.ReLU().eval())
    assert "twins" in registry.default


def test_a_plugin_that_cannot_be_loaded_is_told_and_left_out(installed):
    installed(metadata.EntryPoint("lost", "no_such_package.rules", registry.RULES))
    with pytest.warns(UserWarning, match=r"structrep.rules .*lost = no_such_package.rules, could not be loaded"):
        structrep.plan(nn.ReLU().eval())
    assert "twins" in registry.default
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        structrep.plan(nn.ReLU().eval())


def test_a_rule_or_a_registry_may_be_named_itself(installed, monkeypatch):
    known = registry.default["repvgg"]
    mine = Registry()
    mine.add(Rule("renamed", known.pattern, known.merge, "mine", known.example))
    other = Rule("other", known.pattern, known.merge, "mine", known.example)
    module = type(sys)("structrep_twins_objects")
    module.mine, module.other = mine, other
    monkeypatch.setitem(sys.modules, "structrep_twins_objects", module)
    values = ("structrep_twins_objects:mine", "structrep_twins_objects:other")
    installed(*(metadata.EntryPoint(v[-5:], v, registry.RULES) for v in values))
    registry.load_plugins()
    assert {"renamed", "other", "twins"} <= {rule.name for rule in registry.default}
