"""The rule axis as a mapping: the rules there are, and ``WRAPPER(RULE)``, made when it is asked for."""

from __future__ import annotations

import re
from collections.abc import Callable

from memopt.rules.base import Rule

_WRAPPED = re.compile(r"([a-z0-9]+)\(([a-z0-9]+)\)")


class Rules(dict[str, Rule]):
    """Iterating gives the plain rules; looking up also finds every wrapper around every one of them."""

    def __init__(self, plain: dict[str, Rule], wrappers: dict[str, Callable[[Rule], Rule]]) -> None:
        super().__init__(plain)
        self.wrappers = wrappers
        self._made: dict[str, Rule] = {}

    def _parts(self, name: object) -> tuple[str, str] | None:
        match = _WRAPPED.fullmatch(name) if isinstance(name, str) else None
        known = match is not None and match[1] in self.wrappers and dict.__contains__(self, match[2])
        return (match[1], match[2]) if match is not None and known else None

    def __contains__(self, name: object) -> bool:
        return dict.__contains__(self, name) or self._parts(name) is not None

    def __missing__(self, name: str) -> Rule:
        parts = self._parts(name)
        if parts is None:
            raise KeyError(name)
        if name not in self._made:
            self._made[name] = self.wrappers[parts[0]](self[parts[1]])
        return self._made[name]
