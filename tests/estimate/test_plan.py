"""memopt plan: what is listed fits, nothing listed is beaten, and the limits are limits."""

import json

import pytest

from estimators import InputError, estimate
from estimators.hardware import capacity
from estimators.models.published import KNOWN
from estimators.models.resolve import resolve
from estimators.planning import plan
from estimators.planning.plan import METHODS, plans
from memopt.cli import main

GIB = 2**30
#: Where a test is about the rest of the search: one method, one kind of checkpointing.
NARROW = {"optim": ("adamw",), "checkpointing": "full"}


@pytest.fixture(scope="module")
def found():
    return plans("llama-3.2-1b", 24 * GIB, seq=1024, batch=8)


def again(p, seq, *, micro=None, tokens=None, gpu=24 * GIB):
    return estimate(
        "llama-3.2-1b",
        p.method.spec,
        gpu=gpu,
        seq=tokens or seq,
        batch=micro or p.micro_batch,
        accumulate=p.accumulate if micro is None else 1,
        checkpointing=p.checkpointing,
        lora=p.method.lora,
        quantised=p.method.quantised,
        release_gradients=p.method.release,
        **({"offload_gradients": True} if p.method.offload_gradients else {}),
    )


def test_every_plan_fits_and_has_the_batch(found):
    assert found.found
    for p in found.found:
        assert again(p, 1024).fits
        assert again(p, 1024).peak.nbytes == p.estimate.peak.nbytes
        assert p.micro_batch * p.accumulate == 8
        assert p.method == METHODS[p.level]
        assert p.why


def test_the_gentlest_is_first_and_nothing_is_beaten(found):
    costs = [p.cost for p in found.found]
    assert costs == sorted(costs)
    for i, a in enumerate(costs):
        assert not any(all(x <= y for x, y in zip(b, a, strict=True)) for j, b in enumerate(costs) if i != j)


