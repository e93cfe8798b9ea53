"""The kernels under the address, undefined-behaviour and thread sanitizers (slow: it compiles them anew).

In parts, each under four minutes on one core: ``pytest -m slow -k thread-0 tests/kernels/test_kernels_sanitizers.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from memopt.kernels import build

DRIVER = Path(__file__).with_name("kernels_driver.cpp")
#: A child of a process with threads may not make threads under TSan unless it is told that we know.
OPTIONS = {"TSAN_OPTIONS": "die_after_fork=0", "UBSAN_OPTIONS": "halt_on_error=1"}
#: Each compiles with its own; what threads do does not depend on the instruction set, what memory is touched does.
SANITIZERS = {"address,undefined": (), "thread": ("-DONE_TABLE",)}
PARTS = 2


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The program that a sanitizer was compiled into."""

    @cache
    def compiled(sanitizer: str) -> Path:
        try:
            compiler = build.compiler()
        except build.BuildError as error:
            pytest.skip(str(error))
        directory = tmp_path_factory.mktemp(sanitizer.replace(",", "-"))
        own = SANITIZERS[sanitizer]
        flags = [*build.FLAGS, f"-I{build.SOURCES}", "-O1", "-g1", "-DMEMOPT_LARGE=32768", *own]
        flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=undefined"]
        tables = {"baseline": ()} if own else build.tables()
        sources = [
            (build.SOURCES / "isa.cpp", name, [*isa, f"-DMEMOPT_TABLE=memopt_{name}"]) for name, isa in tables.items()
        ]
        sources += [(build.SOURCES / f"{name}.cpp", Path(name).name, []) for name in build.COMMON]
        sources.append((DRIVER, "driver", []))
        running = [
            subprocess.Popen([*compiler, *flags, *more, "-c", str(path), "-o", str(directory / f"{name}.o")])
            for path, name, more in sources
        ]
        assert [process.wait() for process in running] == [0] * len(running)
        objects = [str(directory / f"{name}.o") for _, name, _ in sources]
        program = directory / "driver"
        command = [*compiler, f"-fsanitize={sanitizer}", *objects, "-o", str(program), "-lpthread"]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"this compiler has no {sanitizer} sanitizer")
        return program

    return compiled


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sanitizers are tried on Linux")
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_clean_under_sanitizers(sanitizer: str, part: int, driver: Callable[[str], Path]) -> None:
    command = [str(driver(sanitizer)), str(part), str(PARTS)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **OPTIONS}, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip() == "same"
