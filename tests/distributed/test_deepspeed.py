"""Under DeepSpeed, rules and formats that need shapes: the numbers and the state of one process, row by row."""

from pathlib import Path
from types import SimpleNamespace
from weakref import ref

import pytest
import torch

import memopt
from memopt.checkpoint.state.detect import read_path
from memopt.core.rows import Rows
from memopt.kernels import loader
from memopt.layout.param import resolve_layout
from memopt.optim.replaced_params import flattened as flattened_partition
from memopt.partitions.deepspeed.metadata import Made, Unknown, recover
from tests.helpers import flattened
from tests.helpers.cases import HYPER
from tests.helpers.flattened import STEPS, session, session_of, whole
from tests.helpers.flattened_cases import CASES, MORE
from tests.helpers.flattened_moves import MOVED, PLACES, saved_in

pytest.importorskip("deepspeed")
#: What kernels round otherwise than torch, relative to the largest element.
RTOL = 1e-6
#: Relative error of what was encoded in other blocks of 8 bits once or twice (one encoding: 0.018).
MOVED_BOUND = 0.04
ALL = [(world, case, ()) for world, cases in CASES.items() for case in cases]
ALL += [(world, case, (pytest.mark.slow,)) for world, cases in MORE.items() for case in cases]


def same_bits(a, b):
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def rows_of(state, rows, spec, h, name):
    """The same rows of every part of one process's state."""

    def shapes(some):
        layout = resolve_layout(spec, h, name, 0, some, "float32")
        return {line.key: line.shape for line in layout.lines("")}

    before, mine = shapes(Rows(rows.shape, 0, rows.first)), shapes(rows)
    return {
        key: x if mine[key] == tuple(x.shape) else x[before[key][0] : before[key][0] + mine[key][0]]
        for key, x in state.items()
    }


each = pytest.mark.parametrize(
    ("world", "case"),
    [pytest.param(w, c, id=f"{w}-" + "-".join(map(str, c)), marks=marks) for w, c, marks in ALL],
)


@each
def test_parameters_and_state_are_those_of_one_process(world, case, monkeypatch):
    """To the bit, of the same path: what is whole on a rank goes through kernels as in one process, sums over ranks
    through kernels that sum as ranks do, or through torch where a row is cut."""
    text, _, _, dtype, groups = case
    spec = memopt.parse(text)
    dtype = getattr(torch, dtype)
    ways = [flattened.alone(text, STEPS, dtype, groups), flattened.alone(f"{text}/zero1", STEPS, dtype, groups)]
    monkeypatch.setattr(loader, "_loaded", loader.Missing("turned off"))
    ways.append(flattened.alone(text, STEPS, dtype, groups))
    for name, p in ways[0][0].items():
        got = whole(session_of(world, case), lambda rank: rank[case]["found"], name, p)
        assert "8bit" in text or (got - p).abs().max() <= RTOL * p.abs().max(), name
        there = [rank[case]["found"][name] for rank in session_of(world, case) if name in rank[case]["found"]]
        split = sum(1 for start, stop, *_ in there if stop > start) > 1
        for way in ways if split else ways[:1]:
            pairs = [(got, way[0][name])]
            for *_, rows, state in there:
                h = {**spec.hyper_for(name, tuple(p.shape)), **HYPER.get(spec.rule, {})}
                expected = rows_of(way[1][name], Rows(*rows), spec, h, name)
                assert state.keys() == expected.keys()
                pairs += [(state[key], x) for key, x in expected.items()]
            if all(same_bits(*pair) for pair in pairs):
                break
        else:
            pytest.fail(f"{name} is of neither path")


@each
def test_bytes_of_each_rank_are_the_ledgers_and_the_price(world, case):
    for r, rank in enumerate(session_of(world, case)):
        assert rank[case]["same_ledger"], r
        assert rank[case]["same_bytes"], r
        assert "rows of the parameters behind DeepSpeed's flat vectors" in rank[case]["explain"]
        assert f"rank {r} of {world}" in rank[case]["explain"]


@each
def test_a_checkpoint_goes_on_bit_for_bit(world, case):
    for rank in session_of(world, case):
        assert rank[case]["resumed"] == []


def test_statistics_of_many_parameters_share_their_collectives():
    """Six parameters, all of them cut: whether a gradient is bad, cut rows, column sums, RMS of the update; with a rate
    that their RMS scales, RMS of the parameter."""
    assert all(rank["others"]["collectives"] == {"absolute": 4, "transformers": 5} for rank in session(2))


