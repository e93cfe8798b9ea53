"""Large pages: asked for where they may be, seen in the system's own account, and nothing else changes."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import tempfile
import weakref

import pytest
import torch

import memopt
from memopt import kernels
from memopt.kernels import huge_pages
from memopt.kernels.huge_pages import PAGE, STEADY

pytestmark = [
    pytest.mark.skipif(kernels.library() is None, reason=f"no kernels here: {kernels.missing()}"),
    pytest.mark.skipif(bool(huge_pages.off()), reason=huge_pages.off()),
]

ROWS = 2048  # of 2048 fp32: 16 MiB


def account(address: int, nbytes: int, key: str) -> int:
    """KiB of the mappings that this range is part of."""
    total, inside = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            first = line.split()[0]
            if "-" in first and not first.endswith(":"):
                begin, end = (int(x, 16) for x in first.split("-"))
                inside = begin < address + nbytes and address < end
            elif inside and first == f"{key}:":
                total += int(line.split()[1])
    return total


def stepped(steps: int, keep: bool = True) -> tuple[torch.nn.Parameter, memopt.Optimizer]:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(ROWS, 2048))
    opt = memopt.create([p], "adamw-8bit")
    kept, others = torch.empty(ROWS, 2048), []
    for _ in range(steps):
        gradient = torch.randn(ROWS, 2048)
        p.grad = kept.copy_(gradient) if keep else gradient
        others.append(gradient if not keep else None)  # alive, so that the next lies elsewhere
        opt.step()
    return p, opt


def test_the_system_says_so() -> None:
    p, opt = stepped(STEADY + 3)
    found = opt.stepper.plan.pages
    found.after(1e6)
    assert found.done
    assert found.asked >= 2 * 7 + 1  # parameter and gradient, each of 8 pages that need not begin at one; some state
    if found.given == 0:
        pytest.skip(f"the system gave none: {opt.explain()}")
    assert account(p.data_ptr(), p.nbytes, "AnonHugePages") >= 7 * PAGE >> 10
    assert account(p.grad.data_ptr(), p.nbytes, "AnonHugePages") >= 7 * PAGE >> 10
    assert f"{found.given * 2} MiB of what is stepped are on pages of 2 MiB" in opt.explain()


def test_same_bits_without(monkeypatch) -> None:
    with_them, _ = stepped(8)
    monkeypatch.setenv("MEMOPT_HUGE_PAGES", "off")
    without, opt = stepped(8)
    assert torch.equal(with_them, without)
    assert opt.stepper.plan.pages.asked == 0
    assert "MEMOPT_HUGE_PAGES=off" in opt.explain()


def test_gradients_that_move_are_left_alone(monkeypatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(huge_pages, "advise", lambda *call: bool(asked.append(call)) or True)
    p, opt = stepped(STEADY + 4, keep=False)
    begins = [begin for begin, _, _ in asked]
    assert begins
    kept = (p, *opt.state[p].values())
    assert all(any(t.data_ptr() <= b < t.data_ptr() + t.nbytes for t in kept) for b in begins)


def test_a_share_of_a_steps_time_is_spent(monkeypatch) -> None:
    """A page that takes longer than that is paid for by the next steps."""
    clock = [0.0]
    monkeypatch.setattr(huge_pages.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(huge_pages, "own", lambda stretches: [(a, a + n) for a, n in stretches])

    def advise(begin: int, nbytes: int, how: int) -> bool:
        clock[0] += 3.0 * (how == huge_pages._COLLAPSE)
        return True

    monkeypatch.setattr(huge_pages, "advise", advise)
    found = huge_pages.Pages([(0, 4 * PAGE)], list)
    given = []
    for _ in range(10):
        found.after(1 / huge_pages.SHARE)
        given.append(found.given)
    assert given == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4]


def test_gradients_that_leave_are_not_touched_any_more(monkeypatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(huge_pages, "advise", lambda begin, *_: bool(calls.append(begin)) or True)
    place = [(64 * PAGE, 8 * PAGE)]
    monkeypatch.setattr(huge_pages, "own", lambda stretches: [(a, a + n) for a, n in stretches])
    found = huge_pages.Pages([(0, 2 * PAGE)], lambda: list(place))
    for _ in range(STEADY + 1):
        found.after(0.0)
    assert not found.done
    place[0] = (128 * PAGE, 8 * PAGE)
    found.after(1e3)
    assert found.done
    assert calls == [0, 64 * PAGE, 0, PAGE]  # asked twice; the parameter's pages, none of the gradient's


def test_an_old_system_is_asked_once(monkeypatch) -> None:
    def advise(begin: int, nbytes: int, advice: int) -> bool:
        ctypes.set_errno(errno.EINVAL)
        return advice == huge_pages._WANTED

    monkeypatch.setattr(huge_pages, "advise", advise)
    _, opt = stepped(3)
    assert opt.stepper.plan.pages.given == 0
    assert "in its own time" in opt.explain()


def test_only_memory_of_this_process_alone() -> None:
    size = 8 * PAGE
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        with mmap.mmap(file.fileno(), size) as shared, mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE) as private:
            address = {
                name: ctypes.addressof(ctypes.c_char.from_buffer(m))
                for name, m in (("shared", shared), ("private", private))
            }
            assert huge_pages.own([(address["shared"], size)]) == []
            (begin, end), *more = huge_pages.own([(address["private"] + 5, size - 9)])
            assert not more
            assert begin % PAGE == end % PAGE == 0
            assert address["private"] < begin < end < address["private"] + size
            assert huge_pages.own([(address["private"], PAGE - 1)]) == []


def test_everything_is_freed_with_the_last_reference() -> None:
    gc.collect()
    gc.disable()
    try:
        p, opt = stepped(2)
        gone = [weakref.ref(p), weakref.ref(opt), *map(weakref.ref, opt.state[p].values())]
        del p, opt
        assert not any(ref() is not None for ref in gone)
    finally:
        gc.enable()


def test_no_memory_is_added() -> None:
    p, opt = stepped(2)
    before = account(p.data_ptr(), p.nbytes, "Rss")
    for _ in range(60):
        opt.step()
    assert account(p.data_ptr(), p.nbytes, "Rss") <= before
