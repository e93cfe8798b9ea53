"""Small models of transformers' types: a traced step beside a real one on the CPU.

benchmarks/estimates_architectures.py runs it.
"""

from __future__ import annotations

import gc
import zlib
from collections.abc import Iterator
from math import prod
from typing import Any

from estimates_architectures_table import BATCH, SEQ

_GLM4V = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
_QWEN3_OMNI = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
_QWEN3_TALKER = {"shared_expert_intermediate_size": 768}
#: Fields without which a type's default configuration is no model's, as the examples of its documentation and published
#: models have them.
NEEDED: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 12},
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    "blip-2": {"image_token_index": 50265},
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "dbrx": {"attn_config": {"rope_theta": 500000.0}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "emu3": {"vocabulary_map": {"<image>": 151854}},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "glm46v": {"text_config": {"model_type": "glm4v_text", **_GLM4V}},
    "glm4v": {"text_config": {"model_type": "glm4v_text", **_GLM4V}},
    "glm4v_moe": {"text_config": {"model_type": "glm4v_moe_text", "head_dim": 128}},
    "glm4v_moe_text": {"head_dim": 128},
    "glm4v_text": _GLM4V,
    "glm_image": {"text_config": {"model_type": "glm_image_text", **_GLM4V}},
    "glm_image_text": _GLM4V,
    "glmga": {"text_config": {"model_type": "glm4v_text", **_GLM4V}},
    "informer": {"prediction_length": 12},
    "instructblip": {"image_token_index": 32000},
    "instructblipvideo": {"video_token_index": 32000},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "qwen3_omni_moe": {
        "thinker_config": {"text_config": _QWEN3_OMNI},
        "talker_config": {"text_config": _QWEN3_TALKER},
    },
    "qwen3_omni_moe_talker_text": _QWEN3_TALKER,
    "qwen3_omni_moe_text": _QWEN3_OMNI,
    "qwen3_omni_moe_thinker": {"text_config": {"model_type": "qwen3_omni_moe_text", **_QWEN3_OMNI}},
    "step3p5": {"sliding_window": 512},
    "step3p7": {"text_config": {"model_type": "step3p5", "sliding_window": 512}},
    "time_series_transformer": {"prediction_length": 12},
    "timm_backbone": {"backbone": "resnet50"},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "xmod": {"default_language": "en_XX"},
}


def default(kind: str) -> dict[str, Any]:
    """What is given of a type's configuration."""
    return {"model_type": kind, **NEEDED.get(kind, {})}


def tokens(values: dict[str, Any]) -> int:
    """Of a sequence: :data:`SEQ`, fewer where a model has fewer positions, as many as it must have where it says so."""
    axes = values.get("axial_pos_shape")
    if isinstance(axes, (list, tuple)) and values.get("axial_pos_embds"):
        return prod(axes)
    inner = [tokens(v) for v in values.values() if isinstance(v, dict)]
    own = [v for k, v in values.items() if k in ("max_position_embeddings", "n_positions") and type(v) is int and v > 4]
    return min([SEQ, *inner, *own])


#: Elements of a model that a real step is run of.
MOST = 600_000_000

#: Parts of the names of fields -> the most that a small model has of it.
_SMALL = (
    (("num_hidden_layers", "num_layers", "n_layer", "_layers", "depth"), 2),
    (("vocab_size",), 1000),
    (("intermediate_size", "ffn_dim", "d_ff", "mlp_dim", "n_inner"), 512),
    (("num_experts", "num_local_experts", "n_routed_experts"), 16),
    (("image_size", "img_size"), 64),
)


#: Names of numbers of layers, or their ends, and how many of them are run where that is enough.
_DEPTHS, FEW = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "_layers", "depth", "num_blocks"), 4


