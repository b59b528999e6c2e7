"""Pictures of a plan, and its report: what they show is what the plan says, on a page that needs nothing else."""

import re
import sys
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import structrep
from structrep.blocks import DOConv2d, RepVGGBlock2d
from structrep.errors import BadInput
from structrep.report.layout import layout
from structrep.report.steps import MOST, Place
from structrep.trace.observing import REMEDY
from tests.support.models import settled, small

VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}
HOSTILE = "<script>alert('x')</script> & \"on\""
WATCHED = "<b>watched</b>"
SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """What a browser would read: elements that are closed in order, links, ids and texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.rows, self.texts = [], Counter(), [], Counter(), []
        self.tags, self.sources = Counter(), []
        self.feed(text)
        self.close()
        assert not self.open
        self.text = "".join(self.texts)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        found = dict(attrs)
        assert not [name for name in found if name.startswith("on")]
        self.ids.update([found["id"]] if "id" in found else [])
        self.links += [found[name] for name in ("href", "xlink:href", "action") if name in found]
        self.sources += [found[name] for name in ("src", "srcset", "data") if name in found]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def read(plan, folder, *given):
    path = folder / "report.html"
    plan.report(path, *given, force=True)
    return Page(path.read_text())


class Bottle(nn.Module):
    """A chain that is refused: the second convolution reads zeros where the first would give its bias."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 3, padding=1)
        nn.init.constant_(self.first.bias, 0.5)

    def forward(self, x):
        return self.second(self.first(x))


class Wary(nn.Module):
    """A forward that cannot be followed, around a block that can."""

    def __init__(self):
        super().__init__()
        self.inner = RepVGGBlock2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.inner(x)
        return x if x.sum() > 0 else -x


@pytest.fixture(scope="module")
def several():
    """Merges, refusals, a module that is called twice, one that is left as it is, and names that are markup."""
    torch.manual_seed(0)
    twice = nn.Sequential(RepVGGBlock2d(8, 8, 3, padding=1), nn.ReLU())
    watched = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    watched[0].register_forward_hook(lambda *_: None)
    model = nn.Sequential()
    model.add_module(HOSTILE, nn.Sequential(RepVGGBlock2d(3, 8, 3, padding=1), nn.ReLU()))
    for name, part in (("bottle", Bottle()), (WATCHED, watched), ("a", twice), ("b", twice), ("wary", Wary())):
        model.add_module(name, part)
    model.add_module("last", nn.Sequential(DOConv2d(8, 8, 3), nn.BatchNorm2d(8)))
    return structrep.plan(settled(model))


X = torch.randn(1, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def page(several, tmp_path_factory):
    return read(several, tmp_path_factory.mktemp("page"), X)


def test_all_that_the_plan_says_is_there(several, page):
    assert len(several.merges) == 4
    assert {refusal.kind for refusal in several.refusals} == {"Inexact", "Untraceable", "Hooked", "Isolated"}
    for index, merge in enumerate(several.merges, 1):
        assert page.ids[f"merge-{index}"] == 1
        assert merge.where in page.text
        assert merge.before.replace("->", "→") in page.text
    for index, refusal in enumerate(several.refusals, 1):
        assert page.ids[f"refusal-{index}"] == 1
        assert page.text.count(refusal.reason) >= 2, "in the table and on the mark in a picture"
    for source in {source for merge in several.merges for source in merge.sources}:
        assert source in page.text
    assert max(page.ids.values()) == 1


def test_links_lead_to_the_page_itself_or_to_arxiv(page):
    assert any(link.startswith("https://arxiv.org/abs/2101.03697") for link in page.links)
    inner = {link for link in page.links if link.startswith("#")}
    assert all(link[1:] in page.ids for link in inner)
    assert all(link.startswith("https://arxiv.org/abs/") for link in page.links if link not in inner)
    assert not page.sources
    assert not page.tags["script"] + page.tags["link"] + page.tags["iframe"]


def test_the_page_names_no_other_host(several, tmp_path):
    several.report(tmp_path / "page.html", X)
    text = (tmp_path / "page.html").read_text()
    hosts = re.findall(r'(?<!xmlns=")(?<!xlink=")https?://[^"\s<]+', text)
    assert hosts
    assert all(host.startswith("https://arxiv.org/abs/") for host in hosts)
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}, "clip paths of the chart"


