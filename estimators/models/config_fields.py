"""Reading published configuration fields: every value is checked, every refusal names the field, the value and what is
allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from estimators.errors import InputError, shown

#: Ten times the widest published dimension (vocabularies of about 260,000 rows, widths of about 54,000).
MAX_DIMENSION = 2**22
#: Several times the deepest published model (128 layers).
MAX_LAYERS = 1024
MAX_EXPERTS = 2**16
_REQUIRED = object()


class Fields:
    """The fields of a configuration, read with checks. A default stands for a field that is missing."""

    __slots__ = ("_values", "source")

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self.source = source

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name, default)
        if value is _REQUIRED:
            raise InputError(f"{self.source} has no {name}; it must be an integer >= 1")
        return value

    def optional(self, name: str, default: int | None = None) -> int | None:
        """An integer, or None where it is null."""
        return None if self._get(name, default) is None else self.integer(name, default)

    def integer(self, name: str, default: Any = _REQUIRED, *, least: int = 1, most: int = MAX_DIMENSION) -> int:
        """An integer in [least, most]."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise InputError(
                f"{self.source}: {name}={shown(value)} is not allowed; it must be an integer from {least} to {most}"
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or False; null reads as False, as it does in transformers."""
        value = self._get(name, default)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise InputError(f"{self.source}: {name}={shown(value)} is not allowed; it must be true or false")
        return value

    def share(self, name: str, default: float) -> float:
        """A number from 0 to 1, such as a probability of dropout."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise InputError(f"{self.source}: {name}={shown(value)} is not allowed; it must be a number from 0 to 1")
        return float(value)

    def text(self, name: str, default: str) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise InputError(f"{self.source}: {name}={shown(value)} is not allowed; it must be a string")
        return value

    def texts(self, name: str, count: int) -> tuple[str, ...]:
        """A list of ``count`` strings; empty where it is missing or null."""
        value = self._get(name, None)
        if value is None:
            return ()
        if not isinstance(value, list) or len(value) != count or not all(isinstance(v, str) for v in value):
            what = f"a list of {count} strings, one per layer"
            raise InputError(f"{self.source}: {name}={shown(value)} is not allowed; it must be {what}")
        return tuple(value)

    def integers(self, name: str) -> frozenset[int]:
        """A list of integers; empty where it is missing or null."""
        value = self._get(name, None)
        if value is None:
            return frozenset()
        if not isinstance(value, list) or not all(isinstance(v, int) for v in value):
            raise InputError(f"{self.source}: {name}={shown(value)} is not allowed; it must be a list of integers")
        return frozenset(value)

    def entries(self, name: str, default: int) -> int:
        """How many entries an object has."""
        value = self._get(name, None)
        if value is None:
            return default
        if not isinstance(value, dict):
            raise InputError(f"{self.source}: {name}={shown(value)} is not allowed; it must be an object")
        return len(value)

    def layers(self, name: str = "num_hidden_layers", default: Any = _REQUIRED) -> int:
        return self.integer(name, default, least=0, most=MAX_LAYERS)

    def experts(self, name: str) -> int:
        """Experts of a layer; transformers 5 saves several families' own name as ``num_local_experts``."""
        given = name if name in self._values else "num_local_experts"
        return self.integer(given if given in self._values else name, most=MAX_EXPERTS)

    def divide(self, total: str, parts: str) -> int:
        """``total`` / ``parts``, which must come out even."""
        a, b = self.integer(total), self.integer(parts)
        if a % b:
            raise InputError(f"{self.source}: {total}={a} is not a multiple of {parts}={b}")
        return a // b
