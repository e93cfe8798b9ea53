"""What is asked for, and how a configuration's fields are read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class InputShape(NamedTuple):
    """``batch`` sequences of ``seq`` tokens in ``dtype``."""

    batch: int
    seq: int
    dtype: torch.dtype

    def floats(self, *shape: int) -> torch.Tensor:
        """[batch, *shape] of values that do not matter."""
        return torch.empty((self.batch, *shape), dtype=self.dtype, device="meta")

    def ones(self, *shape: int) -> torch.Tensor:
        """[batch, *shape], an integer mask of which nothing is left out."""
        return torch.ones((self.batch, *shape), dtype=torch.int64)


def read(config: Any, name: str, default: Any = None) -> Any:
    """A field, or ``default``; some configurations refuse to tell one that differs from layer to layer."""
    try:
        return getattr(config, name, default)
    except Exception:
        return default


def text_of(config: Any) -> Any:
    """The part of a configuration that describes the language model."""
    get = getattr(config, "get_text_config", None)
    try:
        return get() if get else config
    except Exception:
        return config


_PARTS = ("vision_config", "audio_config", "encoder", "backbone_config", "audio_encoder", "encoder_config")


def field(config: Any, *names: str, default: Any = None) -> Any:
    """The first of several fields that a configuration has, its own or one of a part's."""
    ahead = [config]
    while ahead:
        part = ahead.pop(0)
        for name in names:
            found = part.get(name) if isinstance(part, dict) else read(part, name)
            if found is not None:
                return found
        ahead += [inner for name in _PARTS if (inner := read(part, name)) is not None]
    return default
