"""A model of the Hugging Face Hub by its id: its config.json, fetched (or found in the cache)."""

from __future__ import annotations

import re

from estimators.errors import InputError
from estimators.models.model import Model

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
#: Seconds to wait for an answer.
_PATIENCE = 0.7
_FILES = (".json", ".safetensors", ".yaml", ".py")


def is_id(text: str) -> bool:
    """Whether a text looks like ``organisation/name``.

    >>> is_id("mistralai/Mistral-7B-v0.3"), is_id("./model"), is_id("folder/config.json")
    (True, False, False)
    """
    return bool(_ID.fullmatch(text)) and not text.endswith(_FILES)


def from_hub(name: str, otherwise: str) -> Model:
    """The model that the Hub's configuration of ``name`` describes. ``otherwise``: the sentence about a name that is
    not built in, said where the Hub does not help either. Raises :class:`InputError`; where there is no network, at
    once."""
    try:
        from huggingface_hub import constants, hf_hub_download
    except ImportError:
        raise InputError(f"{otherwise}; to look it up on the Hub: pip install huggingface_hub") from None
    there = not constants.HF_HUB_OFFLINE and _reachable(constants.ENDPOINT)
    try:
        path = hf_hub_download(name, "config.json", local_files_only=not there)
    except Exception as error:
        # Whatever the network, the Hub or the cache have to say: OSError, HTTP errors, a file that is not there.
        reason = (
            " ".join(str(error).split())[:120] if there else "it cannot be reached, and its cache has no config.json"
        )
        raise InputError(f"{otherwise}; the Hub did not help: {reason}") from None
    from estimators.models.from_files import from_path

    return from_path(path)._replace(name=name)


def _reachable(endpoint: str) -> bool:
    """Whether somebody answers there soon: a download would try again and again. Behind a proxy that is not known."""
    import os
    import socket
    from urllib.parse import urlsplit

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    parts = urlsplit(endpoint)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=_PATIENCE):
            return True
    except OSError:
        return False
