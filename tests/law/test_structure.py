"""The layout shows the architecture: the folders are the pipeline, and imports run one way."""

import ast
import re
from pathlib import Path

import networkx as nx

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
    hidden = {inner for one in checked for inner in ast.walk(one)}
    names = set()
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "structrep":
            parts = (f"{node.module}.{alias.name}" for alias in node.names)
            names.update(part if part in FILES else node.module for part in parts)
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
    """But for laws of all, and what needs more than torch."""
    tests = ROOT / "tests"
    places = {path.relative_to(tests).parts[0] for path in tests.rglob("test_*.py")} - {"law", "needs"}
    assert {place.removeprefix("test_").removesuffix(".py") for place in places} <= set(ORDER)
