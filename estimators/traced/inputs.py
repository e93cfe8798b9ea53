"""Inputs for a transformers model: a batch of tokens, images or sound as its configuration describes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from estimators.errors import InputError
from estimators.traced.step import Faked

#: Frames and samples where a configuration does not say how long a recording is.
_FRAMES, _SAMPLES = 3000, 15360
_SEED = 0


class InputShape(NamedTuple):
    """``batch`` sequences of ``seq`` tokens in ``dtype``."""

    batch: int
    seq: int
    dtype: torch.dtype


def inputs(module: Any, asked: InputShape, faked: Faked) -> Iterator[tuple[dict[str, Any], str]]:
    """Keywords for one step, likeliest first, with a note on what they leave out. Raises :class:`InputError` where an
    argument must be given that is not known here."""
    names = inspect.signature(module.forward).parameters
    grid = next((name for name in ("grid_thw", "image_grid_thw") if name in names and "input_ids" not in names), None)
    if grid:  # the tower that reads images
        pixels, shape = _patches(module.config, asked)
        yield {next(iter(names)): pixels, grid: shape}, ""
        return
    must = [n for n, p in names.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    for name in must:
        if name not in MAKERS:
            raise InputError(f"{type(module).__name__} must be given {name}, for which no value is known; pass inputs")
    wanted = [n for n in MAKERS if n in names and (n in must or n in _WANTED)]
    every = {name: MAKERS[name](module.config, asked) for name in wanted or ["input_ids"]}
    main = getattr(module, "main_input_name", "input_ids")
    given = {n: v for n, v in every.items() if n in must or n in (main, "bbox")} or every
    with_images = _with_images(module, given, asked, faked)
    everything = {**every, **({"return_loss": True} if "return_loss" in names else {})}
    ways: list[tuple[dict[str, Any] | None, str]] = [
        (with_images, ""),
        (given, "without images or sound" if "input_ids" in given and len(every) > len(given) else ""),
        (everything if len(everything) > len(given) else None, ""),
    ]
    ways += [({**given, **one}, "") for one in _otherwise(module.config, given, asked)]
    for one, note in ways:
        if one is None:
            continue
        labels = _labels(module, one, asked) if "labels" in names else None
        if labels is not None:
            yield {**one, "labels": labels}, note
        yield one, note


#: Arguments that are given although they may be left out.
_WANTED = frozenset({"input_ids", "pixel_values", "input_values", "input_features", "bbox"})


def _text(config: Any) -> Any:
    get = getattr(config, "get_text_config", None)
    try:
        return get() if get else config
    except Exception:
        return config


def _field(config: Any, *names: str, default: Any = None) -> Any:
    """The first of several fields that a configuration has, its own or one of a part's."""
    parts = [
        config,
        *(getattr(config, n, None) for n in ("vision_config", "audio_config", "encoder", "backbone_config")),
    ]
    for part in parts:
        for name in names:
            found = getattr(part, name, None)
            if found is not None:
                return found
    return default


def _ids(config: Any, asked: InputShape, length: int | None = None) -> torch.Tensor:
    """Tokens that are no special ones."""
    text = _text(config)
    vocabulary = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None) or 1000
    vocabulary = vocabulary if isinstance(vocabulary, int) else min(vocabulary)
    special = {
        v for c in (config, text) for k, v in vars(c).items() if k.endswith(("_id", "_index")) and type(v) is int
    }
    low = next((i for i in range(3, max(4, vocabulary - 8)) if not special & set(range(i, i + 8))), 0)
    generator = torch.Generator().manual_seed(_SEED)
    shape = (asked.batch, length or asked.seq)
    return torch.randint(low, max(low + 1, min(vocabulary, low + 8)), shape, generator=generator)


def _side(config: Any) -> tuple[int, int]:
    size = _field(config, "image_size", "img_size", "input_size", default=224)
    if isinstance(size, dict):
        size = size.get("height", 224), size.get("width", 224)
    if isinstance(size, (list, tuple)):
        return int(size[-2]), int(size[-1])
    return int(size), int(size)


