"""A child process under a cap on its memory, and the speed of the disk between its steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

GIB = 2**30
REQUEST = 16 * 2**20


def raw_disk(nbytes: int) -> float:
    """Seconds to read ``nbytes`` of one file and write them to another at the same time, past the page cache."""
    import mmap

    from memopt.placements.arena import Arena
    from memopt.placements.stores.disk import WORKERS
    from memopt.placements.transfer.streams import Threads

    arena = Arena(None, "raw")
    source, target = arena.allocate(nbytes), arena.allocate(nbytes)
    buffers = [memoryview(mmap.mmap(-1, REQUEST)) for _ in range(4)]
    free = threading.Semaphore(4)
    for i in range(0, nbytes, REQUEST):  # so that there is something on the disk to read and to write over
        arena.write(buffers[0], source + i)
        arena.write(buffers[0], target + i)
    arena.sync()
    threads = Threads(WORKERS)
    begin = time.perf_counter()
    for i in range(0, nbytes, REQUEST):
        free.acquire()
        buffer = buffers[i // REQUEST % 4]
        read = threads.submit("read", lambda b=buffer, i=i: arena.read(b, source + i), [], REQUEST)
        wrote = threads.submit("write", lambda b=buffer, i=i: arena.write(b, target + i), [read], REQUEST)
        wrote.add_done_callback(lambda _: free.release())
    threads.synchronize()
    arena.sync()
    seconds = time.perf_counter() - begin
    threads.close()
    arena.close()
    return seconds


class Cgroup:
    """A memory cgroup of either version, or nothing where it cannot be made."""

    def __init__(self, cap: int) -> None:
        self.path: Path | None = None
        for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
            path = Path(root) / f"memopt-{os.getpid()}"
            try:
                path.mkdir()
                (path / limit).write_text(str(cap))
                self.path = path
                return
            except OSError:
                if path.is_dir():
                    path.rmdir()

    def add(self, pid: int) -> None:
        if self.path:
            (self.path / "cgroup.procs").write_text(str(pid))

    def peak(self) -> int | None:
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            if self.path and (self.path / name).exists():
                return int((self.path / name).read_text())
        return None

    def remove(self) -> None:
        if self.path:
            self.path.rmdir()


def capped(script: str, arguments: list[str], cap: int) -> dict[str, Any]:
    """Run a script in a child under the cap; its lines, its peak, and how it ended. After each line with a step, while
    the child waits, the disk is measured."""
    import psutil

    group = Cgroup(cap)
    command = [sys.executable, script, *arguments]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    group.add(child.pid)
    process, peak, killed = psutil.Process(child.pid), 0, False

    def watch() -> None:
        nonlocal peak, killed
        while child.poll() is None:
            try:
                peak = max(peak, process.memory_info().rss)
            except psutil.Error:
                return
            if peak > cap:
                killed = True
                child.kill()
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert child.stdout is not None
    assert child.stdin is not None
    lines = []
    for text in child.stdout:
        lines.append(json.loads(text))
        if "step" in lines[-1]:
            lines[-1]["disk_s"] = raw_disk(GIB) * lines[-1]["state_bytes"] / GIB
            child.stdin.write("\n")
            child.stdin.flush()
    code = child.wait()
    watcher.join()
    found = {
        "lines": lines,
        "exit_code": code,
        "killed_by_watcher": killed,
        "peak_resident_bytes": peak,
        "cgroup": str(group.path is not None),
        "cgroup_peak_bytes": group.peak(),
    }
    group.remove()
    return found
