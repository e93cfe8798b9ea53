"""The kernels under the address, undefined-behaviour and thread sanitizers (slow: it compiles them anew)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from memopt.kernels import build

DRIVER = Path(__file__).with_name("kernels_driver.cpp")
#: A child of a process with threads may not make threads under TSan unless it is told that we know.
OPTIONS = {"TSAN_OPTIONS": "die_after_fork=0", "UBSAN_OPTIONS": "halt_on_error=1"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sanitizers are tried on Linux")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_clean_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    try:
        compiler = build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    flags = [
        *build.FLAGS,
        f"-I{build.SOURCES}",
        "-O1",
        "-g1",
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=undefined",
    ]
    sources = [
        (build.SOURCES / "isa.cpp", name, [*isa, f"-DMEMOPT_TABLE=memopt_{name}"])
        for name, isa in build.tables().items()
    ]
    sources += [(build.SOURCES / f"{name}.cpp", Path(name).name, []) for name in build.COMMON]
    sources.append((DRIVER, "driver", []))
    running = [
        subprocess.Popen([*compiler, *flags, *more, "-c", str(path), "-o", str(tmp_path / f"{name}.o")])
        for path, name, more in sources
    ]
    assert [process.wait() for process in running] == [0] * len(running)
    program = tmp_path / "driver"
    objects = [str(tmp_path / f"{name}.o") for _, name, _ in sources]
    linked = subprocess.run(
        [*compiler, f"-fsanitize={sanitizer}", *objects, "-o", str(program), "-lpthread"],
        capture_output=True,
        text=True,
    )
    if linked.returncode:
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    done = subprocess.run([str(program)], capture_output=True, text=True, env={**os.environ, **OPTIONS}, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip() == "same"
