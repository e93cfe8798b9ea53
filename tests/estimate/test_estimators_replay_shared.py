"""What is kept between two replays changes none: specs of a table, and the answers that follow each other."""

import random
from contextlib import suppress

import pytest

from estimators import estimate
from estimators.allocator import replay, replayed_step
from tests.estimate.test_estimators_flags import SHORT, SPECS

VALUES = {
    "seq": (16, 64, 500),
    "batch": (1, 2),
    "accumulate": (1, 2),
    "checkpointing": ("none", "full", "selective", "every-2"),
    "lora": (0, 8),
    "quantised": ("", "nf4"),
    "release_gradients": (False, True),
    "pp": (1, 2),
    "alloc_conf": (
        "",
        "expandable_segments:True",
        "max_split_size_mb:64",
        "roundup_power2_divisions:4",
        "garbage_collection_threshold:0.8",
    ),
}


@pytest.mark.parametrize("count", [60, pytest.param(3_000, marks=pytest.mark.slow)])
def test_a_replay_that_goes_on_is_one_that_begins_anew(count, monkeypatch):
    """Every replay, beside one with nothing kept, and beside one that goes on from a copy of itself."""
    rng, compared, shared = random.Random(20261201), 0, 0
    plain = replay.replayed

    def both(ran, held, *rest):
        nonlocal compared, shared
        kept = [*replayed_step._BEGUN]
        found = plain(ran, held, *rest)
        shared += kept == replayed_step._BEGUN
        assert plain(ran, held, *rest) == found  # which was kept whole
        replayed_step._BEGUN[:] = [(tape, begun._replace(found={})) for tape, begun in replayed_step._BEGUN]
        assert plain(ran, held, *rest) == found
        left = [*replayed_step._BEGUN]
        replayed_step._BEGUN.clear()
        _, alone = replay._replay(ran, held, *rest)
        alone.begin()
        assert alone.run(2) == found
        replayed_step._BEGUN[:] = left
        compared += 1
        return found

    monkeypatch.setattr(replay, "replayed", both)
    for _ in range(count):
        model, specs = SHORT[rng.choice(list(SHORT))], rng.sample(SPECS, 3)
        given = {key: rng.choice(VALUES[key]) for key in rng.sample(list(VALUES), 3)}
        with suppress(ValueError):  # settings that contradict each other
            estimate(model, specs, gpu=rng.choice((2**30, 2**34)), **{"seq": 32, **given})
    assert compared > count
    assert shared > count // 2
