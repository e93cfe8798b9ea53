"""ZeRO-1 over real processes: parameters equal one process's, state is its rows, bytes are the ledger's."""

import pytest
import torch
import torch.distributed as dist

import memopt
from memopt.rules import RULES
from tests.helpers import ranks
from tests.helpers.cases import HYPER, MASTERED, SPECS, assert_same_bits, live_nbytes, odd_model, train
from tests.helpers.sharded import drive

STEPS = 6
#: A fifth of the formats of each rule here; all of them on one to four ranks in benchmarks/sharding_matrix.py.
ZERO1 = [
    *[s for s in SPECS if s.endswith("/zero1") and "@" not in s][::5],
    "adamw-8bit@paged/zero1",
    "adamw-8bit@disk/zero1",
    "adafactor-8bit@disk/zero1",
    "lookahead(adamw)-8bit/zero1",
]
ZERO1 += [s for s in MASTERED if s.endswith("/zero1")]


#: Other order of summation in the statistics of a whole tensor, relative to the largest element.
RTOL = 1e-6
#: The same, where a code at the edge of its rounding may fall to the other side and change one element's step: as a
#: share of the rate, and how many elements may differ by more than RTOL.
CODE_STEP, CODE_FLIPS = 2.0, 0.002


def build(spec):
    model = odd_model(torch.bfloat16 if "+" in spec else torch.float32)
    return model, memopt.create(model, spec, **HYPER.get(memopt.parse(spec).rule, {}))


def sharded_run(specs):
    """In each rank: every spec for a few steps, through a save and a load in the middle."""
    results = {}
    for spec in specs:
        model, opt = build(spec)
        drive(model, opt, 0, STEPS // 2)
        saved_model, saved = model.state_dict(), opt.state_dict()
        model, opt = build(spec)
        model.load_state_dict(saved_model)
        opt.load_state_dict(saved)
        drive(model, opt, STEPS // 2, STEPS - STEPS // 2)
        hyper = HYPER.get(memopt.parse(spec).rule, {})
        predicted = memopt.price(model, spec, world_size=dist.get_world_size(), rank=dist.get_rank(), **hyper)
        results[spec] = {
            "model": model.state_dict(),
            "state": [dict(opt.state[p]) for p in model.parameters()],
            "live": live_nbytes(opt),
            "same_ledger": predicted == opt.ledger(),
            "predicted": predicted.nbytes,
            "explain": opt.explain(),
        }
    return results


@pytest.fixture(scope="module")
def single():
    torch.set_num_threads(1)
    results = {}
    for spec in ZERO1:
        plain = spec.removesuffix("/zero1")
        model, opt = build(plain)
        drive(model, opt, 0, STEPS)
        results[spec] = model, opt
    return results


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 3])
def sharded(request):
    return ranks.run(sharded_run, request.param, ZERO1)


@pytest.mark.parametrize("spec", ZERO1)
def test_parameters_and_state_are_those_of_one_process(single, sharded, spec):
    model, opt = single[spec]
    parsed = memopt.parse(spec)
    exact = RULES[parsed.rule].element_wise and parsed.format != "factored"
    stays_close = parsed.format in ("32bit", "factored")
    for rank in sharded:
        for name, value in model.state_dict().items():
            if exact:
                assert_same_bits(rank[spec]["model"][name], value, name)
            elif value.numel():
                error = (rank[spec]["model"][name] - value).abs()
                beyond = error > RTOL * value.abs().max()
                assert beyond.double().mean() <= (0 if stays_close else CODE_FLIPS), name
                assert error.max() <= CODE_STEP * opt.param_groups[0]["lr"], name
    if exact:
        for i, p in enumerate(model.parameters()):
            for key, whole in opt.state[p].items():
                parts = [rank[spec]["state"][i][key] for rank in sharded]
                if key == "step":
                    assert all(torch.equal(part, whole) for part in parts)
                else:
                    assert_same_bits(torch.cat([q.reshape(-1) for q in parts]), whole.reshape(-1), key)


@pytest.mark.parametrize("spec", ZERO1)
def test_bytes_of_each_rank_are_the_ledgers(single, sharded, spec):
    for r, rank in enumerate(sharded):
        assert rank[spec]["same_ledger"], r
        assert rank[spec]["live"] == rank[spec]["predicted"]
        assert f"rank {r} of {len(sharded)}" in rank[spec]["explain"]


def test_ranks_are_balanced_to_the_row():
    shapes = {f"l{i}.w": (2048 if i % 2 else 513, 512) for i in range(8)} | {"embed": (128256, 2048)}
    world = 16
    nbytes = [memopt.price(shapes, "adamw-8bit/zero1", world_size=world, rank=r).nbytes for r in range(world)]
    whole = memopt.price(shapes, "adamw-8bit").nbytes
    one_row = sum(2 * (cols + 4 * -(-cols // 256)) for _, cols in shapes.values())
    steps = 4 * len(shapes)
    assert max(nbytes) <= whole / world + one_row + steps
    assert max(nbytes) / (sum(nbytes) / world) < 1.05


def nan_on_every_rank():
    model, opt = build("adamw-8bit/zero1")
    train(model, opt, 0, 1)
    before = [p.detach().clone() for p in model.parameters()]
    model(1).backward()
    model.vector.grad[0] = float("nan")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step()
    return opt.skipped_steps, all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_nan_skips_the_step_on_every_rank():
    assert ranks.run(nan_on_every_rank, 2) == [(1, True), (1, True)]


def test_a_launched_process_without_a_group_is_told_what_to_call(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="init_process_group"):
        memopt.create(odd_model(), "adamw/zero1")


def test_a_process_group_is_refused_by_a_spec_that_does_not_shard():
    with pytest.raises(ValueError, match="this spec is not sharded"):
        memopt.create(odd_model(), "adamw", process_group=object())
