"""Random command lines: none may end in a traceback or run on, whatever the terminal's encoding.

    python benchmarks/cli_fuzz.py                # the rest of 10,000 lines; --anew from the first
    python benchmarks/cli_fuzz.py --minutes 5    # a part: the next run goes on where this one stopped
    python benchmarks/cli_fuzz.py --only 2137    # one line, and what it printed; nothing is written

Lines are drawn by their number (:mod:`cli_lines`). They run in a forked process that has everything imported, with
standard output and error of an encoding that refuses what it does not have; it runs one line after the other, and the
process that started it waits for each. Every ``FRESH``-th line runs once more as ``python -m memopt``, by turns into a
pipe and on a terminal, and has to end with the same code.

A line hangs that takes ``LIMIT`` seconds of processor time, or ten times as long on the clock. It fails, too, with a
traceback on either stream (of a process that it starts as well), with a code other than 0, 1 and 2, with 2 and no
sentence, and where it ends the process.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Iterator
from io import FileIO, TextIOWrapper
from pathlib import Path
from select import select
from typing import Any

from cli_lines import ENCODINGS, Fixtures, Line, drawn

ROOT = Path(__file__).resolve().parent.parent
#: Seconds of processor time for one line; lines between two writes of the results; between two in fresh processes.
LIMIT, PIECE, FRESH = 20.0, 500, 50
GOOD = ("exit code 0", "exit code 1", "exit code 2")
#: Outcome, what was said of it, seconds of processor time.
Outcome = tuple[str, str, float]


class Hung(BaseException):
    """Past every ``except Exception`` of the code that is tried."""


def attempt(line: Line, out: FileIO, err: FileIO) -> tuple[str, str]:
    """``(outcome, what is wrong)`` of a line in this process, whose descriptors 1 and 2 are ``out`` and ``err``."""
    from memopt.cli import main

    def stop(number: int, frame: object) -> None:
        raise Hung

    for stream in (out, err):
        stream.seek(0)
        stream.truncate()
    os.environ["COLUMNS"] = line.columns
    clocks = {signal.SIGVTALRM: signal.ITIMER_VIRTUAL, signal.SIGALRM: signal.ITIMER_REAL}
    for number, clock in clocks.items():
        signal.signal(number, stop)
        signal.setitimer(clock, LIMIT if clock == signal.ITIMER_VIRTUAL else 10 * LIMIT)
    terminal = [TextIOWrapper(stream, encoding=line.encoding, write_through=True) for stream in (out, err)]
    sys.stdout, sys.stderr = terminal
    try:
        code: Any = main(line.words)
        sys.stdout.flush()
    except SystemExit as exit_:
        code = exit_.code
    except Hung:
        return "hung", traceback.format_exc()
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        for clock in clocks.values():
            signal.setitimer(clock, 0)
        for wrapper in terminal:
            wrapper.detach()  # the descriptors stay open for the next line
    return judged(code, *(_read(stream).decode(line.encoding, "replace") for stream in (out, err)))


def judged(code: object, out: str, err: str) -> tuple[str, str]:
    """The outcome of a line that ended."""
    if "Traceback (most recent call last)" in out + err:
        return "traceback", out + err
    if code == 2 and not err.strip():
        return "exit code 2 without a sentence", out
    return f"exit code {code}", ""


def _read(stream: FileIO) -> bytes:
    stream.seek(0)
    return stream.read()


def worker(first: int, last: int, seed: int, fixtures: Fixtures, pipe: int) -> None:
    """Runs lines of a seed, and writes each outcome to the pipe."""
    import torch

    torch.set_num_threads(1)  # OpenMP's threads are not in a forked process
    streams = []
    for number in (1, 2):
        with tempfile.TemporaryFile(dir=fixtures.folder.parent) as file:
            os.dup2(file.fileno(), number)
        streams.append(FileIO(number, "r+", closefd=False))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.chdir(fixtures.folder)
    for number in range(first, last):
        fixtures.restore()
        start = time.process_time()
        outcome, said = attempt(drawn(seed, number, fixtures.names), *streams)
        found = outcome, said[-3000:], time.process_time() - start
        os.write(pipe, json.dumps(found).encode() + b"\n")


def outcomes(first: int, last: int, seed: int, fixtures: Fixtures) -> Iterator[Outcome]:
    """Of each line in turn, by a worker; where a line ends it, or holds it past every signal, the next has another."""
    while first < last:
        ours, theirs = os.pipe()
        process = os.fork()
        if process == 0:
            code = 1
            try:
                os.close(ours)
                worker(first, last, seed, fixtures, theirs)
                code = 0
            finally:
                os._exit(code)
        os.close(theirs)
        for answer in _answers(ours):
            first += 1
            yield answer
        if first < last:
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if first < last:
            first += 1
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            yield ("hung" if killed else "ended the process"), f"wait status {status}", 0.0


def _answers(pipe: int) -> Iterator[Outcome]:
    """What a worker writes, until it is gone or holds on to a line."""
    text = b""
    while select([pipe], [], [], 12 * LIMIT)[0] and (more := os.read(pipe, 65536)):
        *lines, text = (text + more).split(b"\n")
        for line in lines:
            outcome, said, seconds = json.loads(line)
            yield outcome, said, seconds
    os.close(pipe)


def fresh(line: Line, folder: Path, terminal: bool) -> tuple[str, str]:
    """The outcome of a line as a process of its own, into a pipe or on a terminal."""
    env = {**os.environ, "PYTHONIOENCODING": f"{line.encoding}:strict", "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    env |= {"COLUMNS": line.columns} if line.columns else {}
    ours, theirs = os.openpty() if terminal else os.pipe()
    argv = [sys.executable, "-m", "memopt", *line.words]
    process = subprocess.Popen(argv, env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said, end = b"", time.monotonic() + 10 * LIMIT
    while select([ours], [], [], max(end - time.monotonic(), 0))[0]:
        try:
            more = os.read(ours, 65536)
        except OSError:  # a terminal's other end has gone
            break
        if not more:
            break
        said += more
    else:
        process.kill()
    os.close(ours)
    code = process.wait()
    return judged(code, "", said.decode(line.encoding, "replace"))


def run(first: int, last: int, seed: int, every: int = FRESH) -> dict[str, Any]:
    """Lines ``first`` to ``last`` (not that one) of a seed."""
    import memopt.checkpoint
    import memopt.train.model  # noqa: F401  what a worker is not to import again

    ends: Counter[str] = Counter()
    verbs: Counter[str] = Counter()
    failures: list[dict[str, object]] = []
    longest, alone = 0.0, 0
    with tempfile.TemporaryDirectory() as scratch:
        fixtures, others = Fixtures(Path(scratch, "worker")), Fixtures(Path(scratch, "alone"))
        for number, (outcome, said, seconds) in enumerate(outcomes(first, last, seed, fixtures), first):
            line = drawn(seed, number, fixtures.names)
            ends[outcome] += 1
            verbs[line.words[0]] += 1
            longest = max(longest, seconds)
            if outcome in GOOD and every and number % every == 0:
                alone += 1
                others.restore()  # the worker has gone on to the next lines, in its own
                same = drawn(seed, number, others.names)
                again, trace = fresh(same, others.folder, terminal=number % (2 * every) == 0)
                if again != outcome:
                    outcome, said = f"{outcome}, in a fresh process {again}", trace
            if said or outcome not in GOOD:
                shown = ascii(shlex.join(line.words).replace(scratch, "DIR"))
                found = {"line": shown, "encoding": line.encoding, "columns": line.columns}
                failures.append({"number": number, **found, "outcome": outcome, "said": said[-1500:]})
    return {
        "lines": last,
        "seed": seed,
        "encodings": list(ENCODINGS),
        "outcomes": dict(sorted(ends.items())),
        "verbs": dict(sorted(verbs.items())),
        "in_fresh_processes": alone,
        "longest_cpu_seconds": round(longest, 2),
        "failures": failures,
    }


def together(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What was found up to now, and what now."""
    for name in ("outcomes", "verbs"):
        found[name] = dict(sorted((Counter(before[name]) + Counter(found[name])).items()))
    found["in_fresh_processes"] += before["in_fresh_processes"]
    longest = max(before["longest_cpu_seconds"], found["longest_cpu_seconds"])
    return {**found, "longest_cpu_seconds": longest, "failures": before["failures"] + found["failures"]}


