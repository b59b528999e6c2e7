"""The package as it is imported: little at first, each name when it is asked for, and the catalogue always whole."""

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import structrep
from structrep import registry
from tests.support import ROOT

HEAVY = ("pydantic", "networkx", "rich", "jinja2", "typer", "onnx", "onnxruntime", "timm", "transformers", "matplotlib")
# forgets structrep, so that one process, which loads torch once, imports it in several ways
ANEW = """
def anew():
    for name in [name for name in sys.modules if name.partition(".")[0] == "structrep"]:
        del sys.modules[name]
"""


def fresh(program: str) -> str:
    """What a program prints in a process of its own."""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_importing_loads_nothing_heavy() -> None:
    heavy = f"print(*(name for name in {HEAVY} if name in sys.modules))"
    assert fresh(f"import sys, structrep; from structrep.blocks import RepVGGBlock2d; {heavy}") == ""


def test_a_plan_loads_nothing_that_only_reports_and_commands_need() -> None:
    program = """
import sys, structrep
from torch import nn
structrep.reparameterize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
print(*(name for name in ("jinja2", "typer", "matplotlib", "onnx") if name in sys.modules))
"""
    assert fresh(program) == ""


def test_every_name_is_there_and_is_that_of_the_type_checker() -> None:
    tree = ast.parse(Path(structrep.__file__).read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    homes = {
        alias.name: node.module.removeprefix("structrep.")
        for node in typed.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module != "structrep"
        for alias in node.names
    }
    assert homes == structrep._HOME
    assert sorted(homes) == structrep.__all__
    for name in structrep.__all__:
        assert not isinstance(getattr(structrep, name), ModuleType)
    assert set(structrep.__all__) <= set(dir(structrep))


def test_no_module_has_the_name_of_what_is_public() -> None:
    """It would take the name's place in the package when it is imported."""
    modules = {path.stem for path in Path(structrep.__file__).parent.iterdir()}
    assert modules.isdisjoint(structrep.__all__)


def test_the_catalogue_is_whole_and_in_order_whoever_comes_first() -> None:
    program = f"""
import sys
{ANEW}
for first in (
    "import structrep; rules = structrep.registry.default",
    "from structrep.registry import default as rules",
    "from structrep.rules import laws; from structrep.registry import default as rules",
    "import structrep; structrep.rule; from structrep.registry import default as rules",
    "import structrep.pattern, structrep.blocks, structrep.testing; rules = structrep.registry.default",
):
    anew()
    exec(first)
    print(*rules._rules)
"""
    ours = [name for name, rule in registry.default._rules.items() if rule.built_in]
    assert [line.split() for line in fresh(program).splitlines()] == [ours] * 5


def test_modules_are_attributes_and_nothing_else_is() -> None:
    program = """
import structrep
for name in ("algebra", "blocks", "errors", "pattern", "report", "testing", "integrations"):
    assert getattr(structrep, name).__name__ == f"structrep.{name}"
assert not hasattr(structrep, "nothing") and not hasattr(structrep, "_nothing")
try:
    structrep.reparametrize
except AttributeError as error:
    print(error)
import pydoc
assert "reparameterize(model" in pydoc.render_doc(structrep, renderer=pydoc.plaintext)
"""
    assert fresh(program) == "module 'structrep' has no attribute 'reparametrize'"


def test_a_merged_model_is_loaded_where_nobody_imported_structrep(tmp_path: Path) -> None:
    (tmp_path / "mynet.py").write_text("""
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.point = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.dense(x) + self.point(x)
""")
    file = tmp_path / "deploy.pt"
    here = f"import sys, torch; sys.path.insert(0, {str(tmp_path)!r})"
    fresh(
        f"{here}\nimport mynet, structrep\n"
        f"torch.save(structrep.reparameterize(mynet.Net().eval()), {str(file)!r}, pickle_protocol=2)"
    )
    program = f"""{here}
model = torch.load({str(file)!r}, weights_only=False)
print(tuple(model(torch.randn(1, 3, 5, 5)).shape), "structrep.match" in sys.modules)
"""
    assert fresh(program) == "(1, 4, 5, 5) False"


def test_a_conversion_needs_no_numpy(tmp_path: Path) -> None:
    program = f"""
import contextlib, io, os, sys
for name in ("numpy", "onnxscript", "matplotlib"):
    sys.modules[name] = None
os.chdir({str(tmp_path)!r})
sys.path.insert(0, os.getcwd())
from structrep import __main__

def run(*arguments):
    sys.argv = ["structrep", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            __main__.main()
        except SystemExit as end:
            print(end.code, err.getvalue().strip(), file=sys.__stdout__)

open("net.py", "w").write("from torch import nn; net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))")
given = ("convert", "net:net", "--shape", "1x3x9x9", "--out")
for more in (["net.pt"], ["net.pt2"], ["net.safetensors"], ["net.onnx"], ["n.pt", "--report", "net.html"]):
    run(*given, *more)
"""
    assert fresh(program).split("\n") == [
        *("0 ", "0 "),
        "2 error: there is no module named 'numpy': pip install 'structrep[weights]'",
        "2 error: there is no module named 'onnxscript': pip install 'structrep[onnx]'",
        "2 error: there is no module named 'matplotlib': pip install 'structrep[plot]'",
    ]
    assert {path.name for path in tmp_path.iterdir() if path.suffix} == {"net.py", "net.pt", "net.pt2"}
