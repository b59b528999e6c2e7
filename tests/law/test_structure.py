"""The layout shows the architecture: the folders are the pipeline, and imports run one way."""

import ast
import re
import sys
from pathlib import Path
from types import CodeType, FrameType

import networkx as nx
import torch
from torch import nn

import structrep
from tests.support import ROOT

PACKAGE = Path(structrep.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"
FILES = {
    ".".join(("structrep", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# The one copy of the order: what a folder may import stands before it, in the table of the page.
ORDER = re.findall(r"^\| `(\w+)/?` \|", PAGE.read_text(encoding="utf-8"), re.M)
LONGEST, LARGEST = 500, 250  # lines of a module, and of a class


def _folder(module: str) -> str:
    return module.split(".")[1]


def _imports(module: str, path: Path) -> set[str]:
    """The modules that one imports, also when it is run; not those that type checkers alone see."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checked = (n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))
    hidden = {inner for one in checked for step in one.body for inner in ast.walk(step)}
    names = set()
    for node in ast.walk(tree):
        if node in hidden:
            continue
        assert not getattr(node, "level", 0), f"{module} imports by a relative name"
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "structrep":
            parts = (f"{node.module}.{alias.name}" for alias in node.names)
            names.update(part if part in FILES else node.module for part in parts)
            assert "structrep" not in names or _folder(module) in ("cli", "__main__"), f"{module} imports structrep"
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names if alias.name.startswith("structrep."))
    return names - {module, "structrep"}


IMPORTS = {module: _imports(module, path) for module, path in FILES.items() if module != "structrep"}
TIES = nx.DiGraph((module, other) for module, others in IMPORTS.items() for other in others)


def test_every_folder_is_explained() -> None:
    assert set(ORDER) == {_folder(module) for module in IMPORTS}
    assert len(set(ORDER)) == len(ORDER)


def test_imports_run_one_way() -> None:
    def later(module: str) -> set[str]:
        own = ORDER.index(_folder(module))
        return {other for other in IMPORTS[module] if ORDER.index(_folder(other)) > own}

    assert not {module: later(module) for module in IMPORTS if later(module)}, "they import what stands after them"


def test_there_is_no_circle() -> None:
    inner = TIES.subgraph(module for module in TIES if FILES[module].name != "__init__.py")
    assert not [sorted(ring) for ring in nx.strongly_connected_components(inner) if len(ring) > 1]


def test_no_private_name_is_imported() -> None:
    """What another module uses is no module's own."""
    nodes = ((module, node) for module, path in FILES.items() for node in ast.walk(ast.parse(path.read_text("utf-8"))))
    taken = [
        (module, one.name)
        for module, node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("structrep")
        for one in node.names
        if one.name.startswith("_") and not one.name.startswith("__")
    ]
    assert not taken


def test_no_rule_imports_another() -> None:
    """But for what several have, `formulas` and `branches`."""
    pages = {module for module in IMPORTS if _folder(module) == "rules" and module.count(".") == 2}
    shared = {"structrep.rules.formulas", "structrep.rules.branches"}
    assert not [(page, IMPORTS[page] & (pages - shared)) for page in pages - shared if IMPORTS[page] & (pages - shared)]


def test_modules_and_classes_can_be_read_at_a_sitting() -> None:
    texts = {module: path.read_text(encoding="utf-8") for module, path in FILES.items()}
    assert not [module for module, text in texts.items() if len(text.splitlines()) > LONGEST]
    assert not [
        f"{module}.{node.name}"
        for module, text in texts.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef) and (node.end_lineno or 0) - node.lineno >= LARGEST
    ]


def test_facts_of_nodes_have_one_home() -> None:
    """Nothing but `graph.facts` names a key of `node.meta`."""
    named = [module for module, path in FILES.items() if re.search(r"\.meta\b(?!data)", path.read_text("utf-8"))]
    assert named == ["structrep.graph.facts"]


def test_tests_are_where_the_package_has_what_they_are_about() -> None:
    """But for laws of all, what needs more than torch, and what pages say."""
    tests = ROOT / "tests"
    places = {path.relative_to(tests).parts[0] for path in tests.rglob("test_*.py")} - {"law", "needs", "pages"}
    assert {place.removeprefix("test_").removesuffix(".py") for place in places} <= set(ORDER)


# Who calls a folder that stands behind it, for it was handed that down: what watches a user's code in the place of
# torch's own functions and lookups; what gives the nodes of a graph their values; predicates and functions of rules.
HANDED_DOWN = {
    *(("process", "trace"), ("graph", "trace"), ("modules", "trace"), ("read", "trace"), ("blocks", "trace")),
    *(("graph", "prove"), ("process", "deployed"), ("modules", "deployed"), ("process", "graph"), ("blocks", "graph")),
    *(("pattern", "rules"), ("pattern", "registry"), ("registry", "rules"), ("process", "algebra")),
}


def test_a_call_runs_one_way() -> None:
    """What one conversion calls goes down the table, and never back up but by what was handed down."""
    climbs, stack = set[tuple[str, str]](), list[str]()

    def folder(code: CodeType) -> str:
        path = Path(code.co_filename)
        inside = path.is_relative_to(PACKAGE)
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py") if inside else ""
        return name if name in ORDER else stack[-1] if stack else ""

    def look(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            own = folder(frame.f_code)
            if stack and own and stack[-1] and ORDER.index(own) > ORDER.index(stack[-1]):
                climbs.add((stack[-1], own))
            stack.append(own)
        elif event == "return" and stack:
            stack.pop()

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.n(self.a(x)) + self.b(x) + x).relu()

    model, x = nn.Sequential(Block(), Block()).eval(), torch.randn(1, 4, 6, 6)
    structrep.reparameterize(model, x)  # what is imported at a first call is not looked at
    sys.setprofile(look)
    try:
        structrep.reparameterize(model, x)
    finally:
        sys.setprofile(None)
    assert climbs <= HANDED_DOWN