def test_the_limits_are_limits(found):
    best = found.found[0]
    assert again(best, 1024, micro=found.largest_batch).fits
    assert not again(best, 1024, micro=found.largest_batch + max(1, found.largest_batch // 64)).fits
    assert again(best, 1024, micro=1, tokens=found.longest_seq).fits
    assert not again(best, 1024, micro=1, tokens=found.longest_seq + max(1, found.longest_seq // 64)).fits


def test_the_least_number_of_ranks():
    result = plans("llama-3.2-1b", 14 * GIB, seq=512, batch=1, **NARROW)
    assert result.ranks is not None
    for ranks, fits in ((result.ranks, True), (result.ranks - 1, False)):
        spec = "adamw/zero1" if ranks > 1 else "adamw"
        e = estimate("llama-3.2-1b", spec, gpu=14 * GIB, seq=512, checkpointing="full", world_size=ranks)
        assert e.fits is fits


def test_the_least_number_of_ranks_with_everything_sharded():
    result = plans("llama-3.2-1b", 10 * GIB, seq=512, batch=1, **NARROW)
    for ranks, fits in ((result.ranks_zero3, True), (result.ranks_zero3 - 1, False)):
        spec = "adamw/zero3" if ranks > 1 else "adamw"
        e = estimate("llama-3.2-1b", spec, gpu=10 * GIB, seq=512, checkpointing="full", world_size=ranks)
        assert e.fits is fits


def test_several_cards():
    one, four = (plans("llama-3.2-3b", 24 * GIB, seq=512, batch=2, gpus=n, checkpointing="full") for n in (1, 4))
    assert {p.sharding for p in one.found} == {""}
    assert {p.sharding for p in four.found} & {"zero2", "zero3"}
    assert four.found[0].level < one.found[0].level  # gentler
    for p in four.found:
        e = estimate(
            "llama-3.2-3b",
            p.spec,
            gpu=24 * GIB,
            seq=512,
            batch=p.micro_batch,
            accumulate=p.accumulate,
            checkpointing=p.checkpointing,
            lora=p.method.lora,
            quantised=p.method.quantised,
            release_gradients=p.method.release,
            world_size=4,
        )
        assert e.fits
        assert e.peak.nbytes == p.estimate.peak.nbytes
    for gpus in (0, True, 10**6):
        with pytest.raises(InputError, match="gpus="):
            plans("gpt2", 24 * GIB, gpus=gpus)


def test_a_smaller_card_never_has_a_gentler_plan():
    first = [plans("qwen3-0.6b", n * GIB, seq=256, batch=1, checkpointing="full").found for n in (4, 32)]
    costs = [p[0].cost if p else (99, 0, 0, 0) for p in first]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] != costs[-1]


def test_offload_comes_before_adapters():
    """All weights of an 8B model train on 24 GiB, where state and gradients are on the host."""
    first = plans("llama-3.1-8b", 24 * GIB, batch=1, checkpointing="full").found[0]
    assert (first.method.spec, first.method.offload_gradients) == ("adamw-8bit@cpu", True)
    assert first.estimate.peak.host > 30 * 10**9
    assert "of host memory" in first.why


def test_what_is_asked_for_is_held():
    given = {"checkpointing": "full", "loss": "fused", "attention": "eager"}
    for options, specs in (({}, ("adamw", "lion-8bit")), ({"lora": 8}, ()), ({"release_gradients": True}, ())):
        found = plans("llama-3.2-1b", 24 * GIB, seq=512, batch=2, optim=specs, **given, **options).found
        assert found
        for p in found:
            assert all(getattr(p.estimate.training, k) == v for k, v in {**given, **options}.items())
            assert not specs or p.spec in specs
    with pytest.raises(InputError, match="needs adapters"):
        plans("llama-3.2-1b", 24 * GIB, seq=512, quantised="nf4")


def test_a_plan_offers_no_more_tokens_than_the_model_has_positions():
    assert plans("llama-2-7b", 80 * GIB, batch=1, lora=8, optim=("adamw-8bit",)).longest_seq == 4096
    with pytest.raises(InputError, match="the model has 4096 positions"):
        plans("llama-2-7b", 80 * GIB, seq=8192)


def test_plan_and_estimate_say_the_same_of_several_cards():
    """13B: 32-bit AdamW needs more than 8 cards by the count, so no plan for 8 has it; with the count it has."""
    eight = plans("llama-2-13b", 24 * GIB, batch=1, gpus=8, checkpointing="full", optim=("adamw",))
    assert eight.ranks_zero3 > 8
    assert not eight.found
    enough = plans("llama-2-13b", 24 * GIB, batch=1, gpus=eight.ranks_zero3, checkpointing="full", optim=("adamw",))
    assert [p.spec for p in enough.found] == ["adamw/zero3"]


def test_nothing_fits(capsys):
    argv = ["plan", "llama-3.1-70b", "--gpu", "8GiB", "--seq", "512", "--batch", "1", "--checkpointing", "full"]
    assert main([*argv, "--json"]) == 1
    form = json.loads(capsys.readouterr().out)
    assert (form["plans"], form["largest_batch"]) == ([], 0)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("8B", "only shapes are known"),
        ({**KNOWN["gpt2"], "activation_function": "mish"}, "no formula for 'mish'"),
        ("lama", "neither"),
    ],
)
def test_refusals(model, sentence):
    with pytest.raises(InputError, match=sentence):
        plans(model, 24 * GIB)


def test_the_command_line(capsys):
    argv = ["plan", "llama-3.2-1b", "--gpu", "24GiB", "--seq", "1024", "--checkpointing", "full"]
    assert main([*argv, "--optim", "adamw-8bit"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("llama-3.2-1b on 24.00 GiB, 8 x 1,024 tokens per step\n\n1. ")
    assert "8 GiB more would buy: " in out
    assert main([*argv, "--optim", "adamw", "--json"]) == 0
    form = json.loads(capsys.readouterr().out)
    assert form["schema"] == "memopt.plan/1"
    assert form["plans"][0]["peak_nbytes"] <= 24 * GIB
    assert main(["plan", "llama-3.2-1b", "--gpu", "24"]) == 2
    assert "24GiB" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "gpu", "gpus"), [("gpt2", "3GiB", 1), ("llama-3.2-1b", "10GiB", 4)])
def test_the_largest_micro_batch_that_fits_is_found_without_looking_at_all(model, gpu, gpus, monkeypatch):
    asked = []

    def estimated(*args, **keywords):
        asked.append(repr((args[1:], sorted(keywords.items()))))
        return estimate(*args, **keywords)

    monkeypatch.setattr(plan, "estimate", estimated)
    described = resolve(model)
    run = plan._Runs(described, capacity(gpu))
    fitting = set()
    for level, method in enumerate(plan.METHODS if gpus == 1 else plan.METHODS[:4]):
        for sharding in plan._shardings(method, gpus):
            for checkpointing in plan.CHECKPOINTINGS:
                found = plan._largest_micro_batch(run, capacity(gpu), 512, 12, gpus, level, sharding, checkpointing)
                fits = [
                    n
                    for n in ((12,) if method.release else (12, 6, 4, 3, 2, 1))
                    if plan._fits(run(method, 512, n, 12 // n, checkpointing, gpus, sharding), capacity(gpu))
                ]
                assert (found.micro_batch if found else None) == (fits[0] if fits else None)
                fitting.add(found.micro_batch if found else 0)
    assert len(fitting) > 2  # the card is one on which it matters
    assert len(set(asked)) == len(asked), "something was estimated twice"


@pytest.mark.parametrize("batch", [0, -8, 10**18, True, 2.0])
def test_a_batch_that_is_none_is_refused_at_once(batch):
    with pytest.raises(InputError, match=r"batch=.* is not allowed; it is a whole number from 1 to 65536"):
        plans("gpt2", 8 * GIB, batch=batch)
