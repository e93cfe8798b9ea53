"""What this machine offers, and what is missing.

One line per finding: ok, note (works, but know this) or missing. The exit code is 1 if something required is missing.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from importlib import metadata, util
from typing import NamedTuple

from memopt.cli.output import places, progress, terminal

SUMMARY = "what this machine offers, and what is missing"

MIN_PYTHON = (3, 10)
OK, NOTE, MISSING = "ok", "note", "missing"

#: package -> (whether memopt needs it, what it is for)
PACKAGES = {
    "torch": (True, "training; estimates work without it"),
    "psutil": (True, "memory figures"),
    "rich": (True, "progress bars"),
    "bitsandbytes": (False, "engine='bitsandbytes', and @paged on CUDA"),
    "transformers": (False, "its Trainer and its models"),
    "accelerate": (False, "its loops, and configurations for them"),
    "deepspeed": (False, "memopt.deepspeed_config: ZeRO under its engine"),
    "torchao": (False, "state from and for its optimizers"),
    "matplotlib": (False, "plots"),
}
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")
#: Where a container's limit of memory stands, in cgroups of version 2 and 1.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_COMPILERS = ("c++", "g++", "clang++")


class CheckResult(NamedTuple):
    """``status`` is ``ok``, ``note`` or ``missing``; ``required`` says whether memopt cannot train without it."""

    what: str
    status: str
    text: str
    required: bool = False


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--deepspeed",
        metavar="FILE",
        help="a ds_config.json, or accelerate's YAML with one: whether an optimizer of memopt's steps by it",
    )


def run(args: Namespace) -> int:
    with progress.working("looking"):
        found = list(findings())
        found += deepspeed(args.deepspeed)
    if args.json:
        import json

        print(json.dumps({"schema": "memopt.doctor/1", "findings": [f._asdict() for f in found]}, indent=2))
    else:
        width = max(len(f.what) for f in found)
        lines = (f"{f.status:<7}  {f.what:<{width}}  {f.text}" for f in found)
        print(terminal.folded(lines, hanging=width + 11))
    return 1 if any(f.required and f.status == MISSING for f in found) else 0


def findings() -> Iterator[CheckResult]:
    yield python()
    for name in PACKAGES:
        yield package(name)
    yield cuda()
    yield from context()
    yield memory()
    yield host_cores()
    yield place("pinned memory", places.pinned_memory())
    yield place("unified memory", places.unified_memory())
    yield temporary_files()
    yield place("large pages", places.large_pages())
    yield place("disk speed", places.disk_speed())
    yield compiler()
    yield kernels()
    yield gpu_kernels()


def place(what: str, found: tuple[bool, str]) -> CheckResult:
    return CheckResult(what, OK if found[0] else NOTE, found[1])


def python() -> CheckResult:
    wanted = ".".join(map(str, MIN_PYTHON))
    version = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < MIN_PYTHON:
        return CheckResult("Python", MISSING, f"{version}; memopt needs {wanted} or later", required=True)
    return CheckResult("Python", OK, version)


def package(name: str) -> CheckResult:
    """Found by its metadata, without importing it."""
    required, purpose = PACKAGES[name]
    try:
        return CheckResult(name, OK, f"{metadata.version(name)}: {purpose}", required)
    except metadata.PackageNotFoundError:
        return CheckResult(name, MISSING, f"{purpose}: pip install {name}", required)


def cuda() -> CheckResult:
    if util.find_spec("torch") is None:
        return CheckResult("CUDA", NOTE, "unknown without torch")
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch is built for CUDA {built} but sees no device" if built else "torch is built without CUDA"
        return CheckResult("CUDA", NOTE, f"{why}; training runs on the CPU")
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return CheckResult("CUDA", OK, ", ".join(f"{c.name} {c.total_memory / 2**30:.1f} GiB" for c in cards))


def context() -> Iterator[CheckResult]:
    """What the driver takes of the card that is there, beside what is assumed for its generation."""
    if util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        return
    from estimators.allocator.contexts import context as assumed_context
    from memopt.diagnosis.measured import context_nbytes

    here, assumed = (context_nbytes() or 0) / 2**20, assumed_context(torch.cuda.get_device_properties(0).name)
    text = f"{here:.0f} MiB here; estimates take {assumed.expected / 2**20:.0f} ({assumed.source})"
    yield CheckResult("CUDA context", OK, text)


def memory() -> CheckResult:
    try:
        import psutil
    except ImportError:
        return CheckResult("host memory", NOTE, "unknown without psutil")
    m = psutil.virtual_memory()
    text = f"{m.available / 2**30:.1f} GiB free of {m.total / 2**30:.1f} GiB"
    limit = min((n for n in map(container_limit, _LIMITS) if n is not None), default=m.total)
    if limit < m.total:
        return CheckResult("host memory", NOTE, f"{text}, but this process is limited to {limit / 2**30:.1f} GiB")
    return CheckResult("host memory", OK, text)


def container_limit(path: str) -> int | None:
    """Bytes that a container allows, or None where nothing limits them."""
    try:
        with open(path) as file:
            text = file.read().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def deepspeed(path: str | None) -> Iterator[CheckResult]:
    """Who steps by this file, or by the one that ``accelerate launch`` gave this process."""
    from memopt.cli.flags.launched import deepspeed_configuration
    from memopt.optim.frameworks import launched_file, replacement

    path = path or launched_file()
    if path:
        reason = replacement(deepspeed_configuration(path))
        yield CheckResult("who steps", NOTE if reason else OK, reason or f"the optimizer that {path} is used with")


def host_cores() -> CheckResult:
    """What steps on the host take of the processor: under a launcher the share of this rank."""
    from memopt.placements.host_cores import HostTopology, of_this_rank

    cores = of_this_rank()
    if cores is None or util.find_spec("torch") is None:
        return CheckResult("host cores", NOTE, "unknown without affinity masks and torch; torch's threads step")
    import torch

    nodes, threads = len(HostTopology().nodes), torch.get_num_threads()
    on = f"; {nodes} NUMA nodes" if nodes > 1 else ""
    return CheckResult("host cores", NOTE if cores.starved(threads) else OK, cores.explain(threads) + on)


def temporary_files() -> CheckResult:
    """@paged on a CPU keeps its state in the directory for temporary files, which must be on a disk."""
    directory = tempfile.gettempdir()
    kind = file_system(directory)
    free = shutil.disk_usage(directory).free / 2**30
    if kind in _MEMORY_FILE_SYSTEMS:
        return CheckResult("TMPDIR", NOTE, f"{directory} is {kind}, which is memory; @paged on a CPU needs a disk")
    return CheckResult("TMPDIR", OK, f"{directory} ({kind or 'unknown file system'}), {free:.1f} GiB free for @paged")


def file_system(directory: str) -> str:
    """The type of the file system that holds a directory, empty where it cannot be told."""
    try:
        import psutil
    except ImportError:
        return ""
    path = os.path.join(os.path.realpath(directory), "")
    mounts = [m for m in psutil.disk_partitions(all=True) if path.startswith(os.path.join(m.mountpoint, ""))]
    return max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else ""


def compiler() -> CheckResult:
    """What would compile the CPU kernels; a wheel that holds them needs nothing."""
    asked = os.environ.get("CXX")
    for name in [asked] if asked else _COMPILERS:
        path = shutil.which(name)
        if path:
            return CheckResult("C++ compiler", OK, path)
    named = f"CXX={asked} is not a program" if asked else f"none of {', '.join(_COMPILERS)} found"
    from memopt.kernels.loader import INSTALLED

    if INSTALLED.exists():
        return CheckResult("C++ compiler", OK, f"{named}, and none is needed: the package came with its kernels")
    return CheckResult("C++ compiler", NOTE, f"{named}; steps on the CPU use plain torch")


def kernels() -> CheckResult:
    """Whether a step on this CPU runs in C++; looking may compile them, as the first step would."""
    if util.find_spec("torch") is None:
        return CheckResult("CPU kernels", NOTE, "unknown without torch")
    from memopt import kernels as cpu

    return CheckResult("CPU kernels", OK if cpu.library() else NOTE, cpu.on_cpu())


def gpu_kernels() -> CheckResult:
    """Whether a step on CUDA would run in Triton kernels; they are compiled at the first step."""
    from memopt.kernels import triton

    reason = triton.missing("cuda")
    return CheckResult("GPU kernels", NOTE if reason else OK, triton.status("cuda"))
