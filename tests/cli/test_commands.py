"""What the commands print: rules, plans, explanations, help, completions."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import structrep
from structrep import __main__, registry
from structrep.cli.app import app
from structrep.cli.commands import OverlapsRecord, RulesRecord
from structrep.records.plan import PlanRecord
from tests.cli.running import failed, run

# --- rules and explain --------------------------------------------------------------------------------------------


def test_rules_shows_every_rule() -> None:
    result = run("rules")
    assert result.exit_code == 0
    assert len(registry.default) > 5
    for rule in registry.default:
        assert rule.name in result.stdout
        assert rule.source in result.stdout
    assert "[identity: [pad] -> (affine or x)]" in result.stdout  # not taken for markup


def test_rules_that_overlap() -> None:
    result = run("rules", "--overlaps")
    assert re.search(r"dbb +│ dyrep +│ dbb +│ dbb is narrower, it says", result.stdout)
    record = OverlapsRecord.model_validate_json(run("rules", "--overlaps", "--json").stdout)
    assert ("mobileone", "dyrep", "mobileone") in [(one.rule, one.other, one.credited) for one in record.overlaps]


def test_rules_as_json() -> None:
    record = RulesRecord.model_validate_json(run("rules", "--json").stdout)
    rules = list(registry.default)
    assert [rule.name for rule in record.rules] == [rule.name for rule in rules]
    assert [rule.pattern for rule in record.rules] == [str(rule.pattern) for rule in rules]
    assert [rule.kind for rule in record.rules] == ["law" if rule.law else "family" for rule in rules]


@pytest.mark.parametrize(
    ("source", "merges"),
    [
        ("timm:resnet10t", 14),
        ("torchvision:resnet18", 20),
        ("nets:Net", 1),
        ("nets:instance", 1),
        ("nets:Space.net", 1),
    ],
)
def test_explain(here: Path, source: str, merges: int) -> None:
    result = run("explain", source)
    assert result.exit_code == 0, result.output
    assert f"{merges} merge" in result.stdout
    assert ("fold_norm" if ":resnet" in source else "repvgg") in result.stdout
    assert not result.stderr


def test_explain_as_json_is_the_plan(here: Path) -> None:
    result = run("explain", "nets:Net", "--json", "--shape", "2x3x9x7", "--arg", "width=16", "--arg", "bias=False")
    record = PlanRecord.model_validate_json(result.stdout)
    (merge,) = record.merges
    assert (merge.where, merge.rules) == ("block", ("repvgg",))
    assert merge.parameters[1] == 16 * 3 * 9 + 16
    again = structrep.plan(sys.modules["nets"].Net(16, False).eval()).record
    but_for_weights = {"merges": {"__all__": {"largest"}}}
    assert again.model_dump(exclude=but_for_weights) == record.model_dump(exclude=but_for_weights)


def test_explain_shows_edits_as_a_patch(here: Path) -> None:
    rows = run("explain", "nets:Branches", "--diff").stdout.splitlines()
    assert rows[:2] == ["--- a/nets.py", "+++ b/nets.py"]
    assert [row for row in rows[2:] if row[0] in "+-"] == [
        "-        y = self.a(x)",
        "-        return (y + self.b(x)).relu()",
        "+        return self.reparam_conv(x).relu()",
    ]
    assert run("explain", "nets:Net", "--diff").stdout == ""
    assert "1 merge (1 by edits of forwards)" in run("explain", "nets:Branches").stdout


def test_explain_shows_refusals(here: Path) -> None:
    result = run("explain", "nets:Border")
    assert result.exit_code == 0
    assert "0 merges" in result.stdout
    assert "Inexact" in result.stdout


def test_explain_tells_of_two_layers_why_they_do_not_merge(here: Path) -> None:
    result = run("explain", "nets:Border", "--why", "first", "second")
    assert "first and second: (conv 1x1 -> conv 3x3) is not merged (Inexact)" in result.stdout
    assert json.loads(run("explain", "nets:Border", "--why", "first", "second", "--json").stdout)["second"] == "second"
    assert "no module named 'third'" in failed(2, "explain", "nets:Border", "--why", "first", "third")


def test_several_inputs(here: Path) -> None:
    assert run("explain", "nets:Pair", "--shape", "2x3x8x8", "--shape", "2x5").exit_code == 0
    assert "Pair does not accept inputs" in failed(2, "explain", "nets:Pair", "--shape", "2x3x8x8", "--shape", "2x6")


def test_rules_limits_to_some(here: Path) -> None:
    assert "repvgg" in run("explain", "nets:Net", "--rules", "repvgg", "--rules", "acb").stdout
    assert "0 merges" in run("explain", "nets:Net", "--rules", "acb").stdout


def test_a_rule_of_the_sources_module(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.default, "_rules", dict(registry.default._rules))
    (here / "mine.py").write_text(
        "import structrep\n"
        "from structrep.pattern import Sum, conv_norm, spatial\n"
        "from torch import nn\n"
        "@structrep.rule(Sum(conv_norm(spatial).named('a'), conv_norm(spatial).named('b')), source='here')\n"
        "def twins(a, b):\n"
        "    return a + b\n"
        "class Twins(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)\n"
        "    def forward(self, x):\n"
        "        return self.a(x) + self.b(x)\n"
    )
    assert "twins" in run("explain", "mine:Twins", "--rules", "twins").stdout


def test_what_a_model_prints_stays_out_of_the_record(here: Path) -> None:
    result = run("explain", "nets:Loud", "--json")
    assert json.loads(result.stdout)["model"] == "Loud"
    assert "made a loud net" in result.stderr


def test_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["structrep", "rules", "--json"])
    monkeypatch.delitem(sys.modules, "structrep.__main__")
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("structrep", run_name="__main__")
    assert not exit_.value.code
    assert json.loads(capsys.readouterr().out)["rules"]


def test_version_and_help() -> None:
    assert run("--version").stdout.strip()
    assert "Exit codes: 0 done; 1 refused" in run("--help").stdout


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("con", ["convert"]),
        ("explain\n", ["timm:", "torchvision:", "hf:"]),
        ("explain\nhf", ["hf:"]),
        ("explain\ntorchvision\n:\nresnet1", ["resnet101", "resnet152", "resnet18"]),  # bash parts words at colons
        ("explain\ntorchvision:resnet1", [f"torchvision:resnet{n}" for n in (101, 152, 18)]),  # or is told not to
        ("explain\ntimm\n:\nx\n--rules\nacb\n--rules\nmob", ["mobileone", "mobileone_pointwise"]),
        ("convert\nx\n--norms\n", ["fold", "keep"]),
    ],
)
def test_completion_in_bash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, completions: list[str]
) -> None:
    monkeypatch.setenv("_STRUCTREP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"structrep\n{words}")
    monkeypatch.setenv("COMP_CWORD", str(words.count("\n") + 1))
    __main__.main()
    assert sorted(capsys.readouterr().out.split()) == sorted(completions)


def test_completion_is_installed_for_bash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    result = CliRunner().invoke(app, ["--install-completion", "bash"], prog_name="structrep")
    assert result.exit_code == 0, result.output
    (script,) = (path for path in tmp_path.rglob("*") if path.is_file() and "structrep" in path.name)
    assert "_STRUCTREP_COMPLETE=complete_bash" in script.read_text()
