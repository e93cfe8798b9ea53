"""A model of the Hugging Face Hub by its id: its config.json, fetched (or found in the cache) by transformers."""

from __future__ import annotations

import re

from estimators.errors import InputError, shown
from estimators.models.model import Model

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_FILES = (".json", ".safetensors", ".yaml", ".py")


def is_id(text: str) -> bool:
    """Whether a text looks like ``organisation/name``.

    >>> is_id("mistralai/Mistral-7B-v0.3"), is_id("./model"), is_id("folder/config.json")
    (True, False, False)
    """
    return bool(_ID.fullmatch(text)) and not text.endswith(_FILES)


def from_hub(name: str, otherwise: str) -> Model:
    """The model that the Hub's configuration of ``name`` describes. ``otherwise``: the sentence about a name that is
    not built in, said where the Hub does not help either. Raises :class:`InputError`."""
    try:
        from transformers import PreTrainedConfig
    except ImportError:
        raise InputError(f"{otherwise}; to look it up on the Hub: pip install transformers") from None
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
    except Exception as error:
        # Whatever the network, the Hub or the file have to say: OSError, HTTP errors, JSON errors.
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{otherwise}; the Hub did not help: {type(error).__name__}: {reason}") from None
    if not config:
        raise InputError(f"{otherwise}; {shown(name)} has no config.json on the Hub")
    from estimators.models.from_config import from_config

    return from_config(config, name)
