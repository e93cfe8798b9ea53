"""The rule axis as a mapping: the rules there are, and ``WRAPPER(RULE)``, made when it is asked for."""

import re
from collections.abc import Callable, Mapping

from memopt.axis import Axis
from memopt.rules.base import Rule

_WRAPPED = re.compile(r"([a-z0-9]+)\(([a-z0-9]+)\)")


class Rules(Axis[Rule]):
    """Iterating gives the plain rules; looking up also finds every wrapper around every one of them."""

    __slots__ = ("wrappers",)

    def __init__(self, plain: dict[str, str], wrappers: Mapping[str, Callable[[Rule], Rule]]) -> None:
        super().__init__("memopt.rules", plain)
        self.wrappers = wrappers

    def _parts(self, name: object) -> tuple[str, str] | None:
        match = _WRAPPED.fullmatch(name) if isinstance(name, str) else None
        known = match is not None and match[1] in self.wrappers and match[2] in self._places
        return (match[1], match[2]) if match is not None and known else None

    def parts(self, name: str) -> tuple[str, str]:
        """(wrapper, rule within it); of a plain rule ("", its own name)."""
        return self._parts(name) or ("", name)

    def __contains__(self, name: object) -> bool:
        return name in self._places or self._parts(name) is not None

    def __getitem__(self, name: str) -> Rule:
        parts = None if name in self._made else self._parts(name)
        if parts is not None:
            self._made[name] = self.wrappers[parts[0]](self[parts[1]])
        return super().__getitem__(name)