@pytest.mark.parametrize(
    ("name", "spec", "keywords"),
    [
        ("sub-groups", "adafactor", {}),
        ("frozen", "came", {"frozen": "odder"}),
        ("overrides", "adamw-8bit", {"overrides": {"odd": "32bit"}}),
        ("host", "adafactor-8bit", {}),
        ("disk", "adamw-factored", {}),
    ],
)
def test_sub_groups_overrides_and_places(name, spec, keywords):
    """Parameters of one process, to what kernels round otherwise; of codes one in some hundred thousand is another."""
    expected, _ = flattened.alone(spec, STEPS, **keywords)
    for key, p in expected.items():
        if key == keywords.get("frozen"):
            continue
        got = whole(session(2), lambda rank: rank["others"]["found"][name][0], key, p)
        assert (got - p).abs().max() <= (1e-4 if "8bit" in spec else RTOL) * p.abs().max()
    assert ("'odd' -> 32bit" in session(2)[0]["others"]["found"][name][1]) == (name == "overrides")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "another order",
            r"'adafactor' needs the parameters' shapes.*cannot be recovered: .*round_robin_gradients.*FSDP2",
        ),
        ("tensor parallelism", "odd is cut by tensor parallelism"),
        ("offload_gradients", "takes gradients that DeepSpeed is to reduce"),
        ("partition", "its stage takes the place of /zero1"),
        ("convert_", "make the optimizer with it"),
        ("convert_ vectors", "'adafactor', which needs the parameters' shapes"),
        ("save", "save with the engine's save_checkpoint"),
        ("pickle", "use the engine's save_checkpoint"),
        ("group", "no group can be added"),
        ("cut elsewhere", "the DeepSpeed stage and with the param groups that saved it"),
        ("elastic", "elastic_checkpoint cuts codes and scales"),
        ("experts", "DeepSpeed's groups of experts .* are cut and reduced over ranks of their own"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(name, words):
    import re

    for rank in session(2):
        assert re.search(words, rank["others"]["refused"][name]), rank["others"]["refused"][name]


def test_what_carries_no_metadata_or_is_in_files_is_unknown():
    def made(p):
        return [Made("w", ref(p), tuple(p.shape), {})]

    p = torch.nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(Unknown, match="no metadata"):
        recover(made(p))
    p._z3_optimizer = SimpleNamespace(swap_optimizer=True)
    with pytest.raises(Unknown, match="nvme"):
        recover(made(p))
    gone = made(torch.nn.Parameter(torch.zeros(4, 4)))
    with pytest.raises(Unknown, match="w does not exist any more"):
        recover(gone)


def test_what_deepspeed_cannot_keep_is_refused_at_the_first_step():
    """Whatever the rule: state in files (NVMe), which are of fp32 vectors, and elastic checkpoints."""
    p = torch.nn.Parameter(torch.zeros(4, 4))
    made = [Made("w", ref(p), (4, 4), {})]
    for zero, words in ((SimpleNamespace(swap_optimizer=True), "give the spec '@disk'"),
                        (SimpleNamespace(elastic_checkpoint=True), "set it to false")):  # fmt: skip
        p._z3_optimizer = zero
        with pytest.raises(RuntimeError, match=words):
            flattened_partition(memopt.parse("adamw-8bit"), made, [{}])


MOVES = [(i, ranks) for i in range(len(MOVED)) for ranks in (2, 1)]


@pytest.mark.parametrize(("i", "ranks"), MOVES, ids=[f"{MOVED[i][0]}-{ranks}" for i, ranks in MOVES])
def test_a_checkpoint_goes_on_on_other_ranks_at_another_stage(i, ranks):
    """Weights to the bit; state, too, but for codes of vectors, whose blocks begin elsewhere. The same after a step."""
    spec = memopt.parse(MOVED[i][0])
    session(ranks)
    for on in ("", "-on"):
        there = [read_path(Path(saved_in()) / f"{i}-{world}{on}") for world in (PLACES[ranks][0], ranks)]
        assert there[0].records.keys() == there[1].records.keys()
        assert [group.hyper for group in there[0].groups] == [group.hyper for group in there[1].groups]
        for name, a in there[0].records.items():
            b, rows = there[1].records[name], Rows.whole(a.shape)
            assert (a.step, a.dtype) == (b.step, b.dtype)
            exact = not on and (spec.format == "32bit" or spec.rule == "came")
            pairs = [(a.weights(rows), b.weights(rows), not on)]
            pairs += [(a.moments[m].decode(rows), b.moments[m].decode(rows), exact) for m in a.moments]
            for x, y, bits in pairs:
                if bits:
                    assert torch.equal(x, y), name
                else:
                    assert (x - y).norm() <= MOVED_BOUND * x.norm(), name


def test_fp16_weights():
    """DeepSpeed's fp32 vectors are stepped; it refuses fp16 on a CPU, which is turned off here."""
    expected, _ = flattened.alone("adafactor", STEPS, torch.float16)
    for name, values in session(1)[0]["fp16"].items():
        assert (values - expected[name].reshape(-1)).abs().max() <= RTOL * values.abs().max(), name


def test_vectors_of_several_groups_keep_their_names():
    for rank in session(2):
        said, names, same = rank["others"]["flat"]
        assert said == []
        assert set(names) == {"0", "1"}
        assert same


def test_a_price_under_deepspeed_is_of_a_stage():
    for stage in (0, 4, True):
        with pytest.raises(memopt.SpecError, match="one of 1, 2, 3"):
            memopt.price({"a": (4, 4)}, "adafactor", world_size=2, deepspeed=stage)
    with pytest.raises(memopt.SpecError, match="takes the place of /zero2"):
        memopt.price({"a": (4, 4)}, "adafactor/zero2", world_size=2, deepspeed=2)