def shown(number: int, seed: int) -> int:
    """One line: its words, and what it printed as a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        fixtures = Fixtures(Path(scratch))
        line = drawn(seed, number, fixtures.names)
        env = {**os.environ, "PYTHONIOENCODING": f"{line.encoding}:strict", "PYTHONPATH": str(ROOT)}
        print(ascii(line), flush=True)
        argv = [sys.executable, "-m", "memopt", *line.words]
        return subprocess.run(argv, env=env | {"COLUMNS": line.columns}, cwd=fixtures.folder).returncode


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after them, and go on another time")
    parser.add_argument("--only", type=int, metavar="N", help="show line N, try it, and write nothing")
    parser.add_argument("--anew", action="store_true", help="from line 0, whatever was tried before")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cli_fuzz.json")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from provenance import commit, write_result

    if args.only is not None:
        return shown(args.only, args.seed)
    found: dict[str, Any] = {}
    if args.out.exists() and not args.anew:
        before = json.loads(args.out.read_text())
        found = before if before.get("seed") == args.seed and "in_fresh_processes" in before else {}
    end = time.monotonic() + 60 * args.minutes
    while (first := found.get("lines", 0)) < args.lines and time.monotonic() < end:
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        more = run(first, min(first + PIECE, args.lines), args.seed)
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = spent.ru_utime + spent.ru_stime - start.ru_utime - start.ru_stime
        piece = {"first": first, "last": more["lines"], "commit": commit(), "cpu_seconds": round(cpu, 1)}
        pieces = [*found.get("pieces", []), piece]
        found = {**(together(found, more) if found else more), "pieces": pieces}
        write_result(args.out, found)  # a run that is stopped goes on from here
        print(f"{found['lines']} lines, {len(found['failures'])} failures", flush=True)
    for failure in found["failures"][:20]:
        print("", *failure.values(), sep="\n")
    print({name: found[name] for name in ("lines", "outcomes", "verbs", "longest_cpu_seconds")})
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
