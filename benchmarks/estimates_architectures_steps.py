"""Small models of transformers' types: a traced step beside a real one on the CPU.

benchmarks/estimates_architectures.py runs it.
"""

from __future__ import annotations

import zlib
from typing import Any

from estimates_architectures_table import BATCH, SEQ

#: Fields without which a type's default configuration is no model's, as the examples of its documentation have them.
NEEDED: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 12},
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "emu3": {"vocabulary_map": {"<image>": 151854}},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "informer": {"prediction_length": 12},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "time_series_transformer": {"prediction_length": 12},
    "timm_backbone": {"backbone": "resnet50"},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
}


def default(kind: str) -> dict[str, Any]:
    """What is given of a type's configuration."""
    return {"model_type": kind, **NEEDED.get(kind, {})}


#: Elements of a model that a real step is run of.
MOST = 250_000_000

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
    deep = {v for k, v in values.items() if type(v) is int and k.endswith(_DEPTHS) and FEW < v < 1000}
    for name, value in values.items():
        if isinstance(value, dict):
            value = fewer(value)
        elif type(value) is int and name.endswith(_DEPTHS) and value in deep:
            value = FEW
        elif isinstance(value, list) and len(value) in deep:
            value = value[:FEW]
        elif name == "depths" and isinstance(value, (list, tuple)):
            value = [min(n, 2) for n in value]
        found[name] = value
    return found


def shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration with few layers, tokens and experts. Widths stay: they hang together."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("out_features", "out_indices", "stage_names"):
            continue
        if isinstance(value, dict):
            value = shrunk(value)
        elif type(value) is int:
            for parts, most in _SMALL:
                if any(name.endswith(part) for part in parts) and value > most:
                    value = most
            if name.endswith("_token_id") and value >= 1000:
                value = 999 - zlib.crc32(name.encode()) % 500
        elif name == "layer_types":
            value = value[:2] if isinstance(value, list) else value
        found[name] = value
    return found


def stepped(kind: str) -> list[dict[str, Any]]:
    """A small model's traced step beside a real one, without checkpointing and with it."""
    import torch

    from estimators.measure import saved, traced
    from estimators.traced.build import built, class_of, configuration, quiet, reason
    from estimators.traced.inputs import InputShape, inputs
    from estimators.traced.source import traced as estimated
    from estimators.traced.step import arguments, loss_of, summed
    from estimators.training import Training

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with quiet():
        try:
            small = shrunk(configuration(default(kind), kind).to_dict())
            cfg = configuration(small, kind)
            cls = class_of(cfg, kind)
            module, faked = built(small, kind, cls.__name__)
            parameters = sum(p.numel() for p in module.parameters())
            if parameters > MOST:
                return [{"type": kind, "not_run": f"{parameters:,} parameters when small"}]
            ways = list(inputs(module, InputShape(BATCH, SEQ, torch.bfloat16), faked))
        except Exception as error:
            return [{"type": kind, "not_run": reason(error)}]
        for how in ("none", "full"):
            row: dict[str, Any] = {"type": kind, "class": cls.__name__, "checkpointing": how, "parameters": parameters}
            try:
                from estimators.traced.from_transformers import from_transformers

                model = from_transformers(small, kind)
                ran, why = estimated(model, Training(batch=BATCH, seq=SEQ, checkpointing=how, device="cpu"))
                if ran is None:
                    rows.append({**row, "not_run": why})
                    continue
                torch.manual_seed(0)
                real = cls._from_config(configuration(small, kind), dtype=torch.bfloat16).train()
                for one in (real.config, *(getattr(real.config, n, None) for n in real.config.sub_configs)):
                    if getattr(one, "use_cache", None):
                        one.use_cache = False
                if how == "full":  # the random state that torch keeps aside is no tensor of a card's
                    kwargs = {"use_reentrant": False, "preserve_rng_state": False}
                    real.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
                row |= _real(real, ways, arguments, loss_of, summed, saved, traced)
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
                "moving_error": round(peak / row["moving_nbytes"] - 1, 5),
                "notes": list(ran.notes),
            }
            rows.append(row)
            del real
    return rows


def _real(module: Any, ways: Any, arguments: Any, loss_of: Any, summed: Any, saved: Any, traced: Any) -> dict[str, Any]:
    """Bytes that the forward pass leaves (what autograd and checkpointing keep, and the inputs) and the peak of a real
    step, with the first inputs that it takes."""
    import torch
    from torch.utils._pytree import tree_map_only

    from estimators.traced.recorder import leaves

    def real(t: torch.Tensor) -> torch.Tensor:
        return torch.rand(t.shape).to(t.dtype) if t.is_meta else t

    error: Exception = ValueError("no inputs")
    for given, _ in ways:
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
            error = one
            continue
        kept = saved(module, run).nbytes
        curve = traced(("forward", forward), ("backward", backward))
        given = sum(t.nbytes for t in leaves((args, kwargs)))
        left = curve.live[dict(curve.marks)["backward"] - 1]
        return {"hooks_nbytes": kept, "saved_nbytes": left + given, "moving_nbytes": curve.peak + given}
    raise error
