"""docs/catalogue.md and its pictures, from the registry: `python docs/make_catalogue.py`, or `make docs`."""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
from pathlib import Path

import matplotlib
import networkx as nx
import torch
from matplotlib import pyplot
from torch import nn

import structrep
from structrep.registry import Rule, default
from structrep.terms.term import Term

HERE = Path(__file__).parent
PICTURES = HERE / "catalogue"
BLUE, GREEN, BROWN, GRAY = "#3f51b5", "#00897b", "#6d4c41", "#757575"
KINDS = {"conv": BLUE, "linear": BLUE, "norm": GREEN, "affine": GREEN, "pool": BROWN, "pad": GRAY}
REASONS = {
    "Inexact": "one of its layers would read something else outside its input",
    "Costlier": "as one layer it would take more",
}
HEAD = """# Catalogue

Every rule that structrep brings along: where it is published, what it matches, and what its own example becomes. Made
from the registry by `docs/make_catalogue.py`; the tests hold this page to it, and `structrep.testing.check_rule` holds
each rule to its example.

Residuals around activations are carried through them, if asked for by name: [RMNet](https://arxiv.org/abs/2111.00687),
`structrep.plan(model, reserve="layer1.*")`, which takes wider layers, and is no rule.

All merges are exact or refused: the [border law](algebra.md#the-border-law) holds for what pads, branches must give
outputs of one size, and the merged layer must not be dearer. What is nearly of a family's structure and is not merged
stands with each.

What is said of published conversions was measured once, with torch 2.13 on a CPU and weights as training leaves
them, with the code of the repository and commit named: the largest difference of the outputs before and after,
relative to the largest output.
Their code is not part of this project.

```python
from torch import nn

import structrep
from structrep.registry import default
```
"""


def catalogue() -> str:
    """The page."""
    return "\n".join([HEAD, *(section(rule) for rule in default if rule.built_in and not rule.law), laws()])


def section(rule: Rule) -> str:
    assert rule.example is not None
    torch.manual_seed(0)
    model = nn.Sequential(rule.example()).eval()
    (merge,) = structrep.plan(model, rules=[rule]).merges
    deploy = structrep.reparameterize(model, rules=[rule])
    before, after = counts(model), counts(deploy)
    body = inspect.getsource(rule.merge)
    line = textwrap.dedent(body[body.index("def ") :]).strip()
    rows = ", ".join(f"{before[name]:,} → {after[name]:,} {name}" for name in before if before[name])
    rows += f", {merge.multiply_adds[0]:,.0f} → {merge.multiply_adds[1]:,.0f} multiply-adds a pixel"
    wider = ", ".join(f"`{name}`" for name in rule.narrower_than)
    narrower = f"\nNarrower than {wider}, and tried before.\n" if wider else ""
    published = f"\nPublished conversions: {rule.published}\n" if rule.published else ""
    return f"""## {rule.name}

{rule.source}

![{rule.name}: training time and deploy](catalogue/{rule.name}.svg)

```text title="pattern"
{rule.pattern}
```

```py title="merge"
{line}
```

Its example, `{ast.unparse(argument(rule, "example"))}`: {rows}.

```python
model = nn.Sequential(default["{rule.name}"].example()).eval()
deploy = structrep.reparameterize(model)
```
{near(rule)}{narrower}{published}"""


def declared(rule: Rule) -> ast.Call:
    """The call of the decorator that registers a rule, as it is written in the rule's page."""
    tree = ast.parse(inspect.getsource(inspect.getmodule(rule.merge)))  # type: ignore[arg-type]
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    (call,) = next(one for one in functions if one.name == rule.merge.__name__).decorator_list
    assert isinstance(call, ast.Call)
    return call


def argument(rule: Rule, name: str) -> ast.expr:
    """What a rule is given by that name."""
    found = next(keyword.value for keyword in declared(rule).keywords if keyword.arg == name)
    return found.body if isinstance(found, ast.Lambda) else found


def near(rule: Rule) -> str:
    """What is nearly of a rule's structure and not merged to it, and why."""
    if not rule.counter_examples:
        return ""
    given = argument(rule, "counter_examples")
    assert isinstance(given, ast.List)
    makers = [one.elts[1] for one in given.elts if isinstance(one, ast.Tuple)]
    told = [f"({kind}: {REASONS[kind]})" if kind else "(not its pattern)" for kind, _ in rule.counter_examples]
    lines = [
        f"- `{ast.unparse(maker.body if isinstance(maker, ast.Lambda) else maker)}` {why}"
        for maker, why in zip(makers, told, strict=True)
    ]
    return "\n".join(["", "Nearly so, and not merged:", "", *lines, ""])


