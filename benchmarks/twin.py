"""Thousands of random sequences of operations on a memopt optimizer and its twin of torch.optim, on kernels built with
the address and undefined-behaviour sanitizers.

    python benchmarks/twin.py                          goes on from benchmarks/results/twin.json, to 20,000 sequences
    python benchmarks/twin.py --minutes 10             as many of them as fit
    python benchmarks/twin.py --again                  those that went wrong, with the code of now
    python benchmarks/twin.py --plain --sequences 200 --out /tmp/twin.json      ordinary kernels, to try it
    python benchmarks/twin.py --replay TEXT            one sequence, in this process

What a sequence is, and what must be true after each of its operations, is in tests/twin. Sequences run in batches, each
in a forked process of its own: one that dies, or does not come back, is known by the seed that it had begun. With
sanitizers the memory of torch's tensors has guarded zones around it, so a kernel that reads or writes beside its own is
stopped there. The result says of every part which commit it ran.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from provenance import commit, write_result

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "twin.json"
SANITIZED = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
#: Of a process: its memory grows under the address sanitizer, which keeps freed memory to know its uses.
BATCH = 100
#: Seconds in which a sequence has ended, on a busy machine.
PATIENCE = 300
AXES = ("rule", "format", "master", "placement", "partition")


def main() -> int:
    parser = ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--sequences", type=int, default=20_000, help="in all, those of earlier parts counted in")
    parser.add_argument("--minutes", type=float, default=0.0, help="after which no batch is begun; 0 for no limit")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--again", action="store_true", help="only those that went wrong")
    parser.add_argument("--plain", action="store_true", help="ordinary kernels instead of sanitized ones")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--replay", help="one sequence as text, in this process")
    arguments = parser.parse_args()
    library = None if arguments.plain else _sanitized()
    if library is not None and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_sanitizing()})
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    _use(library)
    return _replay(arguments.replay) if arguments.replay else _run(arguments)


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
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def _use(library: Path | None) -> None:
    from memopt.kernels import loader

    if library is not None:
        loader._loaded = loader.open_library(library)


def _replay(text: str) -> int:
    from tests.twin.sequences import Failed, replay

    try:
        print(*replay(text, trace=True))
    except Failed as failure:
        print(failure)
        return 1
    return 0


# Batches, each in a process of its own ----------------------------------------------------------------------------


class Batch:
    """A forked process that runs sequences ``(seed, text)``, begun at once."""

    def __init__(self, sequences: Sequence[tuple[int, str]]) -> None:
        self.sequences = sequences
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the records have been read
        self.reading, writing = os.pipe()
        self.child = os.fork()
        if not self.child:
            code = 1
            try:
                os.close(self.reading)
                os.dup2(self.log.fileno(), 2)
                _child(sequences, writing)
                code = 0
            finally:
                os._exit(code)
        os.close(writing)

    def records(self, patience: float = PATIENCE) -> Iterator[dict[str, Any]]:
        """What became of them, in their order; after one whose process died, the rest is missing."""
        begun, late, rest = 0, False, b""
        with os.fdopen(self.reading, "rb", buffering=0) as lines:
            while True:
                if not select.select([lines], [], [], patience)[0]:
                    late = True
                    os.kill(self.child, signal.SIGKILL)
                more = lines.read(65536)
                if not more:
                    break
                *whole, rest = (rest + more).split(b"\n")
                for line in whole:
                    seed, text = self.sequences[begun]
                    begun += 1
                    yield {"seed": seed, "text": text, **json.loads(line)}
        code = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        if begun < len(self.sequences):
            seed, text = self.sequences[begun]
            self.log.seek(0)
            said = f"it did not come back within {patience:.0f} s\n" * late
            said += self.log.read().decode(errors="replace")[-4000:]
            yield {"seed": seed, "text": text, "died": code, "stderr": said}
        self.log.close()


def _child(sequences: Sequence[tuple[int, str]], out: int) -> None:
    from tests.twin.sequences import Failed, replay

    os.fsync = os.fdatasync = lambda handle: None  # nobody cuts the power: waiting for the platters would show nothing
    for _, text in sequences:
        try:
            line: dict[str, Any] = {"applied": replay(text)}
        except Failed as failure:
            line = {"applied": failure.applied, "failed": str(failure), "at": failure.at}
        os.write(out, json.dumps(line).encode() + b"\n")


# Over all --------------------------------------------------------------------------------------------------------


def _run(arguments: Namespace) -> int:
    done: dict[str, Any] = {"sequences": 0, "operations": {}, "axes": {}, "wrong": [], "repaired": [], "parts": []}
    if arguments.out.exists():
        done |= json.loads(arguments.out.read_text())
    done["kernels"] = "ordinary" if arguments.plain else " ".join(SANITIZED)
    part = {"commit": commit(), "first": done["sequences"], "sequences": 0, "seconds": 0}
    done["parts"].append(part)
    start = time.monotonic()
    waiting = _again(done) if arguments.again else _batches(done["sequences"], arguments.sequences)
    running: list[Batch] = []
    while True:
        late = arguments.minutes and part["seconds"] > 60 * arguments.minutes
        while not late and len(running) < arguments.processes and (sequences := next(waiting, None)):
            running.append(Batch(sequences))
        if not running:
            break
        batch = running.pop(0)
        found = [_note(done, record, part, arguments.again) for record in batch.records()]
        if rest := batch.sequences[len(found) :]:  # the process died in one of them
            running.insert(0, Batch(rest))
        part["seconds"] = round(time.monotonic() - start)
        _write(arguments.out, done)
        print(f"{done['sequences']:,} sequences, {len(done['wrong'])} went wrong, {part['seconds']} s", flush=True)
    return 1 if done["wrong"] else 0


def _batches(first: int, goal: int) -> Iterator[list[tuple[int, str]]]:
    from tests.twin.sequences import draw

    for begin in range(first, goal, BATCH):
        yield [(seed, draw(seed)) for seed in range(begin, min(begin + BATCH, goal))]


def _again(done: dict[str, Any]) -> Iterator[list[tuple[int, str]]]:
    for one in list(done["wrong"]):
        yield [(one["seed"], one["text"])]


def _note(done: dict[str, Any], record: dict[str, Any], part: dict[str, Any], again: bool) -> None:
    import memopt
    from tests.twin.sequences import case_of

    wrong = "died" in record or "failed" in record
    if again:
        (before,) = [one for one in done["wrong"] if one["text"] == record["text"]]
        if not wrong:
            done["wrong"].remove(before)
            done["repaired"].append({**before, "right_at": part["commit"]})
        return
    done["sequences"] += 1
    part["sequences"] += 1
    done["operations"] = dict(sorted((Counter(done["operations"]) + Counter(record.get("applied", []))).items()))
    spec = memopt.parse(case_of(record["text"])[0].spec)
    for axis in AXES:
        found = Counter(done["axes"].get(axis, {}))
        found[getattr(spec, axis)] += 1
        done["axes"][axis] = dict(sorted(found.items()))
    if wrong:
        kept = {k: record[k] for k in ("seed", "text", "failed", "at", "died", "stderr") if k in record}
        done["wrong"].append({**kept, "commit": part["commit"]})
        print(f"{record['seed']}: {record.get('failed', record.get('stderr', ''))[:400]}", flush=True)


def _write(out: Path, done: dict[str, Any]) -> None:
    write_result(out, done)
    written = json.loads(out.read_text())
    out.with_suffix(".md").write_text(_table(written))


def _table(record: dict[str, Any]) -> str:
    facts, died = record["provenance"], [one for one in record["wrong"] if "died" in one]
    seconds = sum(part["seconds"] for part in record["parts"])
    parts = [
        f"| {part['commit'][:10]}{' (with changes)' * part['commit'].endswith('+changes')} | {part['first']:,} to "
        f"{part['first'] + part['sequences'] - 1:,} | {part['seconds']:,} |"
        for part in record["parts"]
        if part["sequences"]
    ]
    repaired = [f"| {one['seed']} | {_said(one)} | {one['right_at'][:10]} |" for one in record["repaired"]]
    lines = [
        "# Sequences of the twin",
        "",
        f"`benchmarks/twin.py`, {facts['processor']}, torch {facts['versions']['torch']}; kernels: "
        f"{record['kernels']}.",
        "",
        f"{record['sequences']:,} sequences, {sum(record['operations'].values()):,} operations that applied, "
        f"{seconds:,} s under load. Now {len(died)} processes die or have a report of a sanitizer, and "
        f"{len(record['wrong']) - len(died)} sequences differ from the twin or end in an error that is no refusal; "
        f"{len(record['repaired'])} did and do no longer.",
        "",
        "| commit | sequences | seconds |",
        "|---|---|---|",
        *parts,
        "",
        *(["| went wrong once | how | right at |", "|---|---|---|", *repaired, ""] if repaired else []),
        "| axis | sequences |",
        "|---|---|",
        *(
            f"| {axis} | {', '.join(f'{name} {count:,}' for name, count in found.items())} |"
            for axis, found in record["axes"].items()
        ),
        "",
        "| operation | times |",
        "|---|---|",
        *(f"| {name} | {count:,} |" for name, count in record["operations"].items()),
        "",
    ]
    return "\n".join(lines)


def _said(one: dict[str, Any]) -> str:
    return (one.get("failed") or f"died: {one['stderr']}").splitlines()[0].replace("|", "/")[:200]


if __name__ == "__main__":
    sys.exit(main())
