"""ViT with an image-classification head. Source: transformers' modeling_vit.py."""

from __future__ import annotations

from estimators.models.config_fields import Fields
from estimators.models.families.parts import Shapes, linear, norm


def vit(f: Fields) -> Shapes:
    width, ffn, patch = f.integer("hidden_size"), f.integer("intermediate_size"), f.integer("patch_size", 16)
    patches = (f.integer("image_size", 224) // patch) ** 2
    f.divide("hidden_size", "num_attention_heads")
    qkv_bias = f.flag("qkv_bias", True)
    yield "vit.embeddings.cls_token", (1, 1, width)
    yield "vit.embeddings.position_embeddings", (1, patches + 1, width)
    projection = "vit.embeddings.patch_embeddings.projection"
    yield f"{projection}.weight", (width, f.integer("num_channels", 3), patch, patch)
    yield f"{projection}.bias", (width,)
    for i in range(f.layers()):
        name = f"vit.layers.{i}"
        for which in ("q_proj", "k_proj", "v_proj"):
            yield from linear(f"{name}.attention.{which}", width, width, qkv_bias)
        yield from linear(f"{name}.attention.o_proj", width, width, bias=True)
        yield from norm(f"{name}.layernorm_before", width, bias=True)
        yield from norm(f"{name}.layernorm_after", width, bias=True)
        yield from linear(f"{name}.mlp.fc1", ffn, width, bias=True)
        yield from linear(f"{name}.mlp.fc2", width, ffn, bias=True)
    yield from norm("vit.layernorm", width, bias=True)
    labels = f.entries("id2label", f.integer("num_labels", 2, least=0))
    if labels:
        yield from linear("classifier", labels, width, bias=True)
