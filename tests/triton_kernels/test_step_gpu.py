"""The benchmark for a GPU, on a card that is made up: what it writes, leaves out and refuses to time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", minversion="3.3")
pytestmark = pytest.mark.usefixtures("interpreted")
SHAPES = [(17, 300), (33,)]


class Event:
    def __init__(self, enable_timing: bool) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, other: Event) -> float:
        return 2.0


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """``bench(*argv)`` runs the script and returns (exit code, report, table); ``bench.module`` is the script."""
    from memopt.kernels.triton import available as triton

    if torch.version.cuda and not torch.cuda.is_available():
        pytest.skip("a torch for cards asks the made-up one for its driver")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import step_gpu

    for name, value in {
        "is_available": True,
        "mem_get_info": (2**30, 2**30),
        "get_device_name": "a made-up card",
        "memory_allocated": 0,
        "max_memory_allocated": 3 * 2**20,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(triton, "missing", lambda device: None if device in triton.DEVICES | {"cuda"} else "none")
    monkeypatch.setattr(triton, "DEVICES", {"cpu"})
    monkeypatch.setattr(step_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(step_gpu, "CHECKED", SHAPES)
    monkeypatch.setattr(step_gpu, "llama", lambda numel: SHAPES)
    monkeypatch.setattr(step_gpu, "MAIN", ("adamw-8bit",))
    monkeypatch.setattr(step_gpu, "DTYPES", {"bf16": torch.bfloat16})
    monkeypatch.setattr(step_gpu, "specs", lambda: ["sgd"])
    monkeypatch.setattr(step_gpu, "others", lambda: [("torch AdamW", lambda p: torch.optim.AdamW(p).step)])

    def run(*argv: str):
        code = step_gpu.main(["--copied", "1000", "--rounds", "1", "--seconds", "0", "--out", str(tmp_path), *argv])
        report = json.loads((tmp_path / "step_gpu.json").read_text())
        return code, report, (tmp_path / "step_gpu.md").read_text()

    run.module = step_gpu
    yield run
    for name in [name for name in sys.modules if name.startswith("step_gpu")]:
        del sys.modules[name]


def test_it_checks_and_times_and_writes_a_table(bench) -> None:
    code, report, text = bench()
    assert code == 0
    names = ["memopt adamw-8bit (propagate)", "memopt adamw-8bit", "torch AdamW", "memopt sgd"]
    assert [row["name"] for row in report["rows"]] == names
    assert all(row["ms"] == 2.0 for row in report["rows"]), report
    assert "2 of 2 pairs of spec and dtype agree" in text
    # bf16: read and write the parameter, read the gradient (twice where it is looked at), the state both ways.
    state = 2 * (17 * 300 * 2 + 17 * 2 * 2 * 4 + 33 * 8 + 2 * 4) / (17 * 300 + 33)
    assert report["rows"][0]["bytes_per_parameter"] == pytest.approx(6 + state, rel=1e-9)
    assert report["rows"][1]["bytes_per_parameter"] == pytest.approx(8 + state, rel=1e-9)


def test_what_disagrees_is_not_timed_and_fails_the_run(bench, monkeypatch) -> None:
    monkeypatch.setattr(bench.module, "check", lambda spec, dtype: "7 differ" if spec == "sgd" else "")
    monkeypatch.setattr(bench.module, "measure", lambda *_: {"ms": 1.0, "peak_above_state": 0})
    code, report, text = bench()
    assert code == 1
    assert report["rows"][-1] == {"name": "memopt sgd", "dtype": "bf16", "agrees": False, "left_out": "WRONG: 7 differ"}
    assert "| memopt sgd | bf16 | WRONG: 7 differ |" in text


def test_candidates_that_fail_are_left_out_with_the_reason(bench, monkeypatch) -> None:
    import step_gpu_peers

    def measure(build, *_):
        if getattr(build, "args", ("", ""))[1:] == ("skip",):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return {"ms": 1.0, "peak_above_state": 0}

    def absent(module: str) -> SimpleNamespace:
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(step_gpu_peers, "import_module", absent)
    monkeypatch.setattr(bench.module, "others", step_gpu_peers.others)
    monkeypatch.setattr(bench.module, "check", lambda spec, dtype: "")
    monkeypatch.setattr(bench.module, "measure", measure)
    code, report, _ = bench("--brief")
    assert code == 0
    said = {row["name"]: row.get("left_out") for row in report["rows"]}
    assert said["memopt adamw-8bit"] == "left out: OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert said["memopt adamw-8bit (propagate)"] is said["torch AdamW fused"] is None
    assert said["torchao AdamW4bit"] == "left out: ImportError: No module named 'torchao.optim'"
    _, report, _ = bench("--minutes", "0")
    assert {row["left_out"] for row in report["rows"]} == {"left out: no time was left"}


def test_when_the_device_fails_the_run_ends_with_what_was_measured(bench, monkeypatch) -> None:
    broken = []

    def measure(build, *_):
        if broken or getattr(build, "args", ("", ""))[1:] == ("skip",):
            broken.append(True)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {"ms": 1.0, "peak_above_state": 0}

    def synchronize() -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(bench.module, "check", lambda spec, dtype: "")
    monkeypatch.setattr(bench.module, "measure", measure)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    code, report, text = bench()
    assert code == 1
    assert [row["name"] for row in report["rows"]] == ["memopt adamw-8bit (propagate)", "memopt adamw-8bit"]
    assert report["stopped"] == "the device failed at memopt adamw-8bit on bf16"
    assert "Stopped: the device failed" in text


@pytest.mark.slow
def test_programs_of_other_sizes_are_timed_and_compared(bench, monkeypatch, capsys) -> None:
    import step_gpu_tune

    from memopt.kernels.triton import cached_step, tables

    for owner, name in ((tables, "WARPS"), (tables, "PROGRAM"), (cached_step, "_LAUNCHERS")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(step_gpu_tune, "SPECS", ("adamw", "adamw-8bit"))
    monkeypatch.setattr(step_gpu_tune, "PROGRAMS", (4096,))
    times = iter([4.0, 3.0, 1.0, 2.0] * 2)

    def timed(step, *_):
        step()
        return next(times) if step.__name__ == "step" else 1.0  # the copy

    monkeypatch.setattr(bench.module, "timed", timed)
    assert step_gpu_tune.main(["--copied", "1000"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].split()[:3] == ["1", "×", "4096"]
    for line in said[2:]:
        assert line.split("*")[0].count("%") == 2, line  # the third is the best
    assert len(said) == 4
