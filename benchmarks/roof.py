"""What bounds a step from below on a CPU: loads and stores without arithmetic, and arithmetic without memory."""

from __future__ import annotations

import ctypes
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import memopt
from memopt.kernels.build import compiler

#: Elements of a chunk of a step.
CHUNK = 1024
#: Of what stays in the second-level cache of one core, and of next to nothing.
IN_CACHE, FEW = 1 << 16, 1 << 10
#: How arrays are gone through: places at once, chunks that are asked for ahead.
WAYS = ((1, 0), (1, 1), (1, 2), (4, 0), (4, 1))


class Array(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("nbytes", ctypes.c_int64), ("written", ctypes.c_int32)]


def build(directory: str) -> str:
    """The path of the library that :func:`memory` takes."""
    target = f"{directory}/roof.so"
    source = str(Path(__file__).with_name("roof.cpp"))
    flags = ["-std=c++17", "-O3", "-march=native", "-Wno-psabi", "-shared", "-fPIC", "-pthread"]
    subprocess.run([*compiler(), *flags, source, "-o", target], check=True)
    return target


def passes(rule: str, p: Tensor, state: dict[str, Tensor]) -> list[list[tuple[Tensor, bool]]]:
    """What each pass of a step of the default policy reads, and whether it writes it: the parameter, its gradient, and
    moments of any size."""
    g = p.grad
    assert g is not None
    moments = {key: x for key, x in state.items() if x.nbytes >= p.numel() // 4}
    v = [x for key, x in moments.items() if key.startswith("exp_avg_sq")]
    step = [(p, True), (g, False), *((x, True) for x in moments.values())]
    if rule == "lamb":
        return [[(x, False) for x, _ in step], step]
    if rule == "stableadamw":
        return [[(g, False), *((x, False) for x in v)], step]
    if rule == "adafactor":
        return [[(g, False)], [(g, False), (p, False)], step]
    if rule == "came":
        m = [(x, True) for x in moments.values()]
        return [[(g, False)], [(g, False), *m], [(p, True), *((x, False) for x, _ in m)]]
    return [[(g, False)], step]  # the look; of a factored moment the new means


def memory(
    found: Sequence[Sequence[tuple[Tensor, bool]]],
    numel: int,
    path: str,
    rounds: int = 7,
    before: Callable[[], Any] = lambda: None,
) -> float:
    """Seconds of these passes without arithmetic, by as many threads as torch has: of each pass the median of the
    fastest way through its arrays. ``path`` is :func:`build`'s. ``before()`` comes before each: where it goes
    through other memory, what a pass reads is in the cache as little as it is in a step among others."""
    roof = ctypes.CDLL(path).memopt_roof
    chunks, threads = ctypes.c_int64(numel // CHUNK), torch.get_num_threads()
    total = 0.0
    for one in found:
        arrays = (Array * len(one))(*(Array(x.data_ptr(), x.nbytes, written) for x, written in one))
        times: dict[tuple[int, int], list[float]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for (places, ahead), some in times.items():
                before()
                start = time.perf_counter()
                roof(arrays, len(one), chunks, threads, places, ctypes.c_int64(ahead))
                some.append(time.perf_counter() - start)
        total += min(map(median, times.values()))
    return total


def arithmetic(spec: str, numel: int, rounds: int = 31, **keywords: Any) -> float:
    """Seconds of the arithmetic of a step of ``numel`` elements shared by all threads, found where everything stays in
    the cache of one core: the difference between the fastest step of a small and of a tiny tensor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        small, tiny = (_steps(spec, n, keywords) for n in (IN_CACHE, FEW))
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for found, step in zip(times, (small, tiny), strict=True):
                start = time.perf_counter()
                step()
                found.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    per_element = (min(times[0]) - min(times[1])) / (IN_CACHE - FEW)
    return per_element * numel / threads


def _steps(spec: str, numel: int, keywords: dict[str, Any]) -> Callable[[], Any]:
    p = torch.nn.Parameter(torch.randn(numel // CHUNK, CHUNK))
    p.grad = torch.randn_like(p)
    opt = memopt.create([p], spec, **keywords)
    for _ in range(3):
        opt.step()
    return opt.step
