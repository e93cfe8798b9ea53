"""Predicted bytes are live bytes: exactly, for every spec, line by line."""

from math import prod

import pytest
import torch

import memopt
from memopt.core.ledger import Ledger, Line
from tests.helpers.cases import CASE_IDS, CASES, live_nbytes, odd_model, train


@pytest.mark.parametrize(("spec", "hyper"), CASES, ids=CASE_IDS)
def test_predicted_bytes_are_live_bytes(spec, hyper):
    model = odd_model()
    predicted = memopt.price(model, spec, **hyper)
    opt = memopt.create(model, spec, **hyper)
    assert opt.ledger().nbytes == 0
    train(model, opt, 0, 1)
    assert live_nbytes(opt) == predicted.nbytes
    assert opt.ledger() == predicted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_ledger_does_not_depend_on_the_parameters_dtype(dtype):
    shapes = {"w": (130, 129), "b": (129,)}
    params = [(name, torch.zeros(shape, dtype=dtype, requires_grad=True)) for name, shape in shapes.items()]
    opt = memopt.create(params, "adamw-8bit")
    opt.init_state()
    assert opt.ledger() == memopt.price(shapes, "adamw-8bit")


def test_price_accepts_models_mappings_pairs_and_shapes():
    model = torch.nn.Linear(100, 50)
    by_model = memopt.price(model, "adamw-8bit").nbytes
    assert by_model == memopt.price({"weight": (50, 100), "bias": (50,)}, "adamw-8bit").nbytes
    assert by_model == memopt.price([("weight", (50, 100)), ("bias", (50,))], "adamw-8bit").nbytes
    assert by_model == memopt.price([(50, 100), (50,)], "adamw-8bit").nbytes
    assert by_model == memopt.price(list(model.parameters()), "adamw-8bit").nbytes


def test_adapters_are_in_8_bits_whatever_their_rank():
    for rank in (4, 8, 16):
        shapes = {
            "q.lora_A": (rank, 4096),
            "q.lora_B": (4096, rank),
            "k.lora_A": (rank, 4096),
            "k.lora_B": (1024, rank),
        }
        numel = sum(a * b for a, b in shapes.values())
        assert memopt.price(shapes, "adamw-8bit").nbytes <= 2.2 * numel
        ranks = [memopt.price(shapes, "adamw-8bit/zero1", world_size=3, rank=r).nbytes for r in range(3)]
        assert sum(ranks) <= 2.2 * numel


def test_meta_models_are_priced_and_ties_counted_once():
    with torch.device("meta"):
        model = odd_model()
    assert memopt.price(model, "adamw").nbytes == memopt.price(odd_model(), "adamw").nbytes


def test_frozen_parameters_cost_nothing():
    model = torch.nn.Linear(100, 50)
    model.bias.requires_grad_(False)
    opt = memopt.create(model, "adamw")
    opt.init_state()
    assert opt.ledger() == memopt.price(model, "adamw")
    assert opt.ledger().nbytes == 4 + 8 * 100 * 50


SEVEN_B = {
    f"layers.{i}.{n}": s
    for i in range(2)
    for n, s in {
        "q": (4096, 4096),
        "k": (4096, 4096),
        "v": (4096, 4096),
        "o": (4096, 4096),
        "gate": (11008, 4096),
        "up": (11008, 4096),
        "down": (4096, 11008),
    }.items()
} | {"embed": (32000, 4096), "head": (32000, 4096)}


@pytest.mark.parametrize(
    ("spec", "most"),
    [
        ("adamw-8bit", 2.04),
        ("adamw-4bit", 1.07),
        ("adafactor", 0.01),
        ("adamw-fp8", 2.04),
        ("adamw-8bit.factored", 1.03),
        ("adamw-4bit.factored", 0.54),
    ],
)
def test_bytes_per_parameter_on_the_matrices_of_a_7b_model(spec, most):
    numel = sum(r * c for r, c in SEVEN_B.values())
    assert memopt.price(SEVEN_B, spec).nbytes / numel <= most


def llama(layers, width, wide, heads_of_keys, words):
    """The parameters of a Llama 3: grouped keys and values, three matrices of the MLP, head and embedding apart."""
    shapes = {"embed": (words, width), "head": (words, width), "norm": (width,)}
    for i in range(layers):
        shapes |= {f"{i}.{name}": (width, width) for name in ("q", "o")}
        shapes |= {f"{i}.{name}": (heads_of_keys * 128, width) for name in ("k", "v")}
        shapes |= {f"{i}.gate": (wide, width), f"{i}.up": (wide, width), f"{i}.down": (width, wide)}
        shapes |= {f"{i}.{name}": (width,) for name in ("norm1", "norm2")}
    return shapes


@pytest.mark.parametrize(("spec", "most"), [("adamw-8bit.factored", 1.03), ("adamw-4bit.factored", 0.54)])
def test_bytes_per_parameter_of_llama_by_ledger_and_live(spec, most):
    """Llama-3.1-8B by the ledger; a smaller one of the family by what its state takes."""
    shapes = llama(32, 4096, 14336, 8, 128256)
    numel = sum(prod(shape) for shape in shapes.values())
    assert numel == 8_030_261_248
    assert memopt.price(shapes, spec).nbytes / numel <= most
    params = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in llama(1, 1024, 2048, 2, 2048).items()]
    opt = memopt.create(params, spec)
    for _, p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    assert live_nbytes(opt) == opt.ledger().nbytes <= most * sum(p.numel() for _, p in params)


def test_ranks_share_the_state_without_overlap_or_gap():
    """Cut parts add up to the whole; only ``step`` and the column means are on every rank."""
    shapes = {"w": (257, 130), "v": (5000,), "tiny": (2, 3), "s": ()}
    whole = {}
    for line in memopt.price(shapes, "adafactor-8bit"):
        whole[line.parameter, line.key] = line.nbytes
    for world in (1, 2, 3, 7):
        parts = {}
        for rank in range(world):
            for line in memopt.price(shapes, "adafactor-8bit/zero1", world_size=world, rank=rank):
                parts[line.parameter, line.key] = parts.get((line.parameter, line.key), 0) + line.nbytes
        for key, nbytes in whole.items():
            assert parts[key] == nbytes * (world if key[1] == "step" else 1)


def test_the_printed_ledger_ends_in_the_sum():
    ledger = Ledger(
        [Line("w", "exp_avg", "", "float32", (2,), 8, "cpu"), Line("b", "step", "", "float32", (), 4, "cpu")]
    )
    assert str(ledger).splitlines()[-1].split() == ["total", "2", "12"]
    assert ledger.by("moment", "location") == {("exp_avg", "cpu"): 8, ("step", "cpu"): 4}
    assert ledger.to_json()["lines"][0]["shape"] == [2]
    with pytest.raises(ValueError, match="'colour'"):
        ledger.by("colour")
