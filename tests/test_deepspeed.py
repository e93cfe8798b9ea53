"""Under DeepSpeed, rules and formats that need shapes: the numbers and the state of one process, row by row."""

from functools import cache

import flattened
import pytest
import ranks
import torch
import torch.distributed as dist
from cases import HYPER, live_nbytes

import memopt
from memopt.geometry import Rows
from memopt.kernels import loader
from memopt.pricing import state_lines

pytest.importorskip("deepspeed")
STEPS = 3
#: What kernels round otherwise than torch, relative to the largest element.
RTOL = 1e-6
#: ranks, and what runs there: spec, stage, offload to the CPU, dtype of the weights, param groups.
CASES = {
    1: [("adafactor", 2, True, "float32", 1), ("came-8bit", 3, False, "bfloat16", 1)],
    2: [("adafactor", 1, False, "float32", 2), ("came-8bit", 2, True, "float32", 1), ("lamb", 3, True, "float32", 2),
        ("adammini-8bit", 2, False, "float32", 1), ("stableadamw", 1, False, "bfloat16", 2)],
    3: [("adafactor", 3, False, "float32", 1), ("came-8bit", 3, False, "float32", 1),
        ("adamw-factored", 2, False, "float32", 2), ("adafactor", 1, False, "bfloat16", 1),
        ("lamb-8bit", 2, False, "float32", 1)],
}  # fmt: skip
ALL = [(world, case) for world, cases in CASES.items() for case in cases]


def run_case(spec, stage, offload, dtype, groups):
    engine, optimizer = flattened.started(spec, stage, offload, getattr(torch, dtype), groups)
    flattened.drive(engine, 0, STEPS)
    shapes = {name: flattened.shape_of(p) for name, p in engine.module.named_parameters()}
    predicted = memopt.price(shapes, spec, world_size=dist.get_world_size(), rank=dist.get_rank(), deepspeed=stage,
                             **HYPER.get(memopt.parse(spec).rule, {}))  # fmt: skip
    return {
        "found": flattened.found(optimizer),
        "same_ledger": groups > 1 or predicted == optimizer.ledger(),
        "same_bytes": live_nbytes(optimizer) == optimizer.ledger().nbytes,
        "explain": optimizer.explain(),
    }


def everything(world):
    return {case: run_case(*case) for case in CASES[world]}


@cache
def session(world):
    """What every rank found; the error, where there was one."""
    try:
        return ranks.run(everything, world, world)
    except Exception as error:
        return error


def whole(session, case, name, like):
    """The parameter from the elements of all ranks, each of which one rank has."""
    found = torch.full((like.numel(),), float("nan"))
    for rank in session:
        if name in rank[case]["found"]:
            start, stop, values, *_ = rank[case]["found"][name]
            assert found[start:stop].isnan().all()
            found[start:stop] = values
    return found.view(like.shape)


def same_bits(a, b):
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def rows_of(state, rows, spec, h, name):
    """The same rows of every part of one process's state."""

    def shapes(some):
        return {line.key: line.shape for line in state_lines(spec, h, name, some, "", "float32")}

    before, mine = shapes(Rows(rows.shape, 0, rows.first)), shapes(rows)
    return {
        key: x if mine[key] == tuple(x.shape) else x[before[key][0] : before[key][0] + mine[key][0]]
        for key, x in state.items()
    }


each = pytest.mark.parametrize(("world", "case"), ALL, ids=[f"{w}-" + "-".join(map(str, c)) for w, c in ALL])


@each
def test_parameters_and_state_are_those_of_one_process(world, case, monkeypatch):
    """To the bit, of the same path: what is whole on a rank goes through its kernels, sums over ranks through torch."""
    text, _, _, dtype, groups = case
    spec = memopt.parse(text)
    ways = [flattened.alone(text, STEPS, getattr(torch, dtype), groups)]
    monkeypatch.setattr(loader, "_loaded", loader.Missing("turned off"))
    ways.append(flattened.alone(text, STEPS, getattr(torch, dtype), groups))
    h = spec.resolve(HYPER.get(spec.rule, {}))
    for name, p in ways[0][0].items():
        got = whole(session(world), case, name, p)
        assert "8bit" in text or (got - p).abs().max() <= RTOL * p.abs().max(), name
        there = [rank[case]["found"][name] for rank in session(world) if name in rank[case]["found"]]
        split = sum(1 for start, stop, *_ in there if stop > start) > 1
        for way in ways if split else ways[:1]:
            pairs = [(got, way[0][name])]
            for *_, rows, state in there:
                expected = rows_of(way[1][name], Rows(*rows), spec, h, name)
                assert state.keys() == expected.keys()
                pairs += [(state[key], x) for key, x in expected.items()]
            if all(same_bits(*pair) for pair in pairs):
                break
        else:
            pytest.fail(f"{name} is of neither path")


@each
def test_bytes_of_each_rank_are_the_ledgers_and_the_price(world, case):
    for r, rank in enumerate(session(world)):
        assert rank[case]["same_ledger"], r
        assert rank[case]["same_bytes"], r
        assert "rows of the parameters behind DeepSpeed's flat vectors" in rank[case]["explain"]
        assert f"rank {r} of {world}" in rank[case]["explain"]
