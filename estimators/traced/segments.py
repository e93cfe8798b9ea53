"""The events of a step by layer: where each layer's forward and backward pass begins, and a deeper model's events from
those of a shallow one.

A stack of layers that are alike is run with a few of them. Of those, two neighbours that are neither the first nor the
last (two *periods*, where kinds of layers alternate) must have done the same, event for event; the second of them then
stands for all that were left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from estimators.activations.recorded import BACKWARD, FREE, GRADIENT, MARK, OUTPUT, TAKE, Recorded, TapeEvent
from estimators.traced.recorder import Recorder, leaves

#: ``(pass, stack, layer)``: ``f`` a forward pass, ``b`` a backward pass, ``o`` what follows a stack's forward pass.
Label = tuple[str, int, int]


class Unlike(Exception):
    """Layers did not do the same: the whole model has to be run."""


class Period(NamedTuple):
    """Layers ``first`` up to ``first + 2 * length`` of a stack are two periods; ``copies`` more follow the second."""

    stack: int
    first: int
    length: int
    copies: int


class Segments:
    """Events cut where a layer's pass begins."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.cuts: list[tuple[int, Label]] = []
        self.phases: list[int] = []

    def phase(self, which: int) -> None:
        if which not in self.phases and not (self.phases and which < self.phases[-1]):
            self.phases.append(which)
            self.recorder.events.append((MARK, which, 0))

    def cut(self, label: Label) -> None:
        self.cuts.append((len(self.recorder.events), label))

    def watch(self, stacks: Iterable[list[torch.nn.Module]]) -> list[Any]:
        """Hooks that cut; to be removed."""
        hooks: list[Any] = []
        for s, layers in enumerate(stacks):
            for i, layer in enumerate(layers):
                hooks.append(layer.register_forward_pre_hook(self._before(("f", s, i))))
                hooks.append(layer.register_forward_hook(self._after(s, i, len(layers))))
        return hooks

    def _before(self, label: Label) -> Any:
        def hook(module: Any, args: Any) -> None:
            if BACKWARD not in self.phases:
                self.cut(label)

        return hook

    def _after(self, s: int, i: int, n: int) -> Any:
        def backward(gradient: Any) -> None:
            self.cut(("b", s, i))

        def hook(module: Any, args: Any, out: Any) -> None:
            if BACKWARD in self.phases:
                return
            for t in leaves(out):
                if t.requires_grad:
                    t.register_hook(backward)
                    break
            if i == n - 1:
                self.cut(("o", s, 0))

        return hook

    def recorded(self, periods: Iterable[Period] = ()) -> Recorded:
        """All events, with the copies that ``periods`` ask for. Raises :class:`Unlike`."""
        parts = _cut(self.recorder.events, self.cuts)
        for period in periods:
            parts = _deepened(parts, period)
        return _numbered(parts)


class _Part:
    """A run of events under one label. An event's second is ``(part, number among what the part takes)``."""

    __slots__ = ("events", "label")

    def __init__(self, label: Any) -> None:
        self.label = label
        self.events: list[tuple[int, Any, int]] = []

    @property
    def taken(self) -> list[int]:
        return [n for code, _, n in self.events if code == TAKE]


def _cut(events: list[TapeEvent], cuts: list[tuple[int, Label]]) -> list[_Part]:
    parts = [_Part(None)]
    where: dict[int, tuple[_Part, int]] = {}
    counts: dict[int, int] = {}
    ahead = sorted(cuts, key=lambda c: c[0])
    at = 0
    for i, (code, slot, nbytes) in enumerate(events):
        while at < len(ahead) and ahead[at][0] <= i:
            parts.append(_Part(ahead[at][1]))
            at += 1
        part = parts[-1]
        if code == TAKE:
            where[slot] = part, counts.get(id(part), 0)
            counts[id(part)] = where[slot][1] + 1
        known = slot if code == MARK else where.get(slot)
        part.events.append((code, known, nbytes))
    return parts


def _deepened(parts: list[_Part], period: Period) -> list[_Part]:
    """``period.copies`` more periods after the second one."""
    s, lo, p = period.stack, period.first, period.length
    labels = [part.label for part in parts]
    f1, f2 = ([("f", s, lo + k * p + j) for j in range(p)] for k in (0, 1))
    b1, b2 = ([("b", s, lo + k * p + j) for j in reversed(range(p))] for k in (0, 1))
    spans = {}
    for name, wanted in (("f1", f1), ("f2", f2), ("b1", b1), ("b2", b2)):
        if labels.count(wanted[0]) != 1:
            raise Unlike
        start = labels.index(wanted[0])
        if labels[start : start + p] != wanted:
            raise Unlike
        spans[name] = start
    if spans["f2"] != spans["f1"] + p or spans["b1"] != spans["b2"] + p:
        raise Unlike
    parts, merged = _merged(parts, {start: (name, p) for name, start in spans.items()})
    one, two = {k: merged[k + "1"] for k in "fb"}, {k: merged[k + "2"] for k in "fb"}
    for k in "fb":
        _same(one[k], two[k], one, two)
    copies = [{k: _Part(None) for k in "fb"} for _ in range(period.copies)]
    instances = [two, *copies]  # from the input on
    for at, made in enumerate(copies, 1):
        for k in "fb":
            made[k].events = _copied(k, at, one, two, instances)
    result: list[_Part] = []
    inner = {id(part) for group in (one, two) for part in group.values()}
    seen_b = False
    for part in parts:
        if part is two["b"]:
            seen_b = True
            result += [made["b"] for made in reversed(copies)]
        if id(part) not in inner:
            part.events = _outside(part, one, two, copies, seen_b)
        result.append(part)
        if part is two["f"]:
            result += [made["f"] for made in copies]
    # The second period's own backward pass was written for the third as its neighbour, which is now the first copy.
    two["b"].events = _relinked(one["b"], two["b"], one, two, instances)
    two["f"].events = list(two["f"].events)
    return result