def test_names_are_shown_and_not_run(several, page):
    assert HOSTILE in page.text
    assert any(WATCHED in refusal.reason for refusal in several.refusals)
    assert not page.tags["script"]
    for text in (several._repr_html_(), several.verify(X)._repr_html_()):
        assert f"{HOSTILE}.0" in Page(text).text
    titles = ElementTree.fromstring(several.draw()).iter(f"{SVG}title")
    assert any(HOSTILE in title.text for title in titles)


def test_tables_in_notebooks_hold_all_rows(several):
    rows = Page(several._repr_html_()).tags["tr"]
    assert rows > len(several.merges) + len(several.refusals)
    verification = several.verify(X)
    assert Page(verification._repr_html_()).tags["tr"] == 1 + len(verification.outputs) + len(verification.regions)


def test_files_are_not_replaced_unless_forced(several, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("mine")
    with pytest.raises(BadInput, match="exists: force its replacement"):
        several.report(path)
    assert path.read_text() == "mine"
    several.report(path, force=True)
    assert path.read_text().startswith("<!DOCTYPE html>")
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]


def test_without_example_inputs_the_page_asks_for_them(several, tmp_path):
    found = read(several, tmp_path)
    tiles = found.text.count("give example inputs") - found.text.count(REMEDY)  # which refusals say as well
    assert tiles == 4, "three tiles and the head"
    assert "Give example inputs" in found.text
    assert "Equal up to rounding" not in found.text


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return (self.a(x) + self.b(x)).relu()  # <b>kept</b>


def test_edited_forwards_are_shown_as_a_patch(tmp_path):
    plan = structrep.plan(settled(Written()))
    plan.report(tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert page.ids["forwards"] == 1
    assert plan.diff() in page.text
    assert "# <b>kept</b>" in plan.diff()


def test_a_model_without_merges(tmp_path):
    found = read(structrep.plan(nn.Sequential(nn.ReLU(), nn.Tanh())), tmp_path, torch.randn(2, 3))
    assert found.text.count("Nothing is merged.") == 2
    assert "Nothing was refused." in found.text


def test_what_is_off_is_called_so(several, tmp_path, monkeypatch):
    merge = several._selection.merges[0]
    right = type(merge).value
    monkeypatch.setattr(type(merge), "value", lambda self: right(self) * 1.001)
    found = read(several, tmp_path, X)
    assert "✗ Not equal." in found.text
    assert "✗ no" in found.text


def test_matplotlib_is_wanted_for_the_errors_alone(several, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BadInput, match=r"pip install 'structrep\[plot\]'"):
        several.report(tmp_path / "report.html", X)
    assert not list(tmp_path.iterdir())
    several.report(tmp_path / "report.html")
    assert several.draw().startswith("<svg")


def test_a_thousand_operations(tmp_path):
    layers = [layer for _ in range(130) for layer in (RepVGGBlock2d(2, 2, 3, padding=1), nn.ReLU())]
    plan = structrep.plan(settled(nn.Sequential(*layers)))
    path = tmp_path / "report.html"
    plan.report(path)
    assert path.stat().st_size < 3e6
    text = path.read_text()
    found = Page(text)
    assert sum(name.startswith("merge-") for name in found.ids) == 130
    pictures = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.S)]
    boxes = [sum(1 for _ in picture.iter(f"{SVG}title")) for picture in pictures]
    assert max(boxes) <= MOST + 1, "and where the value comes from"
    assert len(pictures) > 100


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_pictures_are_xml_and_can_be_of_one_module(several):
    whole = ElementTree.fromstring(several.draw())
    assert whole.tag == f"{SVG}svg"
    assert not list(whole.iter(f"{SVG}a")), "which would lead nowhere"
    titles = [title.text for title in ElementTree.fromstring(several.draw(inside="bottle")).iter(f"{SVG}title")]
    assert [title.split("\n")[0] for title in titles[:2]] == ["bottle.first: conv 1x1", "bottle.second: conv 3x3"]
    assert all("refused, chain, Inexact" in title for title in titles[:2])
    deploy = ElementTree.fromstring(several.draw(deploy=True, inside="a"))
    assert [text.text for text in deploy.iter(f"{SVG}text")].count("conv 3x3") == 2, "of its two calls"
    with pytest.raises(BadInput, match="no-such"):
        several.draw(inside="no-such")


