"""Published configurations, field for field as their authors' config.json has them. A name here is the published
model's, in lower case, without its organisation."""

from __future__ import annotations

from typing import Any

from estimators.models.published.decoders import DECODERS
from estimators.models.published.encoders import ENCODERS
from estimators.models.published.experts import EXPERTS

KNOWN: dict[str, dict[str, Any]] = {**DECODERS, **EXPERTS, **ENCODERS}
