"""The scripts of examples/recipes.md run, in the order in which it gives them."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def test_every_command_of_the_page_runs(tmp_path, monkeypatch, capsys):
    text = tmp_path / "notes.txt"
    text.write_text("\n".join(f"{i} times seven is {7 * i}" for i in range(300)))
    commands = re.findall(r"^    python (examples/recipe_.*)$", (ROOT / "examples" / "recipes.md").read_text(), re.M)
    assert len(commands) == 7
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    for command in commands:
        script, *arguments = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [script, *arguments, "--steps", "2", "--text", str(text)])
        runpy.run_path(str(ROOT / script), run_name="__main__")
        out = capsys.readouterr().out
        assert "validation loss" in out, command
        assert ("bytes of state" in out) == ("finetune" not in script), command
