"""Large pages under what a CPU step reads and writes.

A step walks through parameters, gradients and state once, and with pages of 4 KiB the processor spends part of that
time on finding them. Linux can put a process's own memory on pages of 2 MiB (transparent huge pages). torch asks for
them for all its large tensors where ``THP_MEM_ALLOC_ENABLE=1`` is in the environment; a plan asks for what it steps:
parameters, state, and gradients that stay where they are (``zero_grad(set_to_none=False)``).

Nothing moves but the system's pages: addresses and contents stay. Only memory is touched that is this process's alone
(no mapped file, nothing shared) and in use already, so that no byte is added. State is on large pages from the
beginning: they are asked for before it is zeroed. For the rest the work is spread over the first steps, which it makes
a sixtieth longer: where memory is fragmented the system takes some 3 ms for a page, thirty times what a step takes for
its bytes. ``MEMOPT_HUGE_PAGES=off`` turns it off; it is off where the system's administrator has
said ``never``.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

from memopt.core.libc import advise

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PAGE = 2 * 2**20
#: Tensors below have next to nothing to gain.
SMALLEST = 2 * PAGE
#: Steps in a row after which a gradient's place is taken to be its own; steps after which nobody looks any more.
STEADY, PATIENCE = 3, 20
#: Of a step's time, what may be spent on it.
SHARE = 1 / 60
_WANTED, _COLLAPSE = 14, 25  # MADV_HUGEPAGE; MADV_COLLAPSE of Linux 6.1
_SETTING = "/sys/kernel/mm/transparent_hugepage/enabled"

Stretch = tuple[int, int]  # address, bytes


@lru_cache
def setting() -> str:
    """What the administrator chose: ``always``, ``madvise`` or ``never``; empty where there is no such thing."""
    try:
        with open(_SETTING) as file:
            return file.read().partition("[")[2].partition("]")[0]
    except OSError:
        return ""


def off() -> str:
    """Why large pages are not asked for, or an empty string."""
    if sys.platform != "linux" or not setting():
        return "this system has no transparent huge pages"
    if os.environ.get("MEMOPT_HUGE_PAGES", "").lower() in ("off", "0", "no"):
        return "MEMOPT_HUGE_PAGES=off turned them off"
    return f"{_SETTING} says never" if setting() == "never" else ""


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.zeros; on the CPU on large pages where there is room for one, asked for before anything is written."""
    import torch

    if device.type != "cpu" or prod(shape) * dtype.itemsize < SMALLEST or off():
        return torch.zeros(shape, dtype=dtype, device=device)
    made = torch.empty(shape, dtype=dtype, device=device)
    begin, end = made.data_ptr(), made.data_ptr() + made.nbytes
    begin, end = -(-begin // PAGE) * PAGE, end // PAGE * PAGE
    if begin < end:
        advise(begin, end - begin, _WANTED)
    return made.zero_()


class Pages:
    """The large pages of one plan: asked for a few at a time by :meth:`after`, which is called after each step."""

    def __init__(self, lasting: Iterable[Stretch], gradients: Callable[[], list[Stretch]]) -> None:
        self.reason = off()
        self.asked = self.given = 0  # pages
        self._gradients = gradients
        self._places: list[Stretch] = []
        self._same = self._steps = 0
        self._credit = 0.0  # seconds; less than zero where a page took longer than there was
        lasting = [stretch for stretch in lasting if stretch[1] >= SMALLEST]
        self.wanted = bool(lasting)
        self._looking = self.wanted and not self.reason
        self._lasting = self._ask(lasting) if self._looking else deque()
        self._passing: deque[int] = deque()  # of gradients

    def after(self, seconds: float) -> None:
        """Go on for a share of what the step took. The gradients are still there."""
        if self.done:
            return
        if self._looking or self._passing:
            self._look_at_gradients()
        self._credit += SHARE * seconds
        for pending in (self._lasting, self._passing):
            while pending and self._credit > 0:
                start = time.perf_counter()
                self._collapse(pending.popleft())
                self._credit -= time.perf_counter() - start

    @property
    def done(self) -> bool:
        return not (self._looking or self._lasting or self._passing)

    def explain(self) -> str:
        if self.reason:
            return f"of the system's usual size: {self.reason}"
        return f"{self.given * PAGE >> 20} MiB of what is stepped are on pages of 2 MiB"

    def _look_at_gradients(self) -> None:
        places = self._gradients()
        self._same = self._same + 1 if places == self._places else 0
        self._places = places
        self._steps += 1
        if not self._same:  # they have gone elsewhere, and what is there now is somebody else's
            self._passing.clear()
        if self._looking and self._same == STEADY:
            self._passing = self._ask(places)
        self._looking = self._looking and self._same < STEADY and self._steps < PATIENCE

    def _ask(self, stretches: Iterable[Stretch]) -> deque[int]:
        pages: deque[int] = deque()
        for begin, end in own(stretches):
            if advise(begin, end - begin, _WANTED):
                pages.extend(range(begin, end, PAGE))
        self.asked += len(pages)
        return pages

    def _collapse(self, address: int) -> None:
        if advise(address, PAGE, _COLLAPSE):
            self.given += 1
        elif ctypes.get_errno() == errno.EINVAL:  # before Linux 6.1: the system does it in its own time
            self.reason = "this system puts memory on large pages in its own time (Linux before 6.1)"
            self._lasting.clear()
            self._passing.clear()


def own(stretches: Iterable[Stretch]) -> list[tuple[int, int]]:
    """``(begin, end)`` of the whole large pages within these stretches that are memory of this process alone."""
    stretches = list(stretches)
    if not stretches:
        return []
    mappings = _anonymous()
    found = []
    for address, nbytes in stretches:
        begin, end = -(-address // PAGE) * PAGE, (address + nbytes) // PAGE * PAGE
        at = bisect.bisect_right(mappings, (begin, sys.maxsize)) - 1
        if begin < end and at >= 0 and mappings[at][1] >= end:
            found.append((begin, end))
    return found


def _anonymous() -> list[tuple[int, int]]:
    """The mappings that are private and of no file, in order; neighbours joined."""
    found: list[tuple[int, int]] = []
    with open("/proc/self/maps") as file:
        for line in file:
            where, rights, _, _, inode = line.split()[:5]
            if inode != "0" or rights != "rw-p":
                continue
            begin, end = (int(x, 16) for x in where.split("-"))
            if found and found[-1][1] == begin:
                found[-1] = (found[-1][0], end)
            else:
                found.append((begin, end))
    return found
