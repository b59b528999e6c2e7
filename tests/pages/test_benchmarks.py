"""The benchmarks run at their smallest, their arithmetic is right, and their page is that of the committed results.

Nothing is timed here: what a machine under test measures tells nothing.
"""

import copy
import json
import math
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import structrep
from benchmarks import conversion, growth, measure, memory, page, training
from structrep.blocks import RepVGGBlock2d
from tests.support.models import small

SECONDS = st.floats(1e-6, 1e3)
SAMPLES = st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=20)


# --- ratios ---------------------------------------------------------------------------------------


def _samples(pairs: list[tuple[float, float]]) -> dict[str, list[float]]:
    return {"a": [a for a, _ in pairs], "b": [b for _, b in pairs]}


@given(SAMPLES)
def test_a_thing_takes_once_as_long_as_itself(pairs):
    assert measure.ratio(_samples(pairs), "a", "a") == measure.Ratio(1, 1, 1)


@given(SAMPLES)
def test_a_median_lies_within_its_quartiles(pairs):
    found = measure.ratio(_samples(pairs), "a", "b")
    ordered = (found.low, found.median, found.high)
    assert ordered == pytest.approx(sorted(ordered))


@given(SAMPLES, st.sampled_from([0.25, 2.0, 8.0]))  # powers of two: the law holds without rounding
def test_a_ratio_scales_with_what_is_measured(pairs, times):
    samples = _samples(pairs)
    found, slower = (
        measure.ratio({**samples, "a": a}, "a", "b") for a in (samples["a"], [times * x for x in samples["a"]])
    )
    assert (slower.median, slower.low, slower.high) == (times * found.median, times * found.low, times * found.high)


@given(SAMPLES)
def test_a_ratio_does_not_see_what_slows_a_pair(pairs):
    slowed = [(2.0**index * a, 2.0**index * b) for index, (a, b) in enumerate(pairs)]
    assert measure.ratio(_samples(slowed), "a", "b") == measure.ratio(_samples(pairs), "a", "b")


def test_quartiles_of_known_pairs():
    found = measure.ratio({"a": [5, 1, 14, 2, 3, 6, 7], "b": [1, 1, 2, 0.5, 1, 1, 3.5]}, "a", "b")
    assert str(found) == "4.00 (2.50 to 5.50)"  # of 1, 2, 3, 4, 5, 6 and 7


def test_pairs_must_be_pairs():
    with pytest.raises(ValueError, match="shorter"):
        measure.ratio({"a": [1.0, 2.0], "b": [1.0]}, "a", "b")


def test_runs_take_turns():
    ran = []
    found = measure.in_turn(
        {name: partial(ran.append, name) for name in "ab"}, rounds=2, warm=1, before=lambda: ran.append("-")
    )
    assert "".join(ran) == "-a-b" * 3
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 2, "b": 2}


# --- growth ---------------------------------------------------------------------------------------


@given(st.floats(0, 3), st.floats(1e-6, 1))
def test_the_exponent_of_a_power_law(power, each):
    assert math.isclose(growth.exponent(growth.BLOCKS, [each * n**power for n in growth.BLOCKS]), power, abs_tol=1e-9)


def test_the_exponent_is_that_of_the_upper_sizes():
    assert math.isclose(growth.exponent([1, 10, 1000, 10000], [7, 7, 1, 10]), 1)
    assert math.isnan(growth.exponent([10, 1000], [1, 1]))


@pytest.mark.parametrize(("name", "make"), {**growth.DEEP, **growth.WIDE}.items())
def test_a_growing_model_merges_wholly(name, make):
    blocks = 5
    model = make(blocks, 4)
    merges = structrep.plan(model).merges
    assert len(merges) == (1 if name == "tree of linear branches" else blocks)
    assert model(torch.randn(1, 4, 8, 8)).shape == (1, 4, 8, 8)


def test_a_series_has_the_sizes_for_which_there_is_time():
    make = growth.DEEP["chain of RepVGG blocks"]
    found = growth.grow("chain", make, "blocks", (1, 2), 60)
    assert [(point.blocks, point.merges) for point in found.points] == [(1, 1), (2, 2)]
    assert found.left_out == []
    assert found.sizes() == [1, 2]
    assert all(point.plan and point.reparameterize for point in found.points)
    assert growth.row(found)[1] == f"2 x {growth.NARROW}"

    wide = growth.grow("wide", growth.WIDE["wide RepVGG blocks"], "weights", (2, 4), 0)
    assert (wide.points, wide.left_out) == ([], [2, 4])


# --- conversions, memory, training ----------------------------------------------------------------


def _toy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), RepVGGBlock2d(4, 4, 3, padding=1)
    ).eval()


def test_conversions_leave_their_model_alone_and_agree():
    model = _toy()
    before = copy.deepcopy(model.state_dict())
    one = conversion.Conversions(model, torch.randn(1, 3, 8, 8), conversion.fuse)
    seconds = measure.in_turn(one.runs(), rounds=1, warm=0, before=one.renew)
    assert set(conversion.FORMS) < seconds.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    left = conversion.result(one, partial(structrep.reparameterize, verify=False))
    assert (left["convolutions"], left["norms"], left["additions"]) == (2, 0, 0)
    assert left["error"] < 1e-5