def _merged(parts: list[_Part], spans: dict[int, tuple[str, int]]) -> tuple[list[_Part], dict[str, _Part]]:
    """Each period's parts as one."""
    result: list[_Part] = []
    named: dict[str, _Part] = {}
    moved: dict[int, tuple[_Part, int]] = {}
    skip = 0
    for i, part in enumerate(parts):
        if skip:
            skip -= 1
            continue
        if i not in spans:
            result.append(part)
            continue
        name, p = spans[i]
        whole = _Part(name)
        for piece in parts[i : i + p]:
            moved[id(piece)] = whole, len(whole.taken)
            whole.events += piece.events
        named[name], skip = whole, p - 1
        result.append(whole)
    for part in result:
        part.events = [
            (code, (moved[id(r[0])][0], moved[id(r[0])][1] + r[1]), n)
            if isinstance(r, tuple) and id(r[0]) in moved
            else (code, r, n)
            for code, r, n in part.events
        ]
    return result, named


def _same(a: _Part, b: _Part, one: dict[str, _Part], two: dict[str, _Part]) -> None:
    """Raises :class:`Unlike` unless both did the same, each to its own and to its neighbours'."""
    if [(c, n) for c, _, n in a.events] != [(c, n) for c, _, n in b.events]:
        raise Unlike
    own = {id(one["f"]): id(two["f"]), id(one["b"]): id(two["b"])}
    first, second = set(own), set(own.values())
    for (code, r, _), (_, q, _) in zip(a.events, b.events, strict=True):
        if code not in (FREE, GRADIENT) or (r is None and q is None):
            continue
        if r is None or q is None:
            raise Unlike
        if id(r[0]) in first and id(q[0]) in second:
            if own[id(r[0])] != id(q[0]) or r[1] != q[1]:
                raise Unlike
        elif not (id(q[0]) in first or id(r[0]) in second):
            raise Unlike  # something of the whole model's, which cannot go twice


def _copied(k: str, at: int, one: dict[str, _Part], two: dict[str, _Part], instances: list[dict[str, _Part]]) -> Any:
    """The events of copy ``at``, of the pass ``k``."""
    made = []
    last = at == len(instances) - 1
    below = {id(one[j]): instances[at - 1][j] for j in "fb"}
    own = {id(two[j]): instances[at][j] for j in "fb"}
    for (code, r, n), (_, q, _) in zip(one[k].events, two[k].events, strict=True):
        if code in (MARK, TAKE) or q is None:
            made.append((code, q, n))
        elif id(q[0]) in own:
            made.append((code, (own[id(q[0])], q[1]), n))
        elif id(q[0]) in below:
            made.append((code, (below[id(q[0])], q[1]), n))
        elif last:
            made.append((code, q, n))
        else:  # the neighbour above
            above = {id(two[j]): instances[at + 1][j] for j in "fb"}
            made.append((code, (above[id(r[0])], r[1]), n))
    return made


def _relinked(
    a: _Part, b: _Part, one: dict[str, _Part], two: dict[str, _Part], instances: list[dict[str, _Part]]
) -> Any:
    """The second period's events with the first copy as its neighbour above."""
    if len(instances) == 1:
        return b.events
    inner = {id(part) for group in (one, two) for part in group.values()}
    above = {id(two[j]): instances[1][j] for j in "fb"}
    return [
        (code, q, n) if code in (MARK, TAKE) or q is None or id(q[0]) in inner else (code, (above[id(r[0])], r[1]), n)
        for (code, r, n), (_, q, _) in zip(a.events, b.events, strict=True)
    ]


def _outside(
    part: _Part, one: dict[str, _Part], two: dict[str, _Part], copies: list[dict[str, _Part]], after: bool
) -> Any:
    """Another part's events: what it frees of both periods it frees of all copies; of the second alone, of the one that
    is its neighbour (``after``: in the backward pass's order, where that is the second itself)."""
    together = {(code, id(r[0]), r[1]) for code, r, _ in part.events if code in (FREE, OUTPUT) and r is not None}
    kind = {id(two[k]): k for k in "fb"}
    made = []
    for code, r, n in part.events:
        if code in (MARK, TAKE) or r is None or id(r[0]) not in kind or not copies:
            made.append((code, r, n))
            continue
        k = kind[id(r[0])]
        if (code, id(one[k]), r[1]) in together:
            made += [(code, r, n), *((code, (c[k], r[1]), n) for c in copies)]
        else:
            made.append((code, r if after else (copies[-1][k], r[1]), n))
    return made


def _numbered(parts: list[_Part]) -> Recorded:
    slots: dict[tuple[int, int], int] = {}
    events: list[TapeEvent] = []
    outputs: set[int] = set()
    for part in parts:
        count = 0
        for code, r, n in part.events:
            if code == TAKE:
                slots[id(part), count] = len(slots)
                events.append((code, len(slots) - 1, n))
                count += 1
            elif code == OUTPUT:
                outputs.add(slots[id(r[0]), r[1]])
            elif code in (FREE, GRADIENT):
                events.append((code, -1 if r is None else slots[id(r[0]), r[1]], n))
            else:
                events.append((code, r or 0, n))
    return Recorded(tuple(events), len(slots), frozenset(outputs))
