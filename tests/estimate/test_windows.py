"""Sequences that are longer than a window, and masks of layers that run again: formulas beside traced steps."""

import json
from pathlib import Path

import pytest

from estimators.activations import Step, activations
from estimators.memory.step_rows import run
from estimators.models.from_config import from_config
from estimators.models.resolve import resolve
from estimators.traced.from_transformers import from_transformers
from estimators.training import Training

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
torch.set_num_threads(1)

REPOSITORY = Path(__file__).parents[2]
SEQ, WINDOW = 64, 32
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "sliding_window": WINDOW,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CASES = {
    "every layer": {"model_type": "mistral"},
    "two masks": {"model_type": "gemma3_text", "sliding_window_pattern": 2},
    "none, of two masks": {"model_type": "qwen2"},
    "the last layers": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2},
    "eager": {"model_type": "gemma2"},
    "eager, experts with biases": {"model_type": "gpt_oss", **_EXPERTS},
}


@pytest.mark.parametrize("how", ["none", "full"])
@pytest.mark.parametrize("case", CASES)
def test_formulas_agree_with_traced_steps(case, how):
    config = {**_SMALL, **CASES[case]}
    asked = Training(batch=2, seq=SEQ, checkpointing=how, attention="eager" if "eager" in case else "sdpa")
    formula, _ = run(from_config(config, case), asked)
    traced, why = run(from_transformers(config, case), asked)
    assert traced is not None, why
    for name in ("backward", "accumulated"):
        a, b = sum(getattr(formula, name)), sum(getattr(traced, name))
        assert a == pytest.approx(b, rel=0.005), name


def test_a_window_costs_nothing_that_a_sequence_does_not_fill():
    longer, shorter = ({**_SMALL, "model_type": "mistral", "sliding_window": w} for w in (SEQ + 1, SEQ))
    step = Step(1, SEQ, "sdpa", 2)
    saved = [activations(config, "", step).saved for config in (longer, shorter, {**shorter, "sliding_window": None})]
    mask, expanded = 2 * SEQ**2, 2 * 2 * SEQ * (4 - 2) * 16
    layers = _SMALL["num_hidden_layers"]
    assert saved[2] == saved[0]
    assert saved[1] - saved[0] == layers * (mask + expanded)


def test_names_of_tuned_models_have_the_windows_of_their_own():
    windows = {
        "mistralai/Mistral-7B-Instruct-v0.1": 4096,
        "mistralai/Mistral-7B-Instruct-v0.2": None,
        "mistral-7b-v0.3": None,
        "microsoft/Phi-3-mini-4k-instruct": 2047,
        "microsoft/Phi-3-mini-128k-instruct": 262144,
        "microsoft/Phi-3.5-mini-instruct": 262144,
    }
    assert {name: resolve(name).config["sliding_window"] for name in windows} == windows


def test_flash_kernels_take_the_window_itself():
    config = {**_SMALL, "model_type": "mistral"}
    plain = {**config, "sliding_window": None}
    step = Step(1, SEQ, "flash", 2)
    assert activations(config, "", step).saved == activations(plain, "", step).saved


def test_every_family_agrees_with_its_traced_step_in_the_committed_results():
    rows = json.loads((REPOSITORY / "benchmarks/results/estimates_architectures.json").read_text())["families"]
    assert len(rows) == 70
    for row in rows:
        for what in ("saved", "peak", "accumulated"):
            assert abs(row[f"{what}_difference"]) <= 0.005, row