def test_every_conversion_has_a_peer():
    assert set(conversion.MODELS.values()) == conversion.PEERS.keys()
    assert {*conversion.QUICK, *conversion.FIRST} <= conversion.MODELS.keys()


@pytest.mark.slow
def test_a_conversion_of_a_model_of_timm(monkeypatch):
    monkeypatch.setattr(conversion, "named", lambda source, options: small(source.removeprefix("timm:")))
    found = conversion.measure("timm:repvgg_a0", "timm", 1)
    assert found["left"]["structrep"]["norms"] <= found["left"]["peer"]["norms"] < found["norms"]
    assert len(conversion.row(found)) == len(conversion.COLUMNS)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is the Linux kernel's record"
)
def test_memory_is_that_beside_the_model(monkeypatch):
    monkeypatch.setattr(memory, "make", lambda name: _toy())
    assert all(0 <= memory.measure("toy", how) < 1000 for how in memory.HOW)
    found = {"model": "toy", "model_mib": 2, "largest_mib": 1, "peak_mib": {"copy": 4, "in place": 3}}
    assert memory.row(found)[-2:] == ["1.50", "3.0"]


# --- the page -------------------------------------------------------------------------------------


def test_the_page_is_that_of_the_results():
    found = page.sections()
    assert page.PAGE.read_text(encoding="utf-8") == page.text(found), "stale: python -m benchmarks.page"
    drawn = {plot.name: page.digest(plot) for section in found for plot in section.plots}
    assert {path.stem for path in page.PLOTS.glob("*.svg")} == drawn.keys()
    for name, digest in drawn.items():
        text = (page.PLOTS / f"{name}.svg").read_text(encoding="utf-8")
        assert digest in text, f"stale: {name}.svg, python -m benchmarks.page"
        loaded = re.findall(r'(?:href|src)="(?!#)([^"]*)"|url\((?!#)([^)]*)\)|@import', text)
        assert not loaded, "a plot loads nothing"


def test_the_table_of_training_is_that_of_the_results():
    text = training.PAGE.read_text(encoding="utf-8")
    assert training.page(measure.load("training-cpu")) in text, "stale: write it with benchmarks.training.page"


def test_sections_without_results_are_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    assert page.sections() == []
    points = [growth.Point(n, 8, n, n, [n / 10], [n / 5]) for n in (10, 100)]
    series = [asdict(growth.Series(by, by, points, [1000])) for by in ("blocks", "weights")]
    measure.save("growth", {"machine": measure.machine(), "series": series})
    (section,) = page.sections()
    text = str(section)
    assert "Kept in all 1; the most is 1.00." in text
    assert "| blocks | 100 | 8 | 100 | 100 | 10.00 | 20.00 | 1.00 | 1.00 | 1,000 |" in text
    page.main(tmp_path / "page.md", tmp_path / "plots")
    drawn = (tmp_path / "plots" / "growth.svg").read_text()
    assert page.digest(section.plots[0]) in drawn
    assert all(colour in drawn for colour in page.DARK.values())


def test_an_aim_says_by_how_much_it_was_missed():
    assert (
        str(page.Aim("a / b", 1.0, {"x": 0.5, "y": 1}))
        == "a / b: at most 1 was aimed at. Kept in all 2; the most is 1.00."
    )
    missed = page.Aim("a / b", 2.0, {"x": 0.5, "y": 5, "z": 3})
    assert missed.missed() == {"y": 5, "z": 3}
    assert str(missed).endswith("Missed in 2 of 3: y 2.50 times the aim, z 1.50 times the aim.")
    many = str(page.Aim("a / b", 1.0, {str(size): 1 + size / 10 for size in range(1, 12)}))
    assert many.endswith(
        "Missed in 11 of 11: 11 2.10, 10 2.00, 9 1.90, 8 1.80, 7 1.70, 6 1.60, 5 1.50, 4 1.40, "
        "and 3 more, none above 1.30."
    )
    assert page.Aim("a / b", 2.0, {"x": math.nan}).missed()


def test_results_are_json(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "new")
    measure.save("one", {"seconds": [0.5]})
    assert measure.load("one") == json.loads((tmp_path / "new" / "one.json").read_text()) == {"seconds": [0.5]}


def test_a_page_is_written_between_its_marks(tmp_path):
    where = tmp_path / "page.md"
    where.write_text("above\n<!-- one -->\nold\n<!-- end -->\nbelow\n<!-- end -->\n")
    measure.write(where, "one", measure.markdown(("a", "b"), [("1", "2")]))
    assert (
        where.read_text()
        == "above\n<!-- one -->\n| a | b |\n| --- | --- |\n| 1 | 2 |\n<!-- end -->\nbelow\n<!-- end -->\n"
    )
