"""Tensor, pipeline, context and expert parallelism: what one rank of many holds."""

from math import prod

import pytest

from estimators import InputError, estimate
from estimators.models.published import KNOWN
from estimators.parallel.local import splits
from estimators.parallel.schedule import most_in_flight, passes
from memopt import SpecError, price
from memopt.cli import main
from memopt.layout.model_parallel import cuts

#: A few layers of published widths.
LLAMA = {**KNOWN["llama-3.1-8b"], "num_hidden_layers": 4}
MIXTRAL = {**KNOWN["mixtral-8x7b"], "num_hidden_layers": 2}
STEP = {"seq": 256, "checkpointing": "none"}


def column(config=LLAMA, spec="adamw", **given):
    return estimate(config, spec, **{**STEP, **given})


class TestTensorParallelism:
    def test_matrices_are_cut_and_norms_are_not(self):
        whole, cut = (column(tp=tp).columns[0] for tp in (1, 4))
        norms = sum(prod(shape) for name, shape in estimate(LLAMA).model.shapes if "norm" in name)
        assert whole.nbytes("weights") - 2 * norms == 4 * (cut.nbytes("weights") - 2 * norms)
        assert 3.9 < whole.nbytes("state") / cut.nbytes("state") < 4.1
        assert column(tp=4).parameters == estimate(LLAMA).parameters

    def test_what_a_layer_saves(self):
        """Per token of a rank's part two norms, in fp32 and 16 bits, and their roots; inside, gathered inputs and a
        rank's heads and columns of the MLP."""
        tp, tokens, h, d, ffn = 4, 256, 4096, 128, 14336
        one, two = (column({**LLAMA, "num_hidden_layers": n}, tp=tp).activations.saved for n in (1, 2))
        part, heads = tokens // tp, 32 // tp + 2 * 8 // tp
        outside = part * (2 * h * 4 + 2 * h * 2 + 2 * 4)
        inside = tokens * (2 * h * 2 + heads * d * 2 + 32 // tp * (d * 2 + 4) + 4 * ffn // tp * 2)
        assert two - one == outside + inside

    def test_megatron_saves_its_part_of_what_is_gathered(self):
        gathered, again = (column(tp=4, regather=flag).activations.saved for flag in (False, True))
        # The inputs of attention and MLP in four layers, and the head's: all tokens, or this rank's part.
        assert gathered - again == (2 * 4 + 1) * (256 - 64) * 4096 * 2

    @pytest.mark.parametrize(
        ("given", "part"),
        [
            ({"tp": 3, "seq": 255}, "does not divide dimension"),
            ({"tp": 8, "seq": 100}, "multiple of tp=8"),
            ({"tp": 64, "seq": 128}, "cuts attention by its heads"),
            ({"tp": 2, "lora": 8}, "adapters"),
            ({"tp": 2, "deepspeed": True}, "deepspeed"),
            ({"regather": True}, "tp is 1"),
            ({"cp": 2, "attention": "eager"}, "ring"),
            ({"cp": 3}, "multiple of cp=3"),
            ({"pp": 4}, "accumulate=4"),
            ({"schedule": "gpipe"}, "pp is 1"),
            ({"pp": 8, "accumulate": 8}, "needs 8 layers"),
            ({"ep": 2, "world_size": 2}, "experts"),
            ({"ep": 3, "world_size": 3, "config": MIXTRAL}, "ep=3 does not divide"),
            ({"ep": 2, "config": MIXTRAL}, "divide the 1 ranks"),
            ({"replicas": 2, "world_size": 4}, "shards nothing"),
            ({"replicas": 3, "world_size": 4, "spec": "adamw/zero3"}, "divide the 4 ranks"),
            ({"tp": 0}, "whole number from 1"),
        ],
    )
    def test_what_does_not_go_together(self, given, part):
        with pytest.raises(InputError, match=part):
            column(**given)

    def test_a_family_without_a_formula_of_a_part_has_no_verdict(self):
        e = estimate("bert-base-uncased", "adamw", gpu="80GiB", seq=64, tp=2)
        assert e.activations is None
        assert e.fits is None
        assert "under tp" in e.without[0]


class TestContextParallelism:
    def test_a_sequence_is_shared_and_so_are_shards(self):
        one, two = (column(spec="adamw/zero3", world_size=2, cp=cp, seq=512 * cp) for cp in (1, 2))
        assert one.activations.saved == two.activations.saved
        assert one.columns[0].nbytes("state") > 1.9 * two.columns[0].nbytes("state")
        # Keys and values of all ranks are gathered while one attends.
        assert two.activations.forward.activations >= one.activations.forward.activations


class TestExpertParallelism:
    def test_experts_are_shared(self):
        one, two = (column(MIXTRAL, "adamw", world_size=8, ep=ep, weights="bf16").columns[0] for ep in (1, 8))
        shapes = dict(estimate(MIXTRAL).model.shapes)
        experts = sum(prod(shape) for name, shape in shapes.items() if ".experts." in name)
        assert one.nbytes("weights") - two.nbytes("weights") == 2 * (experts - experts // 8)

    def test_shards_are_as_large_as_before_and_less_is_gathered(self):
        one, two = (column(MIXTRAL, "adamw/zero3", world_size=8, ep=ep).columns[0] for ep in (1, 8))
        assert one.nbytes("state") == two.nbytes("state")
        assert one.nbytes("weights") > 1.5 * two.nbytes("weights")

    def test_rows_go_to_their_experts_and_come_back(self):
        one, two = (column(MIXTRAL, world_size=8, ep=ep).activations.saved for ep in (1, 8))
        # In two layers two orders of rows; and seven offsets fewer, of experts that are elsewhere.
        assert two - one == 2 * (2 * 256 * 2 * 8 - 7 * 4)


class TestPipeline:
    @pytest.mark.parametrize("micro_batches", [4, 5, 12, 100])
    def test_passes_are_those_of_torch(self, micro_batches):
        schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
        if not hasattr(schedules, "_get_warmup_ops"):
            pytest.skip("torch 2.6 does not have it")
        for stages in (2, 4):
            for rank in range(stages):
                most = most_in_flight("1f1b", rank, stages, 1, micro_batches)
                assert most == min(micro_batches, stages - rank)
                for chunks in (2, 3):
                    n = micro_batches - micro_batches % stages
                    warm = schedules._get_warmup_ops(rank, chunks, stages, stages, n, 2)
                    most = most_in_flight(f"interleaved-{chunks}", rank, stages, chunks, n)
                    assert most == min(warm + 1, n * chunks)

    def test_every_forward_pass_has_its_backward_pass(self):
        for schedule, chunks in (("1f1b", 1), ("gpipe", 1), ("interleaved-2", 2), ("interleaved-3", 3)):
            for rank in range(4):
                flying = [0] * chunks
                for forward, chunk in passes(schedule, rank, 4, chunks, 8):
                    flying[chunk] += 1 if forward else -1
                    assert flying[chunk] >= 0
                assert flying == [0] * chunks

    def test_layers_that_do_not_come_out_even(self):
        assert [b - a for a, b in zip(splits(7, 4), splits(7, 4)[1:], strict=False)] == [1, 2, 2, 2]
        assert sum(b - a for a, b in zip(splits(80, 7), splits(80, 7)[1:], strict=False)) == 80

    def test_stages_have_all_parameters_once(self):
        from estimators.models.resolve import resolve
        from estimators.parallel.local import Stage, staged

        model = resolve(LLAMA)
        names = [name for rank in range(4) for name, _ in staged(model, Stage(rank, 4, 1, 4)).shapes]
        assert sorted(names) == sorted(name for name, _ in model.shapes)
        tied = resolve("gpt2")
        last = [name for name, _ in staged(tied, Stage(3, 4, 1, 12)).shapes]
        assert last[0] == "transformer.wte.weight"

    def test_in_flight(self):
        """The first of four stages has four micro-batches in flight, each with what one layer saves; with all of them
        before the first backward pass, as many as there are."""
        small = {**LLAMA, "vocab_size": 1024}
        one, gpipe = (column(small, pp=4, accumulate=16, schedule=s) for s in ("1f1b", "gpipe"))
        assert any("rank 0 of 4" in note for note in one.model.notes)
        two, single = (column({**small, "num_hidden_layers": n}).activations.saved for n in (2, 1))
        layer = two - single
        ids, sent = 8 * 256, 2 * 4096 * 256
        table = 2 * 256 * 128 * 2
        assert one.activations.saved == 4 * (layer + ids + sent + table)
        assert gpipe.activations.saved > 3.5 * one.activations.saved

    def test_weights_stay_gathered_and_gradients_are_added_up_whole(self):
        e = column(spec="adamw/zero2", pp=2, accumulate=2, world_size=4, mixed="bf16").columns[0]
        rows = {r.detail: r for r in e.rows}
        raw = rows["whole, before they are reduced"]
        assert raw.nbytes == raw.high == 2 * raw.low == 2 * rows["gathered, of all layers"].nbytes

    def test_a_chain_of_chunks_needs_more_layers_than_stages(self):
        with pytest.raises(InputError, match="chunk"):
            column(pp=4, accumulate=4, schedule="interleaved-2")


class TestPrice:
    def test_state_is_that_of_the_part(self):
        shapes = {"h.0.q_proj.weight": (1024, 512), "h.0.o_proj.weight": (512, 1024), "norm.weight": (512,)}
        for spec in ("adamw", "adamw-8bit", "adafactor", "adamw-8bit/zero3"):
            world = 2 if "/" in spec else 1
            ledger = price(shapes, spec, world_size=world, tp=4)
            by = {name: sum(n.nbytes for n in ledger if n.parameter == name) for name in shapes}
            local = price({"a": (256, 512), "b": (512, 256), "c": (512,)}, spec, world_size=world)
            assert list(by.values()) == [sum(n.nbytes for n in local if n.parameter == k) for k in "abc"], spec

    def test_experts(self):
        shapes = {"m.experts.gate_up_proj": (8, 256, 128), "m.gate.weight": (8, 128)}
        one, two = (price(shapes, "adamw/zero3", world_size=8, ep=ep).nbytes for ep in (1, 4))
        assert one == two
        assert price(shapes, "adamw", world_size=8, ep=4).nbytes < price(shapes, "adamw", world_size=8).nbytes / 3

    @pytest.mark.parametrize("given", [{"tp": 0}, {"tp": True}, {"ep": 3, "world_size": 4}, {"tp": 3}])
    def test_degrees_that_are_not_allowed(self, given):
        with pytest.raises(SpecError, match=r"tp=|ep="):
            price({"h.0.q_proj.weight": (1024, 512)}, "adamw", **given)

    def test_conv1d_is_cut_the_other_way_round(self):
        found = cuts({"h.0.attn.c_attn.weight": (64, 192), "h.0.attn.c_proj.weight": (64, 64)}, tp=2)
        assert [one.dims for one in found.values()] == [((1, 2),), ((0, 2),)]


def test_command(capsys):
    argv = ["estimate", "llama-3.1-70b", "--optim", "adamw/zero2", "--world", "4", "--tp", "8", "--pp", "4"]
    assert main([*argv, "--accumulate", "8", "--seq", "2048", "--mixed", "bf16", "--checkpointing", "full"]) == 0
    out = capsys.readouterr().out
    assert "bytes of a GPU, one of 128, 4 data-parallel ranks" in out
    assert "tp 8, pp 4, schedule 1f1b" in out
    assert "of the pipeline, layers" in out


def test_plans_hold_the_degrees(capsys):
    argv = ["plan", "qwen3-0.6b", "--gpu", "24GiB", "--gpus", "8", "--tp", "2", "--pp", "2", "--batch", "4"]
    assert main([*argv, "--seq", "512", "--optim", "adamw"]) == 0
    out = capsys.readouterr().out
    assert "4 x 512 tokens per step and data-parallel rank (2 of them)" in " ".join(out.split())
    assert main(["plan", "gpt2", "--gpu", "24GiB", "--gpus", "3", "--tp", "2"]) == 2
    assert "not a multiple of tp x pp x cp" in capsys.readouterr().err


def test_solve_counts_whole_models():
    from estimators.planning.solve import solve

    given = {"tp": 4, "checkpointing": "full", "seq": 512}
    found = solve(LLAMA, "6GiB", smallest="gpus", optim="adamw/zero3", **given)
    assert found.value % 4 == 0
    assert found.beyond_value == found.value - 4
    found = solve(LLAMA, "24GiB", largest="seq", optim="adamw-8bit", tp=2, cp=2)
    assert found.value % 4 == 0


def test_what_a_pipeline_reserves_is_replayed():
    """All that is taken is given back, pass by pass; two steps need what one does."""
    from estimators.activations.phases import Flown
    from estimators.allocator.replay import replayed
    from estimators.allocator.replayed_step import Held

    ran = column(pp=2, accumulate=4, schedule="interleaved-2").activations
    assert isinstance(ran.flown, Flown)
    held = Held([("weights", 2**30)], batches=2)
    one, two = (replayed(ran, held, steps=n) for n in (1, 2))
    assert one.reserved <= two.reserved <= 1.1 * one.reserved
    assert one.requested == pytest.approx(2**30 + sum(ran.accumulated), rel=0.01)
