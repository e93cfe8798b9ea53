"""Sequences: drawn, replayed, cut down."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from random import Random

import torch

import memopt
from tests.twin.cases import Case, draw_case
from tests.twin.machine import Skip, Twin
from tests.twin.mixed import draw_spec
from tests.twin.operations import WEIGHTS, load_all

LENGTH = (8, 24)


class Failed(AssertionError):
    """``at`` is the number of operations that it took."""

    def __init__(self, text: str, at: int, applied: list[str]) -> None:
        super().__init__(text)
        self.at, self.applied = at, applied


def draw(seed: int, without: Iterable[str] = ()) -> str:
    """A sequence as text."""
    r = Random(seed)
    operations = load_all()
    names = [name for name in operations if name not in set(without)]
    weights = [WEIGHTS[name] for name in names]
    chosen = r.choices(names, weights, k=r.randint(*LENGTH))
    several = draw_spec(seed)
    return f"{seed}{'=' * bool(several)}{several}: " + " ".join(f"{name}/{r.randrange(10_000)}" for name in chosen)


def perform(t: Twin, name: str, seed: int) -> bool:
    """One operation, and what must be true after it; False if it means nothing for this pair."""
    try:
        load_all()[name](t, Random(seed))
    except Skip:
        return False
    t.check()
    return True


def load_checkpoints(t: Twin) -> None:
    """Those that were saved on the way load to the end."""
    for path, make in t.checkpoints:
        model, opt = make()
        memopt.load(path, model=model, optimizer=opt, rng=False)
        opt.close()


def case_of(text: str) -> tuple[Case, int]:
    """The case of a sequence, and its number."""
    number, _, spec = text.partition(":")[0].strip().partition("=")
    return draw_case(int(number), spec or None), int(number)


def replay(text: str, trace: bool = False) -> list[str]:
    """Go through a sequence; the operations that applied. Raises :class:`Failed`."""
    case, number = case_of(text)
    applied: list[str] = []
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        at, one, t = 0, "", None
        try:
            t = Twin(case, number)
            for one in text.partition(":")[2].split():
                at += 1
                name, _, seed = one.partition("/")
                if trace:
                    print(one, flush=True)
                if perform(t, name, int(seed)):
                    applied.append(name)
            load_checkpoints(t)
        except Exception as error:
            raise Failed(f"{case}: {one}: {type(error).__name__}: {error}", at, applied) from error
        finally:
            if t is not None:
                t.close()
    return applied


def shorten(text: str) -> str:
    """The shortest part of a sequence that still fails, one operation after the other left out."""
    head, _, rest = text.partition(":")
    chosen = rest.split()

    def fails(some: list[str]) -> int:
        try:
            replay(f"{head}: {' '.join(some)}")
        except Failed as failure:
            return failure.at
        return 0

    chosen = chosen[: fails(chosen) or len(chosen)]
    i = 0
    while i < len(chosen) - 1:
        fewer = chosen[:i] + chosen[i + 1 :]
        if fails(fewer):
            chosen = fewer
        else:
            i += 1
    return f"{head}: {' '.join(chosen)}"
