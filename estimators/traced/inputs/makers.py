"""Arguments of forward passes by their names: tokens, images, sound, hidden states, masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from estimators.traced.inputs.input_shape import InputShape, field, read, text_of

#: Frames and samples where a configuration does not say how long a recording is.
_FRAMES, SAMPLES = 3000, 15360
#: Tokens that a question of boxes, points or classes has.
_FEW = 4
_SEED = 0

Maker = Callable[[Any, InputShape], Any]


def maker(name: str) -> Maker | None:
    """What makes an argument of this name, or None where that is not known."""
    if name in MAKERS:
        return MAKERS[name]
    for end, found in _ENDS:
        if name.endswith(end):
            return found
    return None


def ids(config: Any, asked: InputShape, length: int | None = None) -> torch.Tensor:
    """Tokens that are no special ones."""
    text = text_of(config)
    vocabulary = read(text, "vocab_size") or read(config, "vocab_size") or 1000
    vocabulary = vocabulary if isinstance(vocabulary, int) else min(vocabulary)
    special = {
        v for c in (config, text) for k, v in vars(c).items() if k.endswith(("_id", "_index")) and type(v) is int
    }
    low = next((i for i in range(3, max(4, vocabulary - 8)) if not special & set(range(i, i + 8))), 0)
    generator = torch.Generator().manual_seed(_SEED)
    shape = (asked.batch, length or asked.seq)
    return torch.randint(low, max(low + 1, min(vocabulary, low + 8)), shape, generator=generator)


def side(config: Any) -> tuple[int, int]:
    ratios = read(config, "scaled_images_ratios")
    if ratios:  # the smallest of several scales has to hold a patch
        return (int(config.patch_size / min(ratios)),) * 2
    size = field(config, "image_size", "img_size", "input_size", default=224)
    if isinstance(size, dict):
        size = size.get("height", 224), size.get("width", 224)
    if isinstance(size, (list, tuple)):
        return int(size[-2]), int(size[-1])
    return int(size), int(size)


def image(config: Any, asked: InputShape) -> torch.Tensor:
    channels = field(config, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    frames = field(config, "num_frames")
    return asked.floats(*((frames,) if isinstance(frames, int) else ()), channels, *side(config))


def video(config: Any, asked: InputShape) -> torch.Tensor:
    one = image(config, asked)
    return asked.floats(one.shape[1] if one.dim() == 5 else 8, *one.shape[-3:])


def features(config: Any, asked: InputShape) -> torch.Tensor:
    """Of sound: [batch, mel bins, frames], or frames first where the model reads them one by one."""
    mel = field(config, "num_mel_bins", "n_mels", "input_feat_per_channel", "feature_size", "input_dim", default=80)
    frames = field(config, "max_source_positions")
    length = 2 * frames if isinstance(frames, int) and frames <= _FRAMES else _FRAMES
    first = field(config, "num_mel_bins") is not None and "speech_to_text" not in config.model_type
    return asked.floats(*((mel, length) if first else (length, mel)))


def sound(config: Any, asked: InputShape) -> torch.Tensor:
    mel, length = read(config, "num_mel_bins"), read(config, "max_length")
    spectrum = isinstance(mel, int) and isinstance(length, int) and length > 100
    return asked.floats(*((length, mel) if spectrum else (SAMPLES,)))


def _spectrogram(config: Any, asked: InputShape) -> torch.Tensor:
    return asked.floats(asked.seq, field(config, "model_in_dim", "num_mel_bins", "mel_dim", default=80))


def _heard(config: Any, asked: InputShape) -> torch.Tensor:
    """Which frames of the features are sound: all."""
    return asked.ones(max(features(config, asked).shape[1:]))


def _lagged(config: Any) -> bool:
    return int(getattr(config, "input_size", 1)) > 1


def _series(config: Any, asked: InputShape, width: int) -> torch.Tensor:
    """Of a time series: as many values as the context and the longest lag take; ``width`` 0 is one value at a time."""
    length = field(config, "context_length", default=asked.seq) + max(read(config, "lags_sequence") or [0])
    return asked.floats(length, *((width,) if width else ()))


def _past(config: Any, asked: InputShape) -> torch.Tensor:
    channels = read(config, "num_input_channels")
    if isinstance(channels, int):  # patched series: every channel at once
        return asked.floats(config.context_length, channels)
    return _series(config, asked, config.input_size if _lagged(config) else 0)


def _width(config: Any) -> int:
    found = field(text_of(config), "hidden_size", "d_model", "embed_dim", "n_embd", "dim", default=768)
    return found if isinstance(found, int) else 768


def _hidden(config: Any, asked: InputShape) -> torch.Tensor:
    return asked.floats(asked.seq, _width(config))


def _encoded(config: Any, asked: InputShape) -> torch.Tensor:
    names = ("encoder_hidden_size", "cross_attention_hidden_size", "hidden_size")
    return asked.floats(asked.seq, field(config, *names, default=768))


def _map(config: Any, asked: InputShape) -> torch.Tensor:
    """An image's features, [batch, width, height, width]."""
    size, patch = side(config)[0], field(config, "patch_size", default=16)
    n = max(1, size // patch) if isinstance(patch, int) else 64
    return asked.floats(_width(config), n, n)


def _fine_maps(config: Any, asked: InputShape) -> list[torch.Tensor]:
    """Features of an image at four times and twice the resolution of :func:`_map`, with fewer channels."""
    _, width, n, _ = _map(config, asked).shape
    return [asked.floats(width // 8, 4 * n, 4 * n), asked.floats(width // 4, 2 * n, 2 * n)]


def _flattened(config: Any, asked: InputShape) -> torch.Tensor:
    """Patches with their row and column in front."""
    patch, channels = field(config, "patch_size", default=16), field(config, "num_channels", default=3)
    return torch.zeros((asked.batch, asked.seq, 2 + channels * patch * patch), dtype=asked.dtype)


def _boxes(config: Any, asked: InputShape) -> torch.Tensor:
    return torch.zeros((asked.batch, asked.seq, 4), dtype=torch.int64)


def _mask(config: Any, asked: InputShape) -> torch.Tensor:
    return asked.ones(asked.seq)


def _times(config: Any, asked: InputShape) -> torch.Tensor:
    return torch.arange(asked.seq).expand(asked.batch, asked.seq).contiguous()


def _value(config: Any, asked: InputShape) -> torch.Tensor:
    return asked.floats()


#: Name of an argument -> what is given for it.
MAKERS: dict[str, Maker] = {
    "input_ids": ids,
    "decoder_input_ids": ids,
    "pixel_values": image,
    "image": image,
    "input_features": features,
    "input_values": sound,
    "bbox": _boxes,
    "hidden_states": _hidden,
    "inputs_embeds": _hidden,
    "query_embeds": _hidden,
    "encoder_hidden_states": _encoded,
    "attention_mask": _mask,
    "position_ids": _times,
    "pixel_values_videos": video,
    "spectrogram": _spectrogram,
    "mel_spectrogram": lambda config, asked: _spectrogram(config, asked).mT.contiguous(),
    "task_inputs": lambda config, asked: ids(config, asked, read(config, "task_seq_len")),
    "input_features_mask": _heard,
    "mask": _heard,
    "past_values": _past,
    "past_time_features": lambda config, asked: _series(config, asked, config.num_time_features),
    "past_observed_mask": lambda config, asked: torch.ones_like(_past(config, asked)),
    "static_categorical_features": lambda config, asked: torch.zeros(
        (asked.batch, max(1, config.num_static_categorical_features)), dtype=torch.int64
    ),
    "future_values": lambda config, asked: asked.floats(
        config.prediction_length, *((config.input_size,) if _lagged(config) else ())
    ),
    "future_time_features": lambda config, asked: asked.floats(config.prediction_length, config.num_time_features),
    "future_observed_mask": lambda config, asked: asked.ones(config.prediction_length),
    "mm_token_type_ids": lambda config, asked: torch.zeros((asked.batch, asked.seq), dtype=torch.int64),
    "prompt_pixel_values": image,
    "prompt_masks": image,
    "visual_feats": lambda config, asked: asked.floats(_FEW, config.visual_feat_dim),
    "visual_pos": lambda config, asked: asked.floats(_FEW, 4),
    "image_embeddings": _map,
    "image_features": _hidden,
    "vision_features": _hidden,
    "vision_pos_encoding": _hidden,
    "text_features": _hidden,
    "latents": _hidden,
    "context": _hidden,
    "patch_embeds": _map,
    "audio_mel": lambda config, asked: asked.floats(_FRAMES, field(config, "input_feat_size", default=80)),
    "audio_mel_mask": lambda config, asked: torch.zeros((asked.batch, _FRAMES), dtype=torch.bool),
    "states": lambda config, asked: asked.floats(asked.seq, config.state_dim),
    "actions": lambda config, asked: asked.floats(asked.seq, config.act_dim),
    "rewards": lambda config, asked: asked.floats(asked.seq, 1),
    "returns_to_go": lambda config, asked: asked.floats(asked.seq, 1),
    "timesteps": _times,
    "aspect_ratio_ids": lambda config, asked: torch.ones((asked.batch, 1), dtype=torch.int64),
    "aspect_ratio_mask": lambda config, asked: asked.ones(1, read(config, "max_num_tiles", 4)),
    "classes_structure": lambda config, asked: torch.full((asked.batch,), _FEW),
    "image_positional_embeddings": _map,
    "dense_prompt_embeddings": _map,
    "sparse_prompt_embeddings": lambda config, asked: asked.floats(1, 2, _width(config)),
    "high_resolution_features": _fine_maps,
    "multimask_output": lambda config, asked: True,
    "hq_token_only": lambda config, asked: False,
    "input_points": lambda config, asked: asked.floats(1, _FEW, 2),
    "input_labels": lambda config, asked: asked.ones(1, _FEW),
    "input_boxes": lambda config, asked: None,
    "input_masks": lambda config, asked: None,
    "decoder_queries": _hidden,
    "backbone_features": lambda config, asked: [*_fine_maps(config, asked), _map(config, asked)],
    "box_embeddings": lambda config, asked: asked.floats(_FEW, 4),
    "box_mask": lambda config, asked: torch.ones((asked.batch, _FEW), dtype=torch.bool),
    "box_labels": lambda config, asked: asked.ones(_FEW),
    "img_feats": lambda config, asked: (_map(config, asked),),
    "flattened_patches": _flattened,
    "state": lambda config, asked: asked.floats(field(config, "max_state_dim", default=32)),
    "timestep": _value,
}
#: Ends of names -> what is given for those, where the name itself is not above.
_ENDS: tuple[tuple[str, Maker], ...] = (
    ("input_ids", ids),
    ("attention_mask", _mask),
    ("pixel_values", image),
    ("input_values", sound),
    ("input_features", features),
    ("_embeds", _hidden),
)
