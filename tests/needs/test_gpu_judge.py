"""What `make test-gpu` takes for rounding, and the page it makes: tried where there is no GPU."""

import json
import math

import pytest
import torch

from tests.needs.gpu.__main__ import main
from tests.needs.gpu.near import Error

EPS = torch.finfo(torch.float32).eps


def test_rounding_is_near():
    assert not Error(2e-6, 1e-6, EPS).why_not
    assert not Error(EPS, 0.0, EPS).why_not, "a model may happen to be exact"


@pytest.mark.parametrize(
    ("error", "noise", "found"),
    [
        (1e-5, 1e-6, "the deploy model is off by 1.0e-05"),
        (math.inf, 1e-6, "the deploy model is off by inf"),
        (math.nan, 1e-6, "the deploy model is off by nan"),
        (math.inf, math.inf, "which shows nothing"),
        (1e-6, math.nan, "which shows nothing"),
        (5e18, 5e18, "which shows nothing"),  # both read memory that was given back
    ],
)
def test_what_is_none_is_told(error, noise, found):
    assert found in Error(error, noise, EPS).why_not


def test_one_page_of_all_processes(tmp_path):
    (tmp_path / "device.json").write_text(json.dumps("some card: torch 2"))
    (tmp_path / "1.jsonl").write_text(json.dumps(["error", "b", "float32", 2e-7, 1e-7]) + "\n")
    (tmp_path / "2.jsonl").write_text(
        json.dumps(["latency", "a", "float16", 2.0, 1.0])
        + "\n"
        + json.dumps(["error", "a", "float32", 0.0, 0.0])
        + "\n"
    )
    main(tmp_path, tmp_path / "gpu.md")
    page = (tmp_path / "gpu.md").read_text()
    assert "Written by `make test-gpu` on some card: torch 2." in page
    assert page.index("| a | float32 | 0.0e+00 |") < page.index("| b | float32 | 2.0e-07 | 1.0e-07 | 2.00 |")
    assert "| a | float16 | 2.000 | 1.000 | 2.00 |" in page


def test_no_page_of_nothing(tmp_path):
    page = tmp_path / "gpu.md"
    with pytest.raises(SystemExit, match="stays as it is"):
        main(tmp_path, page)
    assert not page.exists()
