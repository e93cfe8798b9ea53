"""Ctrl-C and readers that go, as processes meet them: the same exit code for every verb."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def started(*argv, cwd):
    return subprocess.Popen(
        [sys.executable, "-m", "memopt", *map(str, argv)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # who runs the tests may ignore it
    )


WAITS = "import time\nprint('begun', flush=True)\nwhile True:\n    time.sleep(0.01)\n"


@pytest.mark.parametrize("verb", ["web", "measure"])
def test_ctrl_c_is_130(tmp_path, verb):
    (tmp_path / "script.py").write_text(WAITS)
    argv = {"web": ["web"], "measure": ["measure", "--out", "row.json", "--", "python", "script.py"]}[verb]
    with started(*argv, cwd=tmp_path) as process:
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130, err
        assert "Traceback" not in err
    if verb == "measure":
        assert json.loads((tmp_path / "row.json").read_text())["schema"].startswith("memopt.measure/")
        assert "written: row.json" in out


def test_a_reader_that_goes_ends_it_with_0(tmp_path):
    with started("list", "--json", cwd=tmp_path) as process:  # far more than a pipe holds
        assert process.stdout.read(10)
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


def test_a_reader_of_a_training_that_goes():
    """rich would end the process with 1."""
    import io

    from memopt.train.progress import Console

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Console(file=Gone()).print("text")
