"""Figures of ZeRO and FSDP2 against the paper and against torch."""

import pytest

import memopt
from estimators import InputError, estimate
from estimators.memory.sharding import fsdp2, zero


def test_the_papers_table():
    """Rajbhandari et al., figure 1: 7.5 billion parameters on 64 GPUs."""
    assert [round(zero(s, 7_500_000_000, 64) / 1e9, 1) for s in range(4)] == [120.0, 31.4, 16.6, 1.9]


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_bytes_per_parameter(ranks):
    n = 64 * 10**6
    want = (16, 4 + 12 / ranks, 2 + 14 / ranks, 16 / ranks)
    assert [zero(s, n, ranks) for s in range(4)] == [round(n * w) for w in want]


def test_fp32_training_has_no_masters():
    assert zero(1, 100, 4, (4, 4, 8)) == 8 * 100 + 200


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 5, 8, 17])
def test_fsdp2_cuts_as_torch_chunks(ranks, rows):
    torch = pytest.importorskip("torch")
    largest = max(chunk.numel() for chunk in torch.empty(rows, 6).chunk(ranks))
    assert fsdp2([(rows, 6)], ranks, 1) == largest


@pytest.mark.parametrize("stage", [4, -1, "2"])
def test_stages(stage):
    with pytest.raises(InputError, match="stages 0 to 3"):
        zero(stage, 1, 1)


def test_deepspeeds_own_function_for_stage_2(monkeypatch):
    """It counts an fp32 copy of the gradients among what is sharded: 2N + 18N/w."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    stage = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2")
    n = 7_500_000_000
    theirs = stage.estimate_zero2_model_states_mem_needs(n, num_gpus_per_node=8, num_nodes=8, cpu_offload=False)[1]
    assert zero(2, n, 64, (2, 2, 16)) == theirs


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("offload", [False, True])
def test_rows_add_up_to_deepspeeds_own_functions(monkeypatch, ranks, offload):
    """Buckets and gathered weights aside. At stage 3 theirs leaves this rank's 16-bit gradients out, and counts
    parameters that stay whole (norms, up to 1e5 elements) as cut."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    two, three = (pytest.importorskip(f"deepspeed.runtime.zero.{m}") for m in ("stage_1_and_2", "stage3"))
    where = "@cpu" if offload else ""

    def kept(spec):
        e = estimate("llama-3.2-1b", spec, world_size=ranks, deepspeed=True)
        rows = [r for r in e.rows if r.tier == "GPU" and "step" in r.phases]
        assert {r.provenance for r in e.rows} == {"formula"}
        return e.parameters, sum(r.nbytes for r in rows)

    given = {"num_gpus_per_node": 8, "num_nodes": ranks // 8, "cpu_offload": offload}
    n, ours = kept(f"adamw{where}/zero2")
    assert ours == pytest.approx(two.estimate_zero2_model_states_mem_needs(n, **given)[1], abs=64)
    n, ours = kept(f"adamw{where}/zero3")
    theirs = three.estimate_zero3_model_states_mem_needs(n, 0, cpu_offload_params=False, **given)[1]
    gradients = 0 if offload else 2 * n // ranks
    assert ours - gradients == pytest.approx(theirs, abs=64 + 2 * 33 * 2048)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_an_estimate_of_sharded_parameters(stage):
    """Weights, gradients and state of the first rank; what is gathered beside them in the passes only."""
    whole, cut = (estimate("llama-3.2-1b", f"adamw-8bit/{stage}", world_size=n, weights="fp32") for n in (1, 16))
    column, rows = cut[f"adamw-8bit/{stage}"], cut.rows
    full = 4 * whole.parameters
    for what in ("weights", "gradients"):
        assert sum(r.nbytes for r in rows if r.what == what and "step" in r.phases) == full // 16
    shapes = dict(cut.model.shapes)
    assert column.nbytes("state") == memopt.price(shapes, f"adamw-8bit/{stage}", world_size=16).nbytes
    gathered = next(r for r in rows if r.what == "weights" and "gathered" in r.detail)
    assert gathered.phases == ("forward", "loss", "backward")
    layer = 4 * sum(memopt.core.ledger.TensorSpec("float32", s).numel for n, s in shapes.items() if ".layers.0." in n)
    outside = full - 16 * layer
    assert gathered.nbytes == outside + (16 if stage == "zero2" else 2) * layer
    assert not [r for r in whole.rows if "gathered" in r.detail]


def test_the_fullest_rank_of_many_is_the_first_under_fsdp2():
    config = {
        "model_type": "llama",
        "hidden_size": 65,
        "intermediate_size": 65,
        "num_hidden_layers": 1,
        "num_attention_heads": 5,
        "vocab_size": 1001,
    }
    e = estimate(config, "adamw/zero3", world_size=64)
    ranks = [memopt.price(dict(e.model.shapes), "adamw/zero3", world_size=64, rank=r).nbytes for r in range(64)]
    assert e["adamw/zero3"].nbytes("state") == ranks[0] == max(ranks) > ranks[63]
