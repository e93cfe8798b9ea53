"""memopt.fit: exact, within the budget, and no less gentle than it has to be."""

from math import prod

import pytest

import memopt
from estimators import resolve
from memopt.pricing.fit import LADDER, fit
from memopt.spec import parse

SHAPES = list(resolve("smollm2-135m").shapes)


@pytest.fixture(scope="module")
def extremes():
    return memopt.price(SHAPES, "adamw").nbytes, memopt.price(SHAPES, "adamw-4bit.factored").nbytes


@pytest.mark.parametrize("share", [0.01, 0.1, 0.2, 0.27, 0.3, 0.5, 0.9, 0.999])
def test_within_the_budget_and_the_last_move_was_needed(extremes, share):
    budget = int(extremes[0] * share)
    if budget < extremes[1]:
        with pytest.raises(memopt.SpecError, match="the least that adamw needs is"):
            fit(SHAPES, budget)
        return
    spec = fit(SHAPES, budget)
    assert memopt.price(SHAPES, spec).nbytes <= budget
    worst = max(LADDER.index(f) for f in (spec.format, *spec.overrides.values()))
    # The largest parameter on the lowest rung in use, put back one rung, breaks the budget: nothing moved in vain.
    largest = max((prod(s), n) for n, s in SHAPES if spec.for_parameter(n)[0] == LADDER[worst])[1]
    formats = {n: spec.for_parameter(n)[0] for n, _ in SHAPES}

    def cost(fmt):
        return memopt.price(dict(SHAPES), spec.replace(format="32bit", overrides={largest: fmt})).nbytes

    gentler = next(f for f in LADDER[worst - 1 :: -1] if cost(f) > cost(LADDER[worst]))
    changed = spec.replace(format="32bit", overrides={**formats, largest: gentler})
    assert memopt.price(SHAPES, changed).nbytes > budget


def test_everything_fits_unchanged(extremes):
    assert fit(SHAPES, extremes[0]) == parse("adamw")


def test_one_byte_less_moves_one_parameter(extremes):
    spec = fit(SHAPES, extremes[0] - 1)
    assert spec.format == "32bit"
    assert list(spec.overrides.values()) == ["8bit"]


def test_embeddings_move_last(extremes):
    eight = memopt.price(SHAPES, "adamw-8bit").nbytes
    embedding = next(name for name, _ in SHAPES if "embed" in name)
    assert fit(SHAPES, eight + 2**20 * 200).for_parameter(embedding)[0] == "32bit"


def test_sizes_and_names():
    assert fit({"a[0].w": (512, 512), "b": (512, 512)}, "3MiB").overrides == {"a[[]0].w": "8bit"}
    for bad in ("3", "-1GiB", -1, True, None, "manyGiB", 1.5):
        with pytest.raises(memopt.SpecError, match="budget"):
            fit(SHAPES, bad)


def test_the_optimizer_allocates_what_was_promised():
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Embedding(300, 64), torch.nn.Linear(64, 512), torch.nn.Linear(512, 300))
    budget = memopt.price(model, "adamw").nbytes // 2
    optimizer = memopt.create(model, fit(model, budget), lr=1e-3)
    model(torch.zeros(2, dtype=torch.long)).sum().backward()
    optimizer.step()
    live = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    assert live == optimizer.ledger().nbytes <= budget
