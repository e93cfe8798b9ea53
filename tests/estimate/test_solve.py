"""The inverse question, held against the estimate on both sides of its answer."""

import json
import random

import pytest

from estimators import InputError, estimate
from estimators.models.published import KNOWN
from estimators.planning.solve import LARGEST, solve
from memopt.cli import main

SETTINGS = 6
MODELS = {
    name: {**KNOWN[name], **{k: 3 for k in KNOWN[name] if k in ("num_hidden_layers", "n_layer", "num_layers")}}
    for name in ("gpt2", "qwen3-0.6b", "smollm2-135m", "bert-base-uncased", "t5-small", "pythia-70m")
}
VALUES = {
    "checkpointing": ("none", "full", "every-2"),
    "attention": ("sdpa", "eager"),
    "loss": ("full", "chunked"),
    "outputs": ("dropped", "kept"),
    "weights": ("bf16", "fp32"),
    "accumulate": (1, 2),
    "batch": (1, 2),
    "seq": (64, 128),
}
SPECS = ("adamw", "adamw-8bit", "adamw-8bit/zero1", "adamw/zero3", "sgd", "adamw@cpu")


def drawn(rng):
    given = {key: rng.choice(VALUES[key]) for key in rng.sample(list(VALUES), 3)}
    given.setdefault("seq", 64)
    question = rng.choice([*(("largest", one) for one in LARGEST), ("smallest", "gpus")])
    return rng.choice(list(MODELS)), rng.choice(SPECS), question, given


@pytest.mark.parametrize("count", [SETTINGS, pytest.param(1_000, marks=pytest.mark.slow)])
def test_the_answer_fits_and_the_next_value_does_not(count):
    rng, answered = random.Random(20261130), 0
    for _ in range(count):
        name, spec, (way, what), given = drawn(rng)
        if what == "gpus":
            spec = "adamw/zero3"
        gpu = rng.choice((2**31, 3 * 2**30, 2**32))
        tight = rng.random() < 0.3
        found = solve(MODELS[name], gpu, **{way: what}, optim=spec, accept_tight=tight, **given)
        good = ("FITS", "TIGHT") if tight else ("FITS",)
        case = (name, spec, what, given, gpu)
        if found.value is None:
            assert found.estimate.columns[0].verdict(gpu) not in good, case
            continue
        answered += 1
        assert found.estimate.columns[0].verdict(gpu) in good, case
        if found.beyond is not None:
            assert found.beyond.columns[0].verdict(gpu) not in good, case
            assert found.over > 0, case
        keyword = {"gpus": "world_size"}.get(what, what)
        if keyword in ("batch", "seq", "lora", "world_size"):
            again = estimate(MODELS[name], spec, gpu=gpu, **{**given, keyword: found.value})
            assert again.columns[0].process == found.estimate.columns[0].process, case
            step = -1 if what == "gpus" else 1
            assert found.beyond is None or found.beyond_value == found.value + step, case
    assert answered > count // 2


@pytest.mark.parametrize(
    ("question", "part"),
    [
        ({}, "one question"),
        ({"largest": "batch", "smallest": "gpus"}, "one question"),
        ({"largest": "width"}, "batch, seq, lora, parameters, layers-trained"),
        ({"smallest": "gpu", "gpu": "24GiB"}, "leave out gpu"),
        ({"largest": "batch", "gpu": ""}, "which card"),
        ({"smallest": "gpus"}, "/zero1"),
        ({"largest": "seq", "compile": True}, "torch.compile"),
    ],
)
def test_what_is_no_question(question, part):
    given = {"gpu": "24GiB", **question}
    with pytest.raises(InputError, match=part):
        solve("gpt2", given.pop("gpu"), **given)


def test_a_model_of_which_only_the_count_is_known_has_no_answer():
    with pytest.raises(InputError, match="no answer without"):
        solve("8B", "24GiB", largest="batch", seq=128)


def test_the_largest_sequence_ends_with_the_positions():
    found = solve("gpt2", "80GiB", largest="seq")
    assert found.value == 1024
    assert found.beyond is None
    assert "1,024 positions" in found.end


def test_the_smallest_card_is_smaller_than_none_that_fits():
    found = solve("gpt2", smallest="gpu", seq=1024, batch=8)
    assert found.estimate.fits
    assert found.beyond is not None
    assert not found.beyond.fits
    assert found.beyond.gpu <= found.estimate.gpu


class TestCommand:
    def test_one_figure_and_how_far_the_next_would_be_over(self, capsys):
        assert main(["solve", "gpt2", "--gpu", "8GiB", "--largest", "batch", "--seq", "1024"]) == 0
        out = capsys.readouterr().out
        assert "Micro-batches of up to " in out
        assert "would be over by" in out

    def test_json(self, capsys):
        argv = ["solve", "gpt2", "--gpu", "8GiB", "--largest", "lora", "--seq", "512", "--json"]
        assert main(argv) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["schema"] == "memopt.solve/1"
        assert found["process"]["high"] <= found["gpu_nbytes"]
        assert found["next"] is None or found["next"]["process"]["high"] > found["gpu_nbytes"]

    def test_nothing_fits(self, capsys):
        assert main(["solve", "gpt2-xl", "--gpu", "1GiB", "--largest", "batch"]) == 1
        assert "Nothing fits" in capsys.readouterr().out


def test_few_guesses_replay_the_allocator(monkeypatch):
    """A replay is most of an estimate's time: what is searched without it must be."""
    from estimators.allocator import replay

    replayed, count = replay.replayed, 0

    def counted(*args):
        nonlocal count
        count += 1
        return replayed(*args)

    monkeypatch.setattr(replay, "replayed", counted)
    solve("gpt2", "8GiB", largest="batch", seq=512, optim="adamw-8bit", checkpointing="full")
    assert 2 <= count <= 8