def _image(config: Any, asked: InputShape) -> torch.Tensor:
    channels = _field(config, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    frames = getattr(config, "num_frames", None)
    lead = (asked.batch, frames) if isinstance(frames, int) else (asked.batch,)
    return torch.empty((*lead, channels, *_side(config)), dtype=asked.dtype, device="meta")


def _features(config: Any, asked: InputShape) -> torch.Tensor:
    """Of sound: [batch, mel bins, frames], or frames first where the model reads them one by one."""
    mel = _field(config, "num_mel_bins", "n_mels", "input_feat_per_channel", "feature_size", "input_dim", default=80)
    frames = _field(config, "max_source_positions", default=None)
    length = 2 * frames if isinstance(frames, int) and frames <= _FRAMES else _FRAMES
    first = _field(config, "num_mel_bins", default=None) is not None and "speech_to_text" not in config.model_type
    shape = (asked.batch, mel, length) if first else (asked.batch, length, mel)
    return torch.empty(shape, dtype=asked.dtype, device="meta")


def _sound(config: Any, asked: InputShape) -> torch.Tensor:
    mel, length = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    shape = (length, mel) if isinstance(mel, int) and isinstance(length, int) and length > 100 else (_SAMPLES,)
    return torch.empty((asked.batch, *shape), dtype=asked.dtype, device="meta")


def _otherwise(config: Any, given: dict[str, Any], asked: InputShape) -> Iterator[dict[str, torch.Tensor]]:
    """The same laid out as other models read it: sound with its channels apart, features with frames and bins
    exchanged, two images in place of one."""
    if "input_values" in given:
        channels = getattr(config, "audio_channels", 1)
        yield {"input_values": torch.empty((asked.batch, channels, _SAMPLES), dtype=asked.dtype, device="meta")}
    if "input_features" in given:
        yield {"input_features": given["input_features"].mT}
    if "pixel_values" in given and given["pixel_values"].dim() == 4:
        image = given["pixel_values"]
        yield {"pixel_values": torch.empty((len(image), 2, *image.shape[1:]), dtype=asked.dtype, device="meta")}
    if "input_ids" in given and "pixel_values" in given:
        yield {"attention_mask": torch.ones((asked.batch, asked.seq), dtype=torch.int64)}


def _video(config: Any, asked: InputShape) -> torch.Tensor:
    image = _image(config, asked)
    frames = image.shape[1] if image.dim() == 5 else 8
    return torch.empty((asked.batch, frames, *image.shape[-3:]), dtype=asked.dtype, device="meta")


def _spectrogram(config: Any, asked: InputShape) -> torch.Tensor:
    bins = _field(config, "model_in_dim", "num_mel_bins", "mel_dim", default=80)
    return torch.empty((asked.batch, asked.seq, bins), dtype=asked.dtype, device="meta")


def _heard(config: Any, asked: InputShape) -> torch.Tensor:
    """Which frames of the features are sound: all."""
    return torch.ones((asked.batch, max(_features(config, asked).shape[1:])), dtype=torch.int64)


def _lagged(config: Any) -> bool:
    return getattr(config, "input_size", 1) > 1


def _series(config: Any, asked: InputShape, width: int) -> torch.Tensor:
    """Of a time series: as many values as the context and the longest lag take; ``width`` 0 is one value at a time."""
    length = _field(config, "context_length", default=asked.seq) + max(getattr(config, "lags_sequence", None) or [0])
    return torch.empty((asked.batch, length, *((width,) if width else ())), dtype=asked.dtype, device="meta")


def _boxes(config: Any, asked: InputShape) -> torch.Tensor:
    return torch.zeros((asked.batch, asked.seq, 4), dtype=torch.int64)


def _hidden(config: Any, asked: InputShape) -> torch.Tensor:
    width = _field(_text(config), "hidden_size", "d_model", "embed_dim", default=768)
    return torch.empty((asked.batch, asked.seq, width), dtype=asked.dtype, device="meta")


def _encoded(config: Any, asked: InputShape) -> torch.Tensor:
    width = _field(config, "encoder_hidden_size", "cross_attention_hidden_size", "hidden_size", default=768)
    return torch.empty((asked.batch, asked.seq, width), dtype=asked.dtype, device="meta")


#: Name of an argument -> what is given for it.
MAKERS: dict[str, Callable[[Any, InputShape], Any]] = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "pixel_values": _image,
    "input_features": _features,
    "input_values": _sound,
    "bbox": _boxes,
    "hidden_states": _hidden,
    "inputs_embeds": _hidden,
    "query_embeds": _hidden,
    "encoder_hidden_states": _encoded,
    "attention_mask": lambda config, asked: torch.ones((asked.batch, asked.seq), dtype=torch.int64),
    "pixel_values_videos": _video,
    "spectrogram": _spectrogram,
    "mel_spectrogram": lambda config, asked: _spectrogram(config, asked).mT,
    "task_inputs": lambda config, asked: _ids(config, asked, getattr(config, "task_seq_len", None)),
    "input_features_mask": _heard,
    "mask": _heard,
    "past_values": lambda config, asked: _series(config, asked, config.input_size if _lagged(config) else 0),
    "past_time_features": lambda config, asked: _series(config, asked, config.num_time_features),
    "past_observed_mask": lambda config, asked: torch.ones_like(_series(config, asked, 0)),
}


