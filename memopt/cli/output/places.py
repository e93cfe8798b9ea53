"""What ``memopt doctor`` says of the places where state can be: pinned and unified memory, large pages, a disk and its
speed."""

from __future__ import annotations

import os
import tempfile
import time
from importlib import util

#: Bytes that a measurement of the disk writes and reads, and of one request.
PROBE, REQUEST = 64 * 2**20, 8 * 2**20


def pinned_memory() -> tuple[bool, str]:
    """Whether host memory can be pinned as one likes, and what limits it."""
    try:
        import resource
    except ImportError:
        return True, "no limit is known on this system"
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limited = soft != resource.RLIM_INFINITY
    text = f"ulimit -l is {soft / 2**20:.0f} MiB" if limited else "ulimit -l is unlimited"
    if not _cuda():
        return True, f"{text}; without CUDA nothing is pinned"
    import psutil

    free = psutil.virtual_memory().available / 2**30
    return True, f"{text}, which the CUDA driver does not count; {free:.1f} GiB of host memory are free for @host"


def unified_memory() -> tuple[bool, str]:
    """Whether state of ``@paged`` can be in CUDA unified memory."""
    if not _cuda():
        return True, "no CUDA device; @paged is a mapped file here"
    if util.find_spec("bitsandbytes") is None:
        return False, "@paged on CUDA takes its allocator from bitsandbytes: pip install bitsandbytes"
    return True, "CUDA unified memory by bitsandbytes' allocator"


def large_pages() -> tuple[bool, str]:
    """Whether steps on the CPU can have pages of 2 MiB, and how to have them everywhere."""
    if not util.find_spec("torch"):
        return False, "unknown without torch"
    from memopt.kernels import huge_pages

    if huge_pages.off():
        return False, f"steps on the CPU take longer: {huge_pages.off()}"
    if huge_pages.setting() == "always" or os.environ.get("THP_MEM_ALLOC_ENABLE") == "1":
        return True, "2 MiB, for all of torch's large tensors"
    return True, (
        "2 MiB, for what a step on the CPU reads and writes; with THP_MEM_ALLOC_ENABLE=1 in the environment "
        "torch asks for them for all its large tensors"
    )


def disk_speed(directory: str | None = None) -> tuple[bool, str]:
    """Sequential direct writes and reads of 64 MiB, as ``@disk`` makes them: what its steps can hope for."""
    where = directory or tempfile.gettempdir()
    try:
        write, read, direct = throughput(where)
    except (OSError, RuntimeError, ValueError) as error:
        return False, f"{where} was not measured: {error}"
    how = "O_DIRECT" if direct else "through the page cache, as the file system has no O_DIRECT"
    step = 1 / (1 / write + 1 / read)
    return True, (
        f"{where}: writes {write:.2f} GiB/s, reads {read:.2f} GiB/s ({how}); if they take turns, "
        f"{step:.2f} GiB of state a second for @disk"
    )


def throughput(directory: str) -> tuple[float, float, bool]:
    """``(GiB/s written, GiB/s read, whether past the page cache)``"""
    import mmap

    from memopt.placements.arena import Arena

    with tempfile.TemporaryDirectory(prefix="memopt-doctor-", dir=directory) as inside:
        arena = Arena(os.path.join(inside, "probe"), "doctor")
        try:
            begin = arena.allocate(PROBE)
            buffer = memoryview(mmap.mmap(-1, REQUEST))
            buffer[:] = os.urandom(2**16) * (REQUEST // 2**16)
            rates = []
            for move in (arena.write, arena.read):
                start = time.perf_counter()
                for offset in range(begin, begin + PROBE, REQUEST):
                    move(buffer, offset)
                arena.sync()
                rates.append(PROBE / 2**30 / (time.perf_counter() - start))
            return rates[0], rates[1], arena.direct
        finally:
            arena.close()


def _cuda() -> bool:
    if util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()
