"""Published encoders, encoder-decoders and models of images: the fields of their config.json that change a shape."""

from __future__ import annotations

from typing import Any

from estimators.models.published.decoders import dimensions


def _t5(width: int, ffn: int, layers: int, heads: int, head: int = 64, gated: bool = False) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "d_model": width,
        "d_ff": ffn,
        "num_layers": layers,
        "num_heads": heads,
        "d_kv": head,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }


def _whisper(width: int, layers: int, heads: int, vocab: int = 51865, **other: int) -> dict[str, Any]:
    return {
        "model_type": "whisper",
        "d_model": width,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": 4 * width,
        "decoder_ffn_dim": 4 * width,
        "num_mel_bins": 80,
        "vocab_size": vocab,
        **other,
    }


def _bert(model_type: str, width: int, layers: int, heads: int, vocab: int, **other: int) -> dict[str, Any]:
    return {"model_type": model_type, **dimensions(width, 4 * width, layers, heads, None, vocab), **other}


def _vit(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "vit",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": 224,
        "patch_size": 16,
        "num_labels": 1000,
    }


_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1}
_BERT = {"max_position_embeddings": 512, "type_vocab_size": 2}


ENCODERS: dict[str, dict[str, Any]] = {
    "bert-base-uncased": _bert("bert", 768, 12, 12, 30522, **_BERT),
    "bert-large-uncased": _bert("bert", 1024, 24, 16, 30522, **_BERT),
    "roberta-base": _bert("roberta", 768, 12, 12, 50265, **_ROBERTA),
    "roberta-large": _bert("roberta", 1024, 24, 16, 50265, **_ROBERTA),
    "xlm-roberta-base": _bert("xlm-roberta", 768, 12, 12, 250002, **_ROBERTA),
    "xlm-roberta-large": _bert("xlm-roberta", 1024, 24, 16, 250002, **_ROBERTA),
    "distilbert-base-uncased": {
        "model_type": "distilbert",
        "dim": 768,
        "hidden_dim": 3072,
        "n_layers": 6,
        "n_heads": 12,
        "vocab_size": 30522,
    },
    "t5-small": _t5(512, 2048, 6, 8),
    "t5-base": _t5(768, 3072, 12, 12),
    "t5-large": _t5(1024, 4096, 24, 16),
    "t5-3b": _t5(1024, 16384, 24, 32, 128),
    "t5-11b": _t5(1024, 65536, 24, 128, 128),
    "flan-t5-base": _t5(768, 2048, 12, 12, gated=True),
    "flan-t5-xl": _t5(2048, 5120, 24, 32, gated=True),
    "flan-t5-xxl": _t5(4096, 10240, 24, 64, gated=True),
    "vit-base-patch16-224": _vit(768, 12, 12),
    "vit-large-patch16-224": _vit(1024, 24, 16),
    "whisper-tiny": _whisper(384, 4, 6),
    "whisper-base": _whisper(512, 6, 8),
    "whisper-small": _whisper(768, 12, 12),
    "whisper-medium": _whisper(1024, 24, 16),
    "whisper-large-v2": _whisper(1280, 32, 20),
    "whisper-large-v3": _whisper(1280, 32, 20, 51866, num_mel_bins=128),
}
