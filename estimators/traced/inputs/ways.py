"""A batch for one step: likeliest inputs first."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from estimators.errors import InputError
from estimators.traced.inputs.images import tower, with_images
from estimators.traced.inputs.input_shape import InputShape, read
from estimators.traced.inputs.makers import MAKERS, SAMPLES, ids, maker
from estimators.traced.step import Faked

#: Arguments that are given although they may be left out.
_WANTED = frozenset({"input_ids", "pixel_values", "input_values", "input_features", "bbox"})


def inputs(module: Any, asked: InputShape, faked: Faked) -> Iterator[tuple[dict[str, Any], str]]:
    """Keywords for one step, likeliest first, with a note on what they leave out. Raises :class:`InputError` where an
    argument must be given that is not known here."""
    names = inspect.signature(module.forward).parameters
    if type(module).forward is torch.nn.Module.forward:
        raise InputError(f"{type(module).__name__} has no forward pass of its own, only its parts have")
    alone = tower(module, asked)
    if alone is not None:
        yield alone, ""
        return
    must = [n for n, p in names.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    for name in must:
        if maker(name) is None:
            raise InputError(f"{type(module).__name__} must be given {name}, for which no value is known; pass inputs")
    wanted = [n for n in dict.fromkeys((*MAKERS, *must)) if n in names and (n in must or n in _WANTED)]
    every = {name: _made(module, name, asked) for name in wanted or ["input_ids"]}
    main = getattr(module, "main_input_name", "input_ids")
    given = {n: v for n, v in every.items() if n in must or n in (main, "bbox")} or every
    pictured = with_images(module, given, asked, faked)
    everything = {**every, **({"return_loss": True} if "return_loss" in names else {})}
    ways: list[tuple[dict[str, Any] | None, str]] = [
        (pictured, ""),
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


def _made(module: Any, name: str, asked: InputShape) -> Any:
    make = maker(name)
    assert make is not None
    try:
        return make(module.config, asked)
    except AttributeError as error:
        raise InputError(f"{type(module).__name__} must be given {name}; {error}") from None


def _otherwise(config: Any, given: dict[str, Any], asked: InputShape) -> Iterator[dict[str, torch.Tensor]]:
    """The same laid out as other models read it: sound with its channels apart, features with frames and bins
    exchanged, two images in place of one."""
    if "input_values" in given:
        channels = getattr(config, "audio_channels", 1)
        yield {"input_values": torch.empty((asked.batch, channels, SAMPLES), dtype=asked.dtype, device="meta")}
    if "input_features" in given:
        yield {"input_features": given["input_features"].mT.contiguous()}
    if "pixel_values" in given and given["pixel_values"].dim() == 4:
        image = given["pixel_values"]
        yield {"pixel_values": torch.empty((len(image), 2, *image.shape[1:]), dtype=asked.dtype, device="meta")}
    books = read(config, "num_codebooks")
    if books is None and read(config, "image_size") is None:
        books = read(config, "num_channels")
    if "input_ids" in given and isinstance(books, int):  # sound in several tokens at a time
        tokens = given["input_ids"]
        yield {"input_ids": tokens.repeat_interleave(books, 0)}
        yield {"input_ids": tokens.unsqueeze(-1).repeat(1, 1, books)}
        yield {"input_ids": tokens.unsqueeze(1).repeat(1, books, 1)}
    if "input_ids" in given and "pixel_values" in given:
        yield {"attention_mask": torch.ones((asked.batch, asked.seq), dtype=torch.int64)}


def _labels(module: Any, given: dict[str, Any], asked: InputShape) -> torch.Tensor | None:
    """What the class's loss compares with, where it is a tensor of classes."""
    name = type(module).__name__
    tokens: torch.Tensor | None = given["input_ids"].clone() if "input_ids" in given else None
    if any(part in name for part in ("CausalLM", "MaskedLM", "LMHead", "ConditionalGeneration", "WithLM", "Seq2Seq")):
        return tokens if tokens is not None else ids(module.config, asked)
    if "TokenClassification" in name or "PreTraining" in name:
        return tokens
    if any(part in name for part in ("SequenceClassification", "ImageClassification", "AudioClassification", "Video")):
        return torch.zeros(asked.batch, dtype=torch.int64)
    if "CTC" in name:
        return torch.ones((asked.batch, 8), dtype=torch.int64)
    if tokens is not None and "generate" in dir(module):
        return tokens
    return None
