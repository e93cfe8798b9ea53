"""Our reader and writer of safetensors files against the library's: why checkpoints have their own.

    python benchmarks/safetensors_compared.py

Three questions. What a checkpoint's file costs that is to be durable and checked: the library writes it, the disk is
told to take it and a second pass reads it for its checksums; ours takes the checksums while it writes. How much memory
a conversion needs whose tensors are made one by one: the library wants all of them. And what becomes of a process
whose file is cut short while it reads. Seconds are of the processor, all threads, in interleaved turns: the disk's own
speed and other load are not in them. Memory is the peak of the resident set over what it was, in a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from provenance import write_result
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from memopt.checkpoint.io.safetensors_write import file_order, write_file
from memopt.checkpoint.tensorfile import FileInfo, TensorFile, checksums, spec_of, verify_file

RESULTS = Path(__file__).parent / "results"
SHAPE = (1024, 2048)


def tensors(count: int) -> dict[str, Tensor]:
    """What a tensor of state is: one byte for each element, every other one with fp32 scales."""
    return {f"p{i}": torch.randint(0, 255, SHAPE, dtype=torch.uint8) for i in range(count)}


def made(count: int) -> Iterator[tuple[str, Tensor]]:
    """The same, each when it is asked for."""
    for i in range(count):
        yield f"p{i}", torch.full(SHAPE, i % 255, dtype=torch.uint8)


def durable(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    os.fsync(handle)
    os.close(handle)


def theirs_write(path: Path, values: dict[str, Tensor]) -> FileInfo:
    save_file(values, path)
    durable(path)
    return FileInfo(path.stat().st_size, list(checksums(path)))


def ours_write(path: Path, values: dict[str, Tensor]) -> FileInfo:
    specs = {name: spec_of(x) for name, x in values.items()}
    return write_file(path, specs, ((name, values[name]) for name in file_order(specs)))


def theirs_read(path: Path, info: FileInfo, into: dict[str, Tensor]) -> None:
    verify_file(path, info)
    with safe_open(path, framework="pt") as file:
        for name, x in into.items():
            x.copy_(file.get_tensor(name))


def ours_read(path: Path, info: FileInfo, into: dict[str, Tensor]) -> None:
    verify_file(path, info)
    file = TensorFile(path)
    for name, x in into.items():
        file.read_into(name, None, x)
    file.close()


def seconds(turns: int, count: int, folder: Path) -> dict[str, Any]:
    """Processor seconds of each, the median, and the median of the ratios within a turn."""
    values, info = tensors(count), FileInfo(0, [])
    target = {name: torch.empty_like(x) for name, x in values.items()}
    works: dict[str, Callable[[], Any]] = {
        "library, write": lambda: theirs_write(folder / "theirs", values),
        "ours, write": lambda: ours_write(folder / "ours", values),
        "library, read": lambda: theirs_read(folder / "ours", info, target),
        "ours, read": lambda: ours_read(folder / "ours", info, target),
    }
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            begin = time.process_time()
            found = work()
            taken[name].append(time.process_time() - begin)
            if name == "ours, write":
                info = found
        assert all(torch.equal(target[name], x) for name, x in values.items())
    ratios = {
        what: median(a / b for a, b in zip(taken[f"ours, {what}"], taken[f"library, {what}"], strict=True))
        for what in ("write", "read")
    }
    return {"processor_seconds": {name: median(times) for name, times in taken.items()}, "ours_to_library": ratios}


def memory(who: str, count: int, path: Path) -> int:
    """Bytes by which the resident set rises while tensors that are made one by one are written, or read."""
    what, _, by = who.partition(" ")
    target = torch.empty(SHAPE, dtype=torch.uint8).fill_(1)
    ours_write(path.with_name("warm"), {"p0": target})
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    before = psutil.Process().memory_info().rss
    if what == "write" and by == "ours":
        write_file(path, {name: spec_of(target) for name, _ in made(count)}, made(count))
    elif what == "write":
        save_file(dict(made(count)), path)
    elif by == "ours":
        file = TensorFile(path)
        for name in file.specs:
            file.read_into(name, None, target)
    else:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                target.copy_(opened.get_tensor(name))
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 - before


def cut_short(by: str, path: Path) -> None:
    """Open the file, let it lose its last half, and read its last tensor."""
    nbytes = path.stat().st_size
    opened = TensorFile(path) if by == "ours" else safe_open(path, framework="pt")
    os.truncate(path, nbytes // 2)
    name = max(f"p{i}" for i in range(8))
    out = torch.empty(SHAPE, dtype=torch.uint8)
    opened.read_into(name, None, out) if by == "ours" else out.copy_(opened.get_tensor(name))


def child(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, __file__, "--child", *arguments], capture_output=True, text=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=128, help="of 2 MiB each")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        what, count, path = args.child
        if what.startswith("cut"):
            cut_short(what.split()[1], Path(path))
        else:
            print(memory(what, int(count), Path(path)))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "x.safetensors")
        record: dict[str, Any] = {
            "nbytes": args.tensors * SHAPE[0] * SHAPE[1],
            **seconds(args.turns, args.tensors, Path(directory)),
            "peak_nbytes": {
                who: int(child(who, str(args.tensors), str(path)).stdout)
                for who in ("write library", "read library", "write ours", "read ours")
            },
            "cut_short": {},
        }
        for by in ("library", "ours"):
            ours_write(path, tensors(8))
            done = child(f"cut {by}", "8", str(path))
            died = signal.Signals(-done.returncode).name if done.returncode < 0 else ""
            record["cut_short"][by] = (
                f"killed by {died}" if died else done.stderr.strip().splitlines()[-1].split("/")[-1]
            )
    write_result(args.out / "safetensors_compared.json", record)
    (args.out / "safetensors_compared.md").write_text(page(record))
    print(page(record))
    return 0


def page(record: dict[str, Any]) -> str:
    time_, peak, cut = record["processor_seconds"], record["peak_nbytes"], record["cut_short"]
    rows = [
        f"| {who} | {time_[f'{who}, write']:.3f} s | {time_[f'{who}, read']:.3f} s | "
        f"{peak[f'write {who}'] / 2**20:.0f} MiB | {peak[f'read {who}'] / 2**20:.0f} MiB | {cut[who]} |"
        for who in ("library", "ours")
    ]
    ratio = record["ours_to_library"]
    return "\n".join(
        [
            "# safetensors files: the library and ours",
            "",
            f"A file of {record['nbytes'] / 2**20:.0f} MiB. Processor time of a durable write with checksums and of a "
            "checked read into tensors that are there; memory that writing tensors made one by one, and reading them "
            "one by one, takes besides (the library reads mapped pages, which the system can take back); a file that "
            "is cut short while it is open. `python benchmarks/safetensors_compared.py`.",
            "",
            "| | write | read | memory to write | memory to read | cut short |",
            "|---|---:|---:|---:|---:|---|",
            *rows,
            "",
            f"Ours to the library's, the median within turns: write {ratio['write']:.2f}, read {ratio['read']:.2f}.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
