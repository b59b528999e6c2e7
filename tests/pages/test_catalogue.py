"""The catalogue says what the registry says."""

import importlib.util

import pytest

from structrep.registry import default
from tests.support import ROOT

DOCS = ROOT / "docs"
FAMILIES = [rule for rule in default if not rule.law]


@pytest.fixture(scope="module")
def made():
    pytest.importorskip("matplotlib").use("agg")
    spec = importlib.util.spec_from_file_location("make_catalogue", DOCS / "make_catalogue.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_that_of_the_registry(made):
    assert (DOCS / "catalogue.md").read_text() == made.catalogue(), "run python docs/make_catalogue.py"


@pytest.mark.parametrize("rule", FAMILIES, ids=lambda rule: rule.name)
def test_every_family_has_a_picture(rule, made):
    kept = (DOCS / "catalogue" / f"{rule.name}.svg").read_text()
    drawn = made.picture(rule).decode()
    words = [line.split(">")[1].split("<")[0] for line in drawn.splitlines() if "<text" in line]
    assert words
    assert all(word in kept for word in words)
