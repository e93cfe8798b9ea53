"""A narrow terminal: everything for people fits 60 columns, and what takes long shows that it lives."""

import io
import sys
import time

import pytest

from memopt.cli import VERBS, doctor, main, measure
from memopt.cli.output import progress, terminal

NARROW = 60
LINES = {
    "estimate": ["estimate", "llama-3.1-8b", "--gpu", "24GiB", "--seq", "2048"],
    "state alone": ["estimate", "8B", "--optim", "adamw", "adamw-8bit"],
    "ranks": ["estimate", "llama-3.1-8b", "--world", "64", "--gpu", "h100", "--seq", "4096"],
    "many digits": ["estimate", "1000T", "--gpu", "24GiB", "--optim", "adamw+fp32@host", "adamw-4bit.factored/zero3"],
    "plan": ["plan", "gpt2", "--gpu", "4GiB", "--seq", "128", "--optim", "adamw"],
    "solve": ["solve", "gpt2", "--gpu", "8GiB", "--largest", "lora", "--seq", "128"],
    "list": ["list"],
    "aliases": ["list", "--aliases"],
    "recipes": ["list", "recipes"],
    "a recipe": ["list", "recipes", "llama-2-7b"],
    "schedule": ["schedule", "wsd", "--total-steps", "1000000000", "--warmup", "0.02", "--decay", "0.1"],
    "verbs": ["--help"],
    **{f"{verb} --help": [verb, "--help"] for verb in VERBS if verb != "bench"},
}


def too_wide(text):
    """Examples of command lines are to be copied: they are not broken."""
    examples = ("    memopt ", "    eval ")
    return [line for line in text.splitlines() if len(line) > NARROW and not line.startswith(examples)]


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_sixty_columns_are_enough(run, monkeypatch, line):
    monkeypatch.setenv("COLUMNS", str(NARROW))
    code, out, err = run(*line)
    assert (code in (0, 1), err) == (True, "")
    assert too_wide(out) == []


def test_findings_and_phases_fit_too(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(NARROW))
    monkeypatch.setattr(doctor, "findings", lambda: [doctor.CheckResult("GPU kernels", doctor.NOTE, "word " * 40)])
    assert main(["doctor"]) == 0
    phase = {"allocated": 123 * 2**30, "reserved": 123 * 2**30, "process": 123 * 2**30}
    row = {"name": "python " + "--flag " * 20, "torch": "2.13.0", "steps": 3, "device": "cuda", "peak": phase}
    print(terminal.folded(measure.table({**row, "phases": {"backward": phase}})))
    out = capsys.readouterr().out
    assert out.count("word") == 40
    assert too_wide(out) == []


def test_bars_fit_a_narrow_terminal():
    from estimators import estimate
    from estimators.report.text import as_text

    found = estimate("llama-3.1-8b", ["adamw", "adamw-4bit.factored@paged/zero3"], gpu="24GiB", seq=64, world_size=8)
    assert too_wide(as_text(found, bars=True, width=NARROW)) == []


def test_a_pipe_keeps_its_lines(run, monkeypatch):
    """What is read by a program does not depend on a terminal that is somewhere."""
    monkeypatch.delenv("COLUMNS", raising=False)
    out = run("list", "recipes")[1]
    assert max(map(len, out.splitlines())) > 80


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_long_work_shows_a_sign_of_life_and_short_work_nothing(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    with progress.working("searching", after=10):
        pass
    assert shown.getvalue() == ""
    with progress.working("searching", after=0):
        end = time.monotonic() + 10
        while "searching" not in shown.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
    assert "searching" in shown.getvalue()


def test_no_sign_of_life_in_a_pipe(capsys):
    with progress.working("searching", after=0):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
