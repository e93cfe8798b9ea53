"""Images beside text, and images as a list of patches."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from estimators.traced.inputs.input_shape import InputShape, field, read
from estimators.traced.inputs.makers import image
from estimators.traced.step import Faked


def with_images(module: Any, given: dict[str, Any], asked: InputShape, faked: Faked) -> dict[str, Any] | None:
    """Text with one image a sequence, whose tokens stand at its beginning: as many as the model makes of it."""
    config = module.config
    token = field(config, "image_token_id", "image_token_index")
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
        return {"pixel_values": image(module.config, asked)}
    pixels, grid = patches(module.config, asked)
    return {"pixel_values": pixels, "image_grid_thw": grid}


def patches(config: Any, asked: InputShape) -> tuple[torch.Tensor, torch.Tensor]:
    """Images as a list of patches, [all patches, pixels of one], and the grid that each is from."""
    vision = getattr(config, "vision_config", config)
    patch, merge = vision.patch_size, getattr(vision, "spatial_merge_size", 2)
    side = 16 * merge // 2
    channels: Any = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
    width = channels * getattr(vision, "temporal_patch_size", 1) * patch * patch
    rows = asked.batch * side * side
    pixels = torch.empty((rows, width), dtype=asked.dtype, device="meta")
    return pixels, torch.tensor([[1, side, side]] * asked.batch)


def tower(module: Any, asked: InputShape) -> dict[str, Any] | None:
    """What a part that reads nothing but patches of images, or frames of sound, is given: all of the batch in a row
    with the sizes of each, or None where the part is another."""
    names, config = inspect.signature(module.forward).parameters, module.config
    if "input_ids" in names:
        return None
    first, batch = next(iter(names)), asked.batch
    grid = next((name for name in ("grid_thw", "image_grid_thw") if name in names), None)
    if grid:
        pixels, sizes = patches(config, asked)
        merged = {"merge_sizes": torch.full((batch,), read(config, "spatial_merge_size", 2))}
        return {first: pixels, grid: sizes, **(merged if "merge_sizes" in names else {})}
    if "feature_lens" in names:
        length, bins = 2 * config.max_source_positions, config.num_mel_bins
        frames = torch.empty((bins, batch * length), dtype=asked.dtype, device="meta")
        lengths = torch.full((batch,), length)
        after = {"aftercnn_lens": (lengths - 1) // 2 + 1} if "aftercnn_lens" in names else {}
        return {first: frames, "feature_lens": lengths, **after}
    if first != "pixel_values":
        return None
    n = 16
    patch, channels = field(config, "patch_size", default=16), field(config, "num_channels", "in_channels", default=3)
    if "spatial_shapes" in names:
        pixels = asked.floats(n * n, channels * patch * patch)
        mask = {"pixel_attention_mask": asked.ones(n * n)} if "pixel_attention_mask" in names else {}
        return {first: pixels, "spatial_shapes": torch.full((batch, 2), n), **mask}
    if "pixel_position_ids" in names:
        at = torch.cartesian_prod(torch.arange(n), torch.arange(n)).expand(batch, n * n, 2).contiguous()
        return {first: asked.floats(n * n, channels * patch * patch), "pixel_position_ids": at}
    if "target_sizes" in names:
        strip = torch.empty((1, channels, patch, batch * n * n * patch), dtype=asked.dtype, device="meta")
        return {first: strip, "target_sizes": torch.full((batch, 2), n)}
    return None


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