def counts(model: nn.Module) -> dict[str, int]:
    """Layers that hold numbers, by kind, and additions that the forward pass runs."""
    modules = list(model.modules())
    kinds = {"convs": (nn.modules.conv._ConvNd,), "linears": (nn.Linear,), "norms": (nn.modules.batchnorm._NormBase,)}
    found = {name: sum(isinstance(m, types) for m in modules) for name, types in kinds.items()}
    return {**found, "parameters": sum(p.numel() for p in model.parameters())}


def laws() -> str:
    rows = [f"| `{rule.name}` | {rule.source} | `{rule.pattern}` |" for rule in default if rule.law]
    return "\n".join(["## The laws", "", "Tried after all families, for terms that no paper named.", "",
                      "| law | what it says | of terms |", "| --- | --- | --- |", *rows, ""])  # fmt: skip


# --- pictures --------------------------------------------------------------------------------------------------------


def picture(rule: Rule) -> bytes:
    """An SVG of the term that a rule's example is, left, and of the layer that it becomes, right."""
    assert rule.example is not None
    torch.manual_seed(0)
    plan = structrep.plan(nn.Sequential(rule.example()).eval(), rules=[rule])
    (term,), (merge,) = plan.terms, plan.merges
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_node("in", text="x", at=(0, 0), color=GRAY)
    last, height = _draw(graph, term, "in", 0)
    depth = graph.nodes[last]["at"][0] + 1
    middle = graph.nodes[last]["at"][1]
    graph.nodes["in"]["at"] = (0, middle)
    graph.add_node("out", text="y", at=(depth, middle), color=GRAY)
    graph.add_edge(last, "out")
    plain: nx.DiGraph = nx.DiGraph()
    for index, (text, color) in enumerate((("x", GRAY), (merge.after, BLUE), ("y", GRAY))):
        plain.add_node(index, text=text, at=(index, middle), color=color)
    plain.add_edges_from([(0, 1), (1, 2)])
    matplotlib.rcParams.update({"svg.hashsalt": rule.name, "svg.fonttype": "none", "font.size": 9})
    figure, axes = pyplot.subplots(
        1, 2, figsize=(depth + 4, 0.7 + 0.5 * height), width_ratios=[depth, 3], layout="constrained", sharey=True
    )
    for ax, one, title in zip(axes, (graph, plain), ("training time", "deploy"), strict=True):
        places = dict(one.nodes(data="at"))
        nx.draw_networkx_edges(one, places, ax=ax, edge_color="#9e9e9e", node_size=900, arrowsize=8)
        for node, data in one.nodes(data=True):
            box = {"boxstyle": "round,pad=0.35", "facecolor": data["color"], "edgecolor": "none"}
            ax.text(*places[node], data["text"], ha="center", va="center", color="white", bbox=box)
        ax.set(xlim=(-0.5, max(x for x, _ in places.values()) + 0.5), ylim=(-height + 0.4, 0.6))
        ax.set_title(title, color="#757575")
        ax.axis("off")
    out = io.BytesIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return re.sub(rb"[ \t]+\n", b"\n", out.getvalue())


def _draw(graph: nx.DiGraph, term: Term, source: str, row: int) -> tuple[str, int]:
    """Add a term behind a node, its branches from a row downwards; gives its last node and how many rows it takes."""
    depth = graph.nodes[source]["at"][0]
    if term.op == "one":
        return source, 1
    if term.op == "leaf":
        assert term.layer is not None
        name = f"n{len(graph)}"
        graph.add_node(name, text=str(term.layer), at=(depth + 1, -row), color=KINDS.get(term.layer.kind, GRAY))
        graph.add_edge(source, name)
        return name, 1
    height, ends = 0, []
    if term.op == "seq":
        for part in term.parts:
            source, tall = _draw(graph, part, source, row)
            height = max(height, tall)
        return source, height
    for part in term.parts:
        end, tall = _draw(graph, part, source, row + height)
        ends.append(end)
        height += tall
    deepest = max(graph.nodes[end]["at"][0] for end in ends)
    name = f"n{len(graph)}"
    middle = -row - (height - 1) / 2
    graph.add_node(name, text="+" if term.op == "sum" else "|", at=(deepest + 1, middle), color="#e65100")
    graph.add_edges_from((end, name) for end in ends)
    return name, height


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    (HERE / "catalogue.md").write_text(catalogue())
    for rule in default:
        if rule.built_in and not rule.law:
            (PICTURES / f"{rule.name}.svg").write_bytes(picture(rule))


if __name__ == "__main__":
    main()
