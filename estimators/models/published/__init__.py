"""Published configurations, field for field as their authors' config.json has them. A name here is the published
model's, in lower case, without its organisation."""

from __future__ import annotations

from typing import Any

from estimators.models.published.decoders import DECODERS

#: All of them, by name; read only where somebody asks for all (:func:`__getattr__`).
KNOWN: dict[str, dict[str, Any]]


def published(name: str) -> dict[str, Any] | None:
    """The configuration of that name, or None. Most are decoders, and only their table is read for them."""
    found = DECODERS.get(name)
    return _all().get(name) if found is None else found


def _all() -> dict[str, dict[str, Any]]:
    from estimators.models.published.encoders import ENCODERS
    from estimators.models.published.experts import EXPERTS

    return {**DECODERS, **EXPERTS, **ENCODERS}


def __getattr__(name: str) -> Any:
    if name != "KNOWN":
        raise AttributeError(f"module 'estimators.models.published' has no attribute {name!r}")
    globals()["KNOWN"] = found = _all()
    return found