@pytest.fixture(scope="module", params=["several", "fastvit_t8"])
def graphs(request, several):
    """The model, its deploy model, and the steps of both."""
    plan = several if request.param == "several" else structrep.plan(settled(small(request.param)))
    deploy = plan.apply()
    return plan, deploy, plan.drawing(deploy).graphs


class Executed(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("graphs", ["fastvit_t8"], indirect=True)
def test_steps_are_what_runs(graphs):
    plan, deploy, steps = graphs
    for model, graph in zip((plan._model, deploy), steps, strict=True):
        with torch.no_grad(), Executed() as executed:
            model(torch.zeros(1, 3, 64, 64, dtype=torch.float64))
        norms = sum(count for name, count in executed.counts.items() if "batch_norm" in name)
        assert sum(step.kind == "conv" for step in graph) == executed.counts["convolution"]
        assert sum(step.kind == "norm" for step in graph) == norms


def test_each_merge_is_drawn_before_and_after(graphs):
    plan, _, steps = graphs
    indices = set(range(len(plan.merges)))
    assert all({step.merge for step in graph} - {None} == indices for graph in steps)
    before, after = (Counter(step.merge for step in graph) for graph in steps)
    assert all(after[index] <= before[index] for index in indices)


def test_calls_of_one_module_are_drawn_alike(several):
    graph, _ = several.drawing().graphs
    first, second = ([(step.text, step.merge) for step in graph if Place("a", nth=nth) in step.way] for nth in (0, 1))
    assert first == second
    assert len({merge for _, merge in first} - {None}) == 1


def test_parts_share_all_steps_out(graphs):
    plan, deploy, _ = graphs
    pending = [plan.drawing(deploy).whole]
    while pending:
        part = pending.pop()
        parts = part.parts()
        for side in (0, 1):
            shared = [step for one in parts.values() for step in one.sides[side]]
            assert sorted(map(id, shared)) == sorted(map(id, part.sides[side]))
        pending += [one for one in parts.values() if one.size > 1]
        assert all(one.size < part.size or len(parts) > 1 for one in parts.values())


@given(st.randoms(use_true_random=False))
def test_boxes_are_apart_and_below_what_leads_to_them(draw):
    graph = nx.DiGraph()
    graph.add_nodes_from(range(draw.randint(1, 24)))
    pairs = [(one, other) for one in graph for other in graph if one < other]
    graph.add_edges_from((*pair, {"style": draw.choice(["", "#000"])}) for pair in draw.sample(pairs, len(pairs) // 6))
    sizes = {node: (draw.uniform(20, 200), draw.uniform(20, 50)) for node in graph}
    found = layout(graph, sizes)
    sides = {
        node: (x - sizes[node][0] / 2, x + sizes[node][0] / 2, y - sizes[node][1] / 2, y + sizes[node][1] / 2)
        for node, (x, y) in found.at.items()
    }
    assert set(sides) == set(graph)
    for one, (left, right, top, bottom) in sides.items():
        assert min(left, top, found.width - right, found.height - bottom) >= 0
        for other, (left_, right_, top_, bottom_) in sides.items():
            assert one == other or right < left_ or right_ < left or bottom < top_ or bottom_ < top
    assert all(sides[one][3] < sides[other][2] for one, other in graph.edges)