def fewer(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration with few layers, and lists that name each layer as long as there are layers."""
    found: dict[str, Any] = {}
    deep = {v for k, v in values.items() if type(v) is int and str(k).endswith(_DEPTHS) and FEW < v < 1000}
    for name, value in values.items():
        if isinstance(value, dict):
            value = fewer(value)
        elif type(value) is int and str(name).endswith(_DEPTHS) and value in deep:
            value = FEW
        elif isinstance(value, list) and len(value) in deep:
            value = value[:FEW]
        elif name == "depths" and isinstance(value, (list, tuple)):
            value = [min(n, 2) for n in value]
        found[name] = value
    return found


def shrunk(values: dict[str, Any], depth: bool = True) -> dict[str, Any]:
    """A configuration with few layers (``depth``), tokens and experts, that leaves out no layer by chance. Widths stay:
    they hang together."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("out_features", "out_indices", "stage_names"):
            continue
        if isinstance(value, dict):
            value = shrunk(value, depth)
        elif type(value) is int:
            for parts, most in _SMALL[0 if depth else 1 :]:
                if any(str(name).endswith(part) for part in parts) and value > most:
                    value = most
            if str(name).endswith("_token_id") and value >= 1000:
                value = 999 - zlib.crc32(name.encode()) % 500
        elif name == "layer_types":
            value = value[:2] if isinstance(value, list) and depth else value
        elif str(name).endswith("layerdrop"):
            value = 0.0
        found[name] = value
    return found


def smaller(kind: str) -> Iterator[dict[str, Any]]:
    """Small configurations of a type, the smallest first; some are refused, as lists in them belong to their layers."""
    from estimators.traced.build import configuration

    whole = configuration(default(kind), kind).to_dict()
    yield shrunk(whole)
    yield shrunk(fewer(whole), depth=False)
    sizes = {name: size for name in ("image_size", "img_size") if (size := whole.get(name))}
    yield {**shrunk(fewer(whole), depth=False), **sizes}
    yield shrunk(whole, depth=False)


def stepped(kind: str) -> list[dict[str, Any]]:
    """The first small model of a type that a step can be run of: a traced one beside a real one."""
    from estimators.traced.build import quiet, reason

    rows: list[dict[str, Any]] = []
    with quiet():
        try:
            for small in smaller(kind):
                ran = _stepped(kind, small)
                rows = rows or ran
                if any("saved_nbytes" in row for row in ran):
                    return ran
        except Exception as error:
            rows = rows or [{"type": kind, "not_run": reason(error)}]
    return rows


def _stepped(kind: str, small: dict[str, Any]) -> list[dict[str, Any]]:
    """A small model's traced step beside a real one, without checkpointing and with it."""
    import torch

    from estimators.traced.build import built, class_of, configuration, made_of, reason
    from estimators.traced.from_transformers import from_transformers
    from estimators.traced.inputs import InputShape, Mended, inputs
    from estimators.traced.source import traced as estimated
    from estimators.training import Training

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    try:
        cls = class_of(configuration(small, kind), kind)
        module, faked = built(small, kind, cls.__name__)
        parameters = sum(p.numel() for p in module.parameters())
        if parameters > MOST:
            return [{"type": kind, "not_run": f"{parameters:,} parameters when small"}]
        asked = InputShape(BATCH, tokens(small), torch.bfloat16)
        ways = list(inputs(module, asked, faked))
    except Exception as error:
        return [{"type": kind, "not_run": reason(error)}]
    for how in ("none", "full"):
        row: dict[str, Any] = {"type": kind, "class": cls.__name__, "checkpointing": how, "parameters": parameters}
        try:
            torch.manual_seed(0)
            real = made_of(cls, configuration(small, kind), torch.bfloat16).train()
            for one in (real.config, *(getattr(real.config, n, None) for n in real.config.sub_configs)):
                if getattr(one, "use_cache", None):
                    one.use_cache = False
            if how == "full":  # the random state that torch keeps aside is no tensor of a card's
                kwargs = {"use_reentrant": False, "preserve_rng_state": False}
                real.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
            given, figures = _real(real, ways, Mended(module, asked))
            model = from_transformers(small, kind)._replace(inputs=given)
            step = Training(batch=BATCH, seq=asked.seq, checkpointing=how, device="cpu")
            ran, why = estimated(model, step)
            if ran is None:
                rows.append({**row, "not_run": why})
                continue
            row |= figures
        except Exception as error:
            rows.append({**row, "not_run": reason(error)})
            continue
        weights = sum(t.nbytes for t in (*real.parameters(), *real.buffers()))
        peak = max(ran.forward.activations, ran.loss.activations, sum(ran.backward))
        row |= {
            "saved_predicted": ran.saved,
            "saved_error": round(ran.saved / max(1, row["saved_nbytes"]) - 1, 5),
            "peak_predicted": weights + peak,
            "peak_nbytes": weights + row["moving_nbytes"],
            "peak_error": round((weights + peak) / (weights + row["moving_nbytes"]) - 1, 5),
            "with_scratch_error": round((weights + peak) / (weights + row["whole_nbytes"]) - 1, 5),
            "moving_error": round(peak / row["moving_nbytes"] - 1, 5),
            "notes": list(ran.notes),
        }
        rows.append(row)
        del real
    return rows


def _real(module: Any, ways: Any, ahead: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first inputs that a real step takes, and its figures: bytes that the forward pass leaves (what autograd and
    checkpointing keep, and the inputs), the peak of its tensors, and that with what convolutions and matrix products
    use inside."""
    import torch
    from torch.utils._pytree import tree_map_only

    from estimators.measure import saved, traced
    from estimators.traced.recorder import leaves
    from estimators.traced.step import arguments, loss_of, summed

    def real(t: torch.Tensor) -> torch.Tensor:
        return torch.rand(t.shape).to(t.dtype) if t.is_meta else t

    error: Exception = ValueError("no inputs")
    for given in _each(ways, ahead):
        args, kwargs = arguments(tree_map_only(torch.Tensor, real, given))
        box: dict[str, Any] = {}

        def run(args: Any = args, kwargs: Any = kwargs) -> Any:
            out = module(*args, **kwargs)
            loss = loss_of(out)
            return summed(out) if loss is None else loss

        def forward(run: Any = run, box: Any = box) -> None:
            box["loss"] = run()

        def backward(box: Any = box) -> None:
            box.pop("loss").backward()

        try:
            forward(), backward(), module.zero_grad()
        except Exception as one:
            ahead.failed(given, one)
            error = one
            continue
        kept = saved(module, run).nbytes
        gc.collect()  # what earlier steps left in cycles goes before, not while, this one is measured
        curve = traced(("forward", forward), ("backward", backward))
        inputs = sum(t.nbytes for t in leaves((args, kwargs))) + _cached(module)
        left = curve.live[dict(curve.marks)["backward"] - 1]
        return given, {
            "hooks_nbytes": kept,
            "saved_nbytes": left + inputs,
            "moving_nbytes": curve.peak_of_tensors + inputs,
            "whole_nbytes": curve.peak + inputs,
        }
    raise error


def _cached(module: Any) -> int:
    """Bytes of tensors that modules have made in their first step and keep as attributes."""
    import torch

    found = {t.untyped_storage()._cdata: t for m in module.modules() for t in vars(m).values() if torch.is_tensor(t)}
    return sum(t.untyped_storage().nbytes() for t in found.values())


def _each(ways: Any, ahead: Any) -> Any:
    """Inputs as they are made, then those changed by what went wrong."""
    for given, _ in ways:
        yield given
    yield from ahead
