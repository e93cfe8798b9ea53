"""One hostile input at every reader that takes its kind, watched: what is opened, run, said, and what it takes."""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import memopt
from memopt.cli import main
from tests.helpers import fuzzing
from tests.helpers.fuzzing_corpus import Folder, corpus

#: Seconds of this process' own time for one reader and one input, and bytes of memory beyond what the input has.
SECONDS, NBYTES = 1.0, 64 * 2**20
#: Seconds by the clock, for a reader that waits.
HANGING = 60
#: Address space beyond what the process has: what is reserved and never used shows, too.
RESERVED = 4 * 2**30
#: What is no trace: errors of these kinds are one sentence for the caller of a function.
SENTENCES = (ValueError, OSError, ImportError)

_RUNS = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "pty.spawn",
    "ctypes.dlopen",
    "code.__new__",
)
_REACHES = ("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request")
_UNPICKLES = ("pickle.find_class", "marshal.loads")
_CHANGES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
)
_TARGETS = ("adamw-8bit", "lion", "torch", "dcp", "deepspeed", "flashoptim", "bitsandbytes-32bit", "torchao-4bit")


class Watch:
    """What a reader does, by the interpreter's own audit events, while ``folder`` is set."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.found: list[str] = []
        self.named: set[str] = set()  # what the command itself names may be a link
        paths = sysconfig.get_paths()
        roots = [
            paths["stdlib"],
            paths["platstdlib"],
            paths["purelib"],
            sys.base_prefix,
            os.path.dirname(memopt.__path__[0]),
        ]
        self.readable = (
            *{os.path.realpath(root) + os.sep for root in roots},
            "/proc/",
            "/sys/",
            "/usr/",
            "/lib",
            "/dev/null",
        )
        sys.addaudithook(self._event)

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, (str, bytes, os.PathLike)):
                return
            where = os.path.realpath(os.fspath(path) if not isinstance(path, bytes) else path.decode())
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if isinstance(flags, int) else False
            inside = where == self.folder or where.startswith(self.folder + os.sep) or where in self.named
            if not inside and (writes or not where.startswith(self.readable)):
                self.found.append(f"{'writes' if writes else 'reads'} outside: {where}")
        elif event in _RUNS or event in _UNPICKLES:
            if event == "marshal.loads" and _importing():
                return
            self.found.append(f"executes: {event} {arguments!r:.80}")
        elif event in _REACHES:
            self.found.append(f"reaches out: {event}")
        elif event in _CHANGES:
            if event == "os.remove" and _importing():
                return
            beside = arguments[-1]  # the descriptor of the folder that a relative path is in
            base = (
                f"/proc/self/fd/{beside}"
                if type(beside) is int and beside >= 0 and event != "os.chmod"
                else os.getcwd()
            )
            for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                if isinstance(path, (str, os.PathLike)):
                    where = os.path.realpath(os.path.dirname(os.path.join(base, os.fspath(path))))
                    if where != self.folder and not where.startswith(self.folder + os.sep):
                        self.found.append(f"changes outside: {event} {path}")


def _importing() -> bool:
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


class Fuzzer:
    """``run(n)`` inputs from ``seed`` in ``directory``; ``counts`` and ``failures`` say how they went."""

    def __init__(self, seed: int, directory: Path, watch: Watch) -> None:
        self.seed, self.directory, self.watch = seed, directory, watch
        self.corpus = corpus()
        self.counts: Counter[str] = Counter()
        self.failures: list[dict[str, Any]] = []
        self.slowest = self.largest = 0.0
        (directory / "secret").write_text("secret " * 100)
        net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
        self._model, self._opt = net, memopt.create(net, "adamw")
        os.environ["MEMOPT_CACHE"] = str(directory / "case" / "cache")  # of configurations that transformers built

    def run(self, first: int, count: int) -> None:
        for kind, folder in self.corpus:  # everything is imported before it is watched
            self._one(-1, kind, folder)
        self.counts.clear()
        self.failures.clear()
        self.slowest = self.largest = 0.0
        for number in range(first, first + count):
            rng = random.Random(f"{self.seed}:{number}")
            kind, folder = rng.choice(self.corpus)
            self._one(number, kind, fuzzing.change(rng, folder))
            self.counts["inputs"] += 1

    def _one(self, number: int, kind: str, folder: Folder) -> None:
        root = self.directory / "case"
        shutil.rmtree(root, ignore_errors=True)
        nbytes = _write(root / "in", folder)
        readers = list(self._readers(kind, folder, root, number))
        direct = ("torch", "launch", "safetensors", "config")  # a file that the command names may be a link
        self.watch.named = {os.path.realpath(root / "in" / n) for n in folder if kind in direct and n != "ds.json"}
        for name, call in readers if number < 0 else [readers[number % len(readers)]]:
            self._watched(number, kind, name, call, root, nbytes)

    def _readers(self, kind: str, folder: Folder, root: Path, number: int) -> Iterator[tuple[str, Callable[[], Any]]]:
        path = str(root / "in" / "x.pt" if kind == "torch" else root / "in")
        if kind in ("memopt", "torch", "dcp", "deepspeed"):
            yield "inspect", lambda: main(["inspect", path, *(["--json"] if number % 2 else [])])
            to = _TARGETS[number % len(_TARGETS)]
            rule = ["--from", "adamw"] if number % 3 == 0 else []
            yield f"convert --to {to}", lambda: main(["convert", path, str(root / "out"), "--to", to, *rule])
            if kind == "memopt":
                yield "load", lambda: memopt.load(path, model=self._model, optimizer=self._opt, rng=number % 2 == 0)
            else:
                yield "load", lambda: memopt.load(path, optimizer=self._opt, hyper=False)
            return
        files = sorted(folder) if kind != "launch" else [next(iter(folder))]
        for file in files:
            inside = str(root / "in" / file)
            if kind == "launch":
                yield "estimate --from", lambda inside=inside: main(["estimate", "8B", "--from", inside])
            else:
                page = ["--html", str(root / "page.html")] if number % 4 == 0 else []
                yield "estimate", lambda inside=inside, page=page: main(["estimate", inside, *page])
        if kind == "config":
            yield "estimate", lambda: main(["estimate", path])
            yield "estimate --from", lambda: main(["estimate", "8B", "--from", str(root / "in" / "config.json")])

    def _watched(self, number: int, kind: str, name: str, call: Callable[[], Any], root: Path, nbytes: int) -> None:
        said, before = io.StringIO(), _resident(reset=True)
        self.watch.found, self.watch.folder = [], os.path.realpath(root)
        signal.alarm(HANGING)
        start, outcome = time.process_time(), "?"
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code = call()
            outcome = f"exit code {code}" if isinstance(code, int) else "read"
        except SENTENCES as error:
            outcome = "refused"
            said.write(str(error))
            if name != "load":
                self._failed(number, kind, name, f"a trace: {error!r:.300}")
        except SystemExit as exit_:
            outcome = f"exit code {exit_.code}"
        except BaseException as error:
            outcome = "a trace"
            self._failed(number, kind, name, f"a trace: {error!r:.300}")
        finally:
            seconds = time.process_time() - start
            signal.alarm(0)
            self.watch.folder = None
        grown = max(_resident(reset=False) - before - nbytes, 0)
        self.slowest, self.largest = max(self.slowest, seconds), max(self.largest, grown)
        self.counts[f"{name.partition(' --to')[0]}: {outcome}"] += 1
        problems = list(self.watch.found)
        problems += [f"{seconds:.2f} s"] * (seconds > SECONDS) + [f"{grown / 2**20:.0f} MiB"] * (grown > NBYTES)
        page = root / "page.html"
        text = said.getvalue() + (page.read_text(errors="replace") if page.exists() else "")
        odd = {c for c in text if not c.isprintable() and c != "\n"}
        problems += [f"control characters: {odd!r}"] * bool(odd)
        for problem in problems:
            self._failed(number, kind, name, problem)

    def _failed(self, number: int, kind: str, name: str, problem: str) -> None:
        self.failures.append({"input": number, "kind": kind, "reader": name, "problem": problem})


def _write(folder: Path, content: Folder) -> int:
    nbytes = 0
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, bytes):
            path.write_bytes(data)
            nbytes += len(data)
        else:
            data(str(path))
    return nbytes


def _resident(reset: bool) -> int:
    """Bytes of this process in memory now (``reset``), or the most there have been since."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    field = "VmRSS:" if reset else "VmHWM:"
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(field)[2].split()[0])


def _hanging(*_: Any) -> None:
    raise TimeoutError("it does not come back")


def limited() -> None:
    """This process can reserve a few gigabytes more than it has, and is told when a reader does not come back."""
    signal.signal(signal.SIGALRM, _hanging)
    mapped = 1024 * int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (mapped + RESERVED, resource.RLIM_INFINITY))
