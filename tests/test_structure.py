"""The layout shows the architecture: imports run one way."""

import ast
from pathlib import Path

import pytest

import structrep

PACKAGE = Path(structrep.__file__).parent
# What a module may import stands before it; a reader who goes in this order never meets an unknown name.
ORDER = [
    "errors",
    "process",
    "precision",
    "algebra",
    "blocks",
    "layers",
    "aten",
    "operations",
    "ranks",
    "moves",
    "answers",
    "parametrized",
    "readers",
    "dtypes",
    "pattern",
    "cost",
    "registry",
    "rules",
    "values",
    "sources",
    "states",
    "paths",
    "uses",
    "intercept",
    "contexts",
    "questions",
    "observe",
    "trace",
    "wrappers",
    "probe",
    "frames",
    "absorb",
    "borders",
    "callers",
    "sums",
    "beside",
    "search",
    "reserve",
    "expand",
    "generated",
    "otherwise",
    "guards",
    "forward",
    "rewrite",
    "markup",
    "report",
    "explain",
    "flow",
    "layout",
    "drawing",
    "regions",
    "proof",
    "files",
    "latency",
    "measured",
    "driver",
    "checkpoint",
    "monitor",
    "page",
    "integrations",
    "export",
    "models",
    "testing",
    "cli",
    "__main__",
]
# A method that hands all its work to a module which stands on this one imports it when it is called. The registry
# imports the catalogue when all of itself is there, so that whoever has the one has the other.
HANDED_ON = {("driver", "page"), ("registry", "rules")}


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("structrep."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "structrep":
            names.update(alias.name for alias in node.names if alias.name in ORDER)
        elif isinstance(node, ast.Import):
            names.update(a.name.split(".")[1] for a in node.names if a.name.startswith("structrep."))
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    assert own in ORDER, f"{own} has no place in the order of imports"
    known = {name for name in _imports(path) if name != own and (own, name) not in HANDED_ON}
    later = {name for name in known if ORDER.index(name) >= ORDER.index(own)}
    assert not later, f"{own} imports {later}, which stand after it"
