"""Shapes, names and frozen parameters against the modules that transformers builds from the same configuration."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from estimators.calculator import estimate  # noqa: E402
from estimators.models.families import FAMILIES  # noqa: E402
from estimators.models.from_config import from_config  # noqa: E402
from estimators.models.published import KNOWN  # noqa: E402

_MASKED = transformers.AutoModelForMaskedLM
#: The class that a family is trained as, where that is not a causal language model.
AUTO = {
    "bert": _MASKED,
    "roberta": _MASKED,
    "xlm-roberta": _MASKED,
    "distilbert": _MASKED,
    "t5": transformers.AutoModelForSeq2SeqLM,
    "vit": transformers.AutoModelForImageClassification,
    "whisper": transformers.AutoModelForSpeechSeq2Seq,
}

#: Names that are the same model as another name, as the configuration has it, are built once.
DISTINCT = {str(sorted(config.items())): name for name, config in KNOWN.items()}

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
_GQA = {**_TEXT, "num_key_value_heads": 2}
_MOE = {**_GQA, "num_experts": 5, "moe_intermediate_size": 24}
_DEEPSEEK = {
    **_TEXT,
    "n_routed_experts": 8,
    "moe_intermediate_size": 24,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
}
_GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 100}
_T5 = {"d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4, "d_kv": 12, "vocab_size": 100}
_WHISPER = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "vocab_size": 100,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 80,
    "pad_token_id": 0,
}
_DISTIL = {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "vocab_size": 100}
_OPT = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
_VIT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}

#: family -> a small configuration, and the changes to it that change shapes (the first is none).
VARIANTS = {
    "llama": (_GQA, {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 24}, {"num_key_value_heads": None}),
    "granite": (_GQA, {"attention_bias": True, "mlp_bias": True}),
    "mistral": ({**_TEXT, "num_attention_heads": 8}, {"head_dim": 24}),
    "ministral3": ({**_TEXT, "num_attention_heads": 8}, {"head_dim": 24}),
    "mixtral": ({**_GQA, "num_local_experts": 5}, {"head_dim": 24}),
    "smollm3": ({**_GQA, "pad_token_id": 0}, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (_GQA, {"num_key_value_heads": None}),
    "qwen2_moe": (
        {**_MOE, "shared_expert_intermediate_size": 40},
        {"decoder_sparse_step": 2},
        {"qkv_bias": False},
        {"mlp_only_layers": [0, 2]},
    ),
    "qwen3": (_GQA, {"attention_bias": True}, {"head_dim": 24}),
    "qwen3_moe": (_MOE, {"decoder_sparse_step": 2}, {"mlp_only_layers": [1]}, {"attention_bias": True}),
    "gemma": (_GQA, {"attention_bias": True}, {"head_dim": 24}),
    "gemma2": (_GQA, {"attention_bias": True}, {"head_dim": 24}),
    "gemma3_text": (
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
        {"head_dim": 24},
        {"attention_bias": True},
    ),
    "phi": (_GQA, {"qk_layernorm": True}),
    "phi3": ({**_GQA, "pad_token_id": 0}, {"num_key_value_heads": None}),
    "olmo": (_GQA, {"attention_bias": True}),
    "olmo2": (_GQA, {"attention_bias": True}),
    "olmo3": (_GQA, {"attention_bias": True}),
    "olmoe": ({**_GQA, "num_experts": 5}, {"attention_bias": True}),
    "gpt_oss": ({**_GQA, "num_local_experts": 5}, {"head_dim": 24}, {"attention_bias": False}),
    "deepseek_v2": (
        _DEEPSEEK,
        {"first_k_dense_replace": 1},
        {"q_lora_rank": None},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"n_shared_experts": 3},
    ),
    "deepseek_v3": (
        _DEEPSEEK,
        {"first_k_dense_replace": 1},
        {"q_lora_rank": None, "first_k_dense_replace": 0},
        {"attention_bias": True},
        {"n_shared_experts": 3, "first_k_dense_replace": 0},
    ),
    "cohere": (_GQA, {"use_qk_norm": True}, {"attention_bias": True}),
    "glm4": ({**_GQA, "pad_token_id": 0}, {"attention_bias": False}, {"head_dim": 24}),
    "starcoder2": (_GQA, {"use_bias": False}),
    "gpt2": (_GPT, {"n_inner": 80}, {"n_positions": 50}),
    "gpt_bigcode": (_GPT, {"multi_query": False}, {"n_inner": 80}),
    "gptj": ({**_GPT, "rotary_dim": 8}, {"n_inner": 80}),
    "gpt_neox": (_TEXT, {"attention_bias": False}),
    "bloom": ({"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100},),
    "falcon": (
        {k: v for k, v in _TEXT.items() if k != "intermediate_size"},
        {"new_decoder_architecture": True},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"multi_query": False},
        {"parallel_attn": False},
        {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
        {"bias": True},
        {"ffn_hidden_size": 80},
    ),
    "opt": (
        _OPT,
        {"word_embed_proj_dim": 32},
        {"do_layer_norm_before": False},
        {"enable_bias": False},
        {"layer_norm_elementwise_affine": False},
        {"max_position_embeddings": 30},
    ),
    "bert": (_TEXT, {"type_vocab_size": 3}, {"max_position_embeddings": 30}),
    "roberta": (_TEXT, {"type_vocab_size": 3}),
    "xlm-roberta": (_TEXT, {"type_vocab_size": 3}),
    "distilbert": (_DISTIL, {"max_position_embeddings": 30}),
    "t5": (_T5, {"feed_forward_proj": "gated-gelu"}, {"num_decoder_layers": 3}, {"relative_attention_num_buckets": 8}),
    "vit": (
        _VIT,
        {"qkv_bias": False},
        {"image_size": 64, "patch_size": 8},
        {"num_channels": 1},
        {"id2label": {"0": "a", "1": "b", "2": "c"}},
        {"num_labels": 7},
    ),
    "whisper": (_WHISPER, {"num_mel_bins": 128}, {"max_source_positions": 100, "max_target_positions": 50}),
}
#: Families whose head is the shared embedding whatever the configuration says.
ALWAYS_TIED = {"t5", "vit"}


def built(config):
    """transformers' own module, on no device."""
    configuration = transformers.AutoConfig.for_model(**config)
    auto = AUTO.get(config["model_type"], transformers.AutoModelForCausalLM)
    with torch.device("meta"):
        return auto.from_config(configuration)


