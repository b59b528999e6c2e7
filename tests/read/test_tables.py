"""Embeddings: linear maps of vectors with a 1 in one place. What is done with their rows is done to the table."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.support.models import Written, randomised
from tests.support.truth import check

IDS = torch.randint(0, 10, (2, 5), generator=torch.Generator().manual_seed(0))


def model(run, **more):
    layers = dict(e=nn.Embedding(10, 8), a=nn.Embedding(10, 2), b=nn.Linear(2, 8, bias=False))
    made = Written(run, **{**layers, **more})
    made.down, made.up = nn.Parameter(torch.randn(2, 10)), nn.Parameter(torch.randn(8, 2))
    made.gain = nn.Parameter(torch.rand(8))
    return made


MERGED = {
    "an adapter": lambda m, x: m.e(x) + m.b(m.a(x)),
    "an adapter, scaled": lambda m, x: m.e(x) + 0.5 * m.b(m.a(x)),
    "peft's, written out": lambda m, x: m.e(x) + (F.embedding(x, m.down.T) @ m.up.T) * 2.0,
    "a scale": lambda m, x: m.e(x) * 8**0.5,
    "a scale and a shift": lambda m, x: m.e(x) * m.gain + m.gain,
    "functional": lambda m, x: F.embedding(x, m.e.weight) + m.b(F.embedding(x, m.a.weight)),
    "two tables": lambda m, x: m.e(x) + m.other(x),
    "stacked": lambda m, x: torch.cat([m.e(x), m.a(x)], -1),
}


@pytest.mark.parametrize("run", MERGED.values(), ids=MERGED)
def test_one_table(run):
    deploy = check(model(run, other=nn.Embedding(10, 8, padding_idx=3)), IDS, IDS[0], merges=1, linear=0)
    (made,) = set(structrep.plan(randomised(model(run, other=nn.Embedding(10, 8)))).merged)
    assert isinstance(deploy.get_submodule(made), nn.Embedding)
    program = torch.export.export(deploy, (IDS,)).graph
    assert sum("embedding" in str(node.target) for node in program.nodes if node.op == "call_function") == 1


STAYS = {
    "rows that are scaled as they are looked up": ("Costlier", lambda m, x: m.normed(x) + m.b(m.a(x)).relu()),
    "other rows": ("Costlier", lambda m, x: m.e(x) + m.b(m.a(x % 3))),
    "tables of other sizes": ("Incompatible", lambda m, x: m.e(x) + m.large(x)),
    "a wide layer behind": ("Costlier", lambda m, x: m.wide(m.a(x))),
    "positions": ("", lambda m, x: m.e(x) + m.large(torch.arange(x.shape[-1]))),
}


@pytest.mark.parametrize(("kind", "run"), STAYS.values(), ids=STAYS)
def test_tables_stay(kind, run):
    more = dict(
        normed=nn.Embedding(10, 8, max_norm=1.0),
        large=nn.Embedding(12, 8),
        wide=nn.Linear(2, 64),
    )
    check(model(run, **more), IDS, merges=0, refused=kind, ways=("alone", "in place"))


def test_numbers_that_are_computed_with_too():
    """Of a row for each number, both are maps of 10 values."""
    both = model(lambda m, x: m.ten(x) + x, ten=nn.Embedding(10, 10))
    check(both, torch.arange(10), merges=0, refused="Incompatible", ways=("alone", "in place"))


def test_a_tied_table_stays():
    """A language model's head has the same numbers, and would keep them beside the merged ones."""
    tied = model(lambda m, x: m.head(m.e(x) + m.b(m.a(x))), head=nn.Linear(8, 10, bias=False))
    tied.head.weight = tied.e.weight
    deploy = check(tied, IDS, merges=0, refused="Shared Costlier")
    assert deploy.head.weight is deploy.e.weight


def test_a_table_that_a_forward_asks_for_stays():
    check(model(lambda m, x: (m.e(x) + m.b(m.a(x))).relu() @ m.e.weight.T), IDS, merges=0, refused="Shared Costlier")


def test_a_large_table_stays(monkeypatch):
    monkeypatch.setattr("structrep.match.fit.LARGEST", 79)
    check(model(MERGED["an adapter"]), IDS, merges=0, refused="Costlier")


def test_the_table_keeps_dtype_and_what_is_learned():
    half = randomised(model(MERGED["an adapter"])).to(torch.bfloat16)
    deploy = structrep.reparameterize(half)
    assert deploy.reparam_embedding.weight.dtype is torch.bfloat16
    assert deploy.reparam_embedding.weight.requires_grad
    assert structrep.plan(randomised(model(MERGED["an adapter"]))).merges[0].after == "table"


def test_a_cast_to_the_dtype_of_the_indices_is_no_cast_to_that_of_the_parameters():
    made = randomised(model(lambda m, x: m.a(x).to(x.dtype).to(m.b.weight.dtype) @ m.b.weight.T))
    for inputs in ((), (IDS,)):
        deploy = structrep.plan(made, *inputs).apply()
        assert torch.equal(deploy(IDS), made(IDS))