def _labels(module: Any, given: dict[str, Any], asked: InputShape) -> torch.Tensor | None:
    """What the class's loss compares with, where it is a tensor of classes."""
    name = type(module).__name__
    ids: torch.Tensor | None = given["input_ids"].clone() if "input_ids" in given else None
    if any(part in name for part in ("CausalLM", "MaskedLM", "LMHead", "ConditionalGeneration", "WithLM", "Seq2Seq")):
        return ids if ids is not None else _ids(module.config, asked)
    if "TokenClassification" in name or "PreTraining" in name:
        return ids
    if any(part in name for part in ("SequenceClassification", "ImageClassification", "AudioClassification", "Video")):
        return torch.zeros(asked.batch, dtype=torch.int64)
    if "CTC" in name:
        return torch.ones((asked.batch, 8), dtype=torch.int64)
    if ids is not None and "generate" in dir(module):
        return ids
    return None


def _with_images(module: Any, given: dict[str, Any], asked: InputShape, faked: Faked) -> dict[str, Any] | None:
    """Text with one image a sequence, whose tokens stand at its beginning: as many as the model makes of it."""
    config = module.config
    token = _field(config, "image_token_id", "image_token_index")
    names = inspect.signature(module.forward).parameters
    if not isinstance(token, int) or "pixel_values" not in names or "input_ids" not in given:
        return None
    try:
        images = _images(module, asked)
        with faked.on(), torch.no_grad():
            count = _count(module, {name: faked.like(t) for name, t in images.items()})
    except Exception:
        return None
    if not count or count >= asked.seq * asked.batch:
        return None
    each = -(-count // asked.batch)
    ids = given["input_ids"].clone()
    if each * asked.batch != count or each >= asked.seq:
        return None
    ids[:, 1 : 1 + each] = token
    return {**given, **images, "input_ids": ids}


def _images(module: Any, asked: InputShape) -> dict[str, torch.Tensor]:
    """Pixels, as whole images or as a list of patches with the grid that they are from."""
    names = inspect.signature(module.forward).parameters
    if "image_grid_thw" not in names:
        return {"pixel_values": _image(module.config, asked)}
    pixels, grid = _patches(module.config, asked)
    return {"pixel_values": pixels, "image_grid_thw": grid}


def _patches(config: Any, asked: InputShape) -> tuple[torch.Tensor, torch.Tensor]:
    """Images as a list of patches, [all patches, pixels of one], and the grid that each is from."""
    vision = getattr(config, "vision_config", config)
    patch, merge = vision.patch_size, getattr(vision, "spatial_merge_size", 2)
    side = 16 * merge // 2
    channels: Any = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
    width = channels * getattr(vision, "temporal_patch_size", 1) * patch * patch
    rows = asked.batch * side * side
    pixels = torch.empty((rows, width), dtype=asked.dtype, device="meta")
    return pixels, torch.tensor([[1, side, side]] * asked.batch)


def _count(module: Any, images: dict[str, torch.Tensor]) -> int:
    """How many tokens the model makes of all images."""
    get = getattr(module, "get_image_features", None) or getattr(module.model, "get_image_features", None)
    if get is None:
        return 0
    wanted = inspect.signature(get).parameters
    out = get(**{k: v for k, v in images.items() if k in wanted or "kwargs" in wanted})
    found = getattr(out, "pooler_output", out)
    parts = list(found) if isinstance(found, (list, tuple)) else [found]
    return sum(t.numel() // t.shape[-1] for t in parts)