def assert_same(config):
    module = built(dict(config))
    ours = from_config(config, "the configuration")
    assert dict(ours.shapes) == {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert len(dict(ours.shapes)) == len(ours.shapes)
    assert ours.frozen == {name for name, p in module.named_parameters() if not p.requires_grad}
    return module


@pytest.mark.parametrize("name", DISTINCT.values())
def test_published_architectures(name):
    module = assert_same(KNOWN[name])
    assert estimate(name).parameters == sum(p.numel() for p in module.parameters())


def test_every_family_has_variants():
    assert set(VARIANTS) == set(FAMILIES)


def _cases():
    for family, (config, *changes) in VARIANTS.items():
        tied = [] if family in ALWAYS_TIED else [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}]
        for change in ({}, *changes, *tied):
            yield pytest.param({"model_type": family, **config, **change}, id=f"{family}-{change or 'plain'}")


@pytest.mark.parametrize("config", list(_cases()))
def test_every_field_that_changes_shapes(config):
    assert_same(config)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_saved_config_json_is_read_back(family, tmp_path):
    """What save_pretrained leaves out is what the defaults here have to be."""
    config = {"model_type": family, **VARIANTS[family][0]}
    module = built(dict(config))
    module.config.save_pretrained(tmp_path)
    want = {name: tuple(p.shape) for name, p in module.named_parameters()}
    from estimators import resolve

    assert dict(resolve(tmp_path).shapes) == want


def test_a_live_module_is_its_configuration():
    module = built(dict(KNOWN["qwen3-0.6b"]))
    live, named = estimate(module, "adamw-8bit", weights="bf16"), estimate("qwen3-0.6b", "adamw-8bit")
    assert live.parameters == named.parameters
    assert live.columns[0].nbytes("state") == named.columns[0].nbytes("state")
    assert live.columns[0].nbytes("weights") == named.columns[0].nbytes("weights")
