"""A part of ``benchmarks/fuzz.py`` that takes seconds, and whether its harness would see what it looks for."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

INPUTS = 180

#: In a process of its own: its audit hook stays, and its memory is measured.
CODE = """
import os, pickle, subprocess, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.helpers import fuzzing_harness
from memopt.cli import main

watch = fuzzing_harness.Watch()
fuzzing_harness.limited()
fuzzer = fuzzing_harness.Fuzzer(20261130, Path(sys.argv[1]), watch)
fuzzer.run(0, int(sys.argv[2]))

# Fourteen bytes that made a gigabyte of memo.
root = Path(sys.argv[1]) / "case"
(root / "memo").mkdir(parents=True, exist_ok=True)
(root / "memo" / ".metadata").write_bytes(bytes([0x80, 2]) + b"Nr" + (2**29 - 1).to_bytes(4, "little") + b".")
fuzzer._watched(-1, "dcp", "inspect", lambda: main(["inspect", str(root / "memo")]), root, 14)
for failure in fuzzer.failures:
    print(failure, file=sys.stderr)
print(dict(fuzzer.counts))

def page(root):
    (root / "page.html").write_text("\\x1b[2J")

def hold(root):
    assert len(bytes(80 * 2**20).replace(b"\\0", b"\\1")) > 0

def busy(root):
    end = time.process_time() + 1.2
    while time.process_time() < end:
        pass

readers = {
    "reads outside": lambda root: open("/etc/passwd").close(),
    "writes outside": lambda root: open(root.parent / "x", "w").close(),
    "changes outside": lambda root: os.mkdir(root.parent / "y"),
    "os.system": lambda root: os.system("true"),
    "subprocess": lambda root: subprocess.run(["true"]),
    "pickle.find_class": lambda root: pickle.loads(b"cbuiltins\\nset\\n."),
    "socket": lambda root: __import__("socket").getaddrinfo("localhost", 1),
    "a trace: KeyError": lambda root: {}["x"],
    "a trace: TimeoutError": lambda root: time.sleep(30),
    "a trace: MemoryError": lambda root: bytearray(2**36),
    "control characters": lambda root: print("\\x1b[2J"),
    "control characters: {": page,
    "MiB": hold,
    " s": busy,
}
for problem, call in readers.items():
    root = Path(sys.argv[1]) / "case"
    root.mkdir(exist_ok=True)
    fuzzer.failures.clear()
    (root / "page.html").unlink(missing_ok=True)
    fuzzing_harness.HANGING = 2 if "Timeout" in problem else 60
    fuzzer._watched(0, "x", "inspect", lambda: call(root), root, 0)
    found = [f["problem"] for f in fuzzer.failures]
    assert any(problem in one for one in found), (problem, found)
print("seen:", len(readers))
"""


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="the harness wants a POSIX system")
def test_hostile_inputs_and_the_harness_that_watches_them(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(tmp_path), str(INPUTS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "{'input'" not in done.stderr, done.stderr[-3000:]
    assert f"'inputs': {INPUTS}" in done.stdout
    for reader in ("inspect", "convert", "load", "estimate", "estimate --from"):  # some are still good, most are not
        assert f"'{reader}: exit code 2'" in done.stdout or f"'{reader}: refused'" in done.stdout
        assert f"'{reader}: exit code 0'" in done.stdout or f"'{reader}: read'" in done.stdout
    assert "seen: 14" in done.stdout
