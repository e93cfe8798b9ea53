"""Thousands of random sequences of operations on a memopt optimizer and its twin of torch.optim, on kernels built with
the address and undefined-behaviour sanitizers.

    python benchmarks/twin.py                      writes benchmarks/results/twin.json and .md
    python benchmarks/twin.py --sequences 200 --plain      the same on ordinary kernels, to try it

What a sequence is, and what must be true after each of its operations, is in tests/twin. Sequences run in batches, each
in a process of its own: one that dies is known by the seed that it had begun. With sanitizers the memory of torch's
tensors has guarded zones around it, so a kernel that reads or writes beside its own is stopped there. Failing sequences
are cut down to the operations that it takes; `--replay TEXT` goes through one again.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from provenance import write_result

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "twin.json"
SANITIZED = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
#: Of a process: its memory grows under the address sanitizer, which keeps freed memory to know its uses.
BATCH = 100
#: Seconds in which a sequence has ended.
PATIENCE = 300


def main() -> int:
    parser = ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--sequences", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--without", default="", help="operations to leave out, with commas")
    parser.add_argument("--plain", action="store_true", help="ordinary kernels instead of sanitized ones")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--replay", help="one sequence as text, in this process")
    parser.add_argument("--child", type=int, help="how many sequences this process runs")
    parser.add_argument("--kernels", type=Path, help="the library that it loads")
    arguments = parser.parse_args()
    if arguments.child is not None or arguments.replay:
        sys.path.insert(0, str(ROOT))
        return _replay(arguments.replay) if arguments.replay else _child(arguments)
    return _parent(arguments)


# In a process of its own -----------------------------------------------------------------------------------------


def _child(arguments: Namespace) -> int:
    from tests.twin.cases import draw_case
    from tests.twin.sequences import Failed, draw, replay

    if arguments.kernels:
        from memopt.kernels import loader

        loader._loaded = loader.open_library(arguments.kernels)
    for seed in range(arguments.first, arguments.first + arguments.child):
        text = draw(seed, arguments.without.split(","))
        _say({"begun": seed, "text": text, "spec": draw_case(seed).spec})
        try:
            _say({"applied": replay(text)})
        except Failed as failure:
            _say({"applied": failure.applied, "failed": str(failure), "at": failure.at})
    return 0


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def _replay(text: str) -> int:
    from tests.twin.sequences import Failed, replay

    try:
        print(*replay(text, trace=True))
    except Failed as failure:
        print(failure)
        return 1
    return 0


# Over all --------------------------------------------------------------------------------------------------------


def _parent(arguments: Namespace) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if not arguments.plain:
        arguments.kernels = _sanitized()
        environment |= _sanitizing()
    done: dict[str, Any] = {"sequences": 0, "operations": Counter(), "axes": {}, "failed": [], "died": []}
    start = time.time()
    seed, last = arguments.first, arguments.first + arguments.sequences
    while seed < last:
        for seed, record in _batch(arguments, environment, seed, min(BATCH, last - seed)):  # noqa: B020
            _note(done, seed, record)
        seed += 1
        _write(arguments, done, time.time() - start)
        bad = len(done["failed"]) + len(done["died"])
        print(f"{done['sequences']} sequences, {bad} with a fault, {time.time() - start:.0f} s", flush=True)
    return 1 if done["failed"] or done["died"] else 0


def _sanitized() -> Path:
    """The kernels with sanitizers, built if they are not there."""
    from memopt.kernels import build

    directory = ROOT / "build" / "sanitized" / build.fingerprint()
    if not (directory / build.NAME).exists():
        print("building the kernels with sanitizers, some minutes", flush=True)
        build.build(directory, SANITIZED)
    return directory / build.NAME


def _sanitizing() -> dict[str, str]:
    """The environment in which Python can load them."""
    from memopt.kernels import build

    def library(name: str) -> str:
        found = subprocess.run([*build.compiler(), f"-print-file-name={name}"], capture_output=True, text=True)
        return found.stdout.strip()

    # libstdc++ before Python, or the first exception that torch throws finds no way out of the sanitizer.
    return {
        "LD_PRELOAD": " ".join(library(n) for n in ("libasan.so", "libubsan.so", "libstdc++.so")),
        "ASAN_OPTIONS": "detect_leaks=0:malloc_context_size=4:quarantine_size_mb=64",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


def _batch(
    arguments: Namespace, environment: dict[str, str], first: int, count: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Seeds and what became of them; a process that dies ends the batch with the seed that it had begun."""
    command = [sys.executable, __file__, "--child", str(count), "--first", str(first), "--without", arguments.without]
    command += ["--kernels", str(arguments.kernels)] if arguments.kernels else []
    log = ROOT / "build" / "twin.stderr"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        begun: dict[str, Any] | None = None
        for line in process.stdout:
            record = json.loads(line)
            if "begun" in record:
                begun = record
            else:
                assert begun is not None
                yield begun["begun"], {**begun, **record}
                begun = None
        code = process.wait()
    if code or begun is not None:
        begun = begun or {"begun": first, "text": "", "spec": "before the first sequence"}
        yield begun["begun"], {**begun, "died": code, "stderr": log.read_text()[-4000:]}


def _note(done: dict[str, Any], seed: int, record: dict[str, Any]) -> None:
    done["sequences"] += 1
    done["operations"].update(record.get("applied", []))
    if "died" in record:
        done["died"].append({k: record[k] for k in ("begun", "text", "spec", "died", "stderr")})
        print(f"{seed} DIED: {record['spec']}: {record['text'][:200]}", flush=True)
    elif "failed" in record:
        done["failed"].append({k: record[k] for k in ("text", "failed", "at")})
        print(f"{seed}: {record['failed'][:300]}", flush=True)
    import memopt

    if record["spec"].startswith("before"):
        return
    spec = memopt.parse(record["spec"])
    for axis in ("rule", "format", "master", "placement", "partition"):
        done["axes"].setdefault(axis, Counter())[getattr(spec, axis)] += 1


def _write(arguments: Namespace, done: dict[str, Any], seconds: float) -> None:
    import torch

    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    record = {
        "commit": commit.strip(),
        "command": " ".join(["python", "benchmarks/twin.py", *sys.argv[1:]]),
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernels": "ordinary" if arguments.plain else " ".join(SANITIZED),
        "seconds": round(seconds),
        **done,
    }
    write_result(arguments.out, record)
    arguments.out.with_suffix(".md").write_text(_table(record))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.machine())


def _table(record: dict[str, Any]) -> str:
    lines = [
        "# Sequences of the twin",
        "",
        f"`{record['command']}`, commit {record['commit'][:10]}, {record['processor']}, torch {record['torch']}.",
        "",
        f"Kernels: {record['kernels']}.",
        "",
        f"{record['sequences']:,} sequences, {sum(record['operations'].values()):,} operations that applied; "
        f"{len(record['died'])} processes died or had a report of a sanitizer, {len(record['failed'])} sequences "
        "differed from the twin or ended in an error that is no refusal.",
        "",
        "| operation | times |",
        "|---|---|",
        *(f"| {name} | {count:,} |" for name, count in sorted(record["operations"].items())),
        "",
        "| axis | sequences |",
        "|---|---|",
        *(
            f"| {axis} | {', '.join(f'{name} {count:,}' for name, count in sorted(found.items()))} |"
            for axis, found in record["axes"].items()
        ),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
