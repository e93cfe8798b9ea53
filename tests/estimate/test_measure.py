"""Memory by phase as a script runs, and an estimate beside it. On CUDA with torch's figures replaced."""

from __future__ import annotations

import json
import sys

import pytest

import memopt
from memopt.cli import main

torch = pytest.importorskip("torch")

SCRIPT = """
import sys, torch
model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1024))
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(int(sys.argv[1])):
    loss = model(torch.ones(4096, 1024)).pow(2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
if sys.argv[2:]:
    raise SystemExit(int(sys.argv[2]))
"""


def _hooks() -> tuple[int, ...]:
    from torch.nn.modules import module as modules
    from torch.optim import optimizer as optimizers

    return (
        len(modules._global_forward_pre_hooks),
        len(modules._global_forward_hooks),
        len(optimizers._global_optimizer_pre_hooks),
        len(optimizers._global_optimizer_post_hooks),
    )


def test_a_script_is_run_and_its_phases_are_written(tmp_path, capsys) -> None:
    script, out = tmp_path / "train.py", tmp_path / "row.json"
    script.write_text(SCRIPT)
    before = sys.argv, list(sys.path), _hooks()
    assert main(["measure", "--out", str(out), "--", "python", str(script), "2"]) == 0
    assert (sys.argv, sys.path, _hooks()) == before
    row = json.loads(out.read_text())
    assert (row["schema"], row["device"], row["steps"], row["failed"]) == ("memopt.measure/1", "cpu", 2, None)
    resident = {phase: figures["process"] for phase, figures in row["phases"].items()}
    assert set(resident) == {"load", "forward", "backward", "step"}
    # two activations of 16 MiB at least are there when the forward pass ends
    assert resident["forward"] >= resident["load"] + 32 * 2**20
    assert row["peak"]["process"] == max(resident.values()) > row["base_nbytes"]
    assert "resident memory" in capsys.readouterr().out


def test_the_scripts_exit_code_is_ours(tmp_path) -> None:
    script, out = tmp_path / "train.py", tmp_path / "row.json"
    script.write_text(SCRIPT)
    assert main(["measure", "--out", str(out), "--", str(script), "1", "7"]) == 7
    script.write_text("raise KeyError('mine')")
    assert main(["measure", "--out", str(out), "--", str(script)]) == 1
    assert json.loads(out.read_text())["failed"] == "KeyError: 'mine'"


@pytest.mark.parametrize("words", [[], ["--"], ["--", "torchrun", "x.py"], ["--", "python", "-c", "1"]])
def test_what_is_no_script_is_refused(words, capsys) -> None:
    assert main(["measure", *words]) == 2
    assert "Python script or module" in capsys.readouterr().err


def test_a_layer_that_runs_again_in_the_backward_pass_is_of_it() -> None:
    from torch.utils.checkpoint import checkpoint

    layer = torch.nn.Linear(8, 8)
    phases = []

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=False)

    model = Model()
    with memopt.measure() as m:
        layer.register_forward_pre_hook(lambda *_: phases.append(m._phase))
        model(torch.ones(2, 8, requires_grad=True)).sum().backward()
    assert phases == ["forward", "backward"]
    assert m.row["command"]


def test_on_cuda_the_allocators_figures_are_taken_phase_by_phase(monkeypatch) -> None:
    """No card here: torch's functions say what a script with so much memory would."""
    now = {"allocated": 0, "reserved": 0}
    resets = []

    class Card:
        name, total_memory, uuid = "Some card", 24 * 2**30, "0"

    cuda = torch.cuda
    for name, value in {
        "is_available": lambda: True,
        "init": lambda: None,
        "current_device": lambda: 0,
        "get_device_properties": lambda _: Card,
        "reset_peak_memory_stats": lambda: resets.append(1),
        "max_memory_allocated": lambda: now["allocated"],
        "max_memory_reserved": lambda: now["reserved"],
        "memory_reserved": lambda: now["reserved"],
        "mem_get_info": lambda: (24 * 2**30 - now["reserved"] - 300, 24 * 2**30),
    }.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr("memopt.diagnosis.measured._held_by_this_process", lambda: None)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with memopt.measure("mine") as m:
        now.update(allocated=100, reserved=1000)
        loss = model(torch.ones(1, 4)).sum()
        now.update(allocated=200, reserved=2000)
        loss.backward()
        now.update(allocated=300, reserved=3000)
        optimizer.step()
    allocated = {phase: found["allocated"] for phase, found in m.row["phases"].items()}
    assert allocated == {"load": 100, "forward": 200, "backward": 300, "step": 300}
    assert m.row["peak"] == {"allocated": 300, "reserved": 3000, "process": 3300}
    assert (m.row["context_nbytes"], m.row["name"], m.row["total_nbytes"]) == (300, "Some card", 24 * 2**30)
    assert len(resets) >= 4


def _row(allocated: int) -> dict:
    figures = {"allocated": allocated, "reserved": allocated, "process": allocated}
    return {
        "schema": "memopt.measure/1",
        "device": "cuda",
        "name": "Some card",
        "torch": "2.13",
        "peak": figures,
        "phases": {"backward": figures},
    }


def test_an_estimate_is_laid_beside_a_row_and_names_what_differs(tmp_path, capsys) -> None:
    from estimators import estimate
    from estimators.report.against import compared

    e = estimate("gpt2", "adamw", seq=256, gpu="t4")
    expected = e.columns[0].allocated.expected
    assert compared(e, _row(expected))[-1] == "Every phase is within its bounds."
    last = compared(e, _row(2 * expected))[-1]
    assert last.startswith("backward: ")
    assert "more than expected; its largest rows: " in last
    path = tmp_path / "row.json"
    path.write_text(json.dumps(_row(expected)))
    command = ["estimate", "gpt2", "--seq", "256", "--optim", "adamw", "--against", str(path)]
    assert main(command) == 0
    assert "measured" in capsys.readouterr().out
    assert main([*command[:6], "adamw-8bit", *command[6:]]) == 2
    assert "needs one spec, and 2 were asked for" in capsys.readouterr().err
    path.write_text("{}")
    assert main(command) == 2


def test_a_row_of_a_cpu_is_laid_beside_a_step_on_a_cpu(tmp_path, capsys) -> None:
    """Without what a card's step has: its masks and temporaries."""
    from estimators import estimate
    from estimators.report.against import compared

    cpu, card = (estimate("gpt2", "adamw", seq=256, device=device) for device in ("cpu", "cuda"))
    row = {**_row(0), "device": "cpu", "base_nbytes": 0}
    row["peak"] = row["phases"]["backward"] = {"process": cpu.columns[0].allocated.expected}
    path = tmp_path / "row.json"
    path.write_text(json.dumps(row))
    assert main(["estimate", "gpt2", "--seq", "256", "--optim", "adamw", "--against", str(path)]) == 0
    printed = capsys.readouterr().out
    lines = [next(x for x in compared(e, row) if x.startswith("· backward")) for e in (cpu, card)]
    assert [line in printed for line in lines] == [True, False]
