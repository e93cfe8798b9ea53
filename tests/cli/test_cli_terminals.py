"""Terminals of every encoding, readers that go, disks that are full, and random lines: one sentence or the answer."""

import io
import os
import sys
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path

import pytest

from memopt.cli import VERBS, main

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LINES = {
    "list": ["list"],
    "recipes": ["list", "recipes"],
    "estimate": ["estimate", "llama-3.2-1b", "--seq", "64", "--gpu", "8GiB", "--optim", "adamw", "adamw-8bit@host"],
    "plan": ["plan", "gpt2", "--gpu", "4GiB", "--optim", "adamw"],
    "schedule": ["schedule", "cosine", "--total-steps", "10000000000", "--warmup", "0.02"],
    "restarts": ["schedule", "cosine_restarts", "--cycle", "1", "--total-steps", "10000000000"],
    "unknown": ["schedule", "日本…"],
}


@pytest.fixture
def terminal(monkeypatch):
    """``terminal(encoding, line)``: the exit code and what standard output got, under an encoding that refuses."""

    def shown(encoding, line):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict"))
        try:
            code = main(line)
        except SystemExit as exit_:
            code = exit_.code
        out.flush()
        return code, out.buffer.getvalue().decode(encoding)

    return shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_no_encoding_is_refused(terminal, encoding, line):
    code, out = terminal(encoding, line)
    assert code == (2 if line[-1] == "日本…" else 0)
    assert (len(out) > 100) == (code == 0)


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "bench"])
def test_help_of_every_verb_in_ascii(terminal, verb):
    assert terminal("ascii", [verb, "--help"])[0] == 0


class Gone(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def flush(self):
        raise self.error


@pytest.mark.parametrize("line", [["list"], ["--help"], ["--version"], ["schedule", "--help"]], ids=" ".join)
def test_a_reader_that_has_gone_ends_every_verb_alike(monkeypatch, line):
    monkeypatch.setattr(sys, "stdout", Gone(BrokenPipeError()))
    assert main(line) == 0


def test_a_full_disk_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Gone(OSError(28, "No space left on device")))
    assert main(["list"]) == 2
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["estimate", "8B", "--html", "no/such/x.html"], "--html 'no/such/x.html' cannot be written: No such file"),
        (["estimate", "8B", "--plot", "x.txt"], "not a picture"),
        (["schedule", "constant", "--plot", "no/such/x.png"], "--plot 'no/such/x.png' cannot be written"),
        (["schedule", "constant", "--warmup", "10000000000000"], "up to 1,000,000,000,000"),
        (["schedule", "cosine", "--total-steps", "9" * 30, "--json"], "up to 1,000,000,000,000"),
        (["schedule", "cosine", "--total-steps", "10000000", "--json"], "at most 1,000,000"),
        (["train", "--json", "no/such/x.json"], "--json 'no/such/x.json' cannot be written"),
        (["train", "--steps", "99999999999"], "at most 10,000,000"),
        (["train", "--timeout", "nan"], "timeout nan is not allowed"),
        (["lr-find", "--plot", "no/such/x.png"], "--plot 'no/such/x.png' cannot be written"),
        (["convert", __file__, f"{__file__}/x", "--to", "adamw-8bit"], f"{__file__!r} is a file"),
        (["convert", __file__, __file__, "--to", "adamw-8bit"], "cannot be written: it is a file"),
        (["convert", __file__, "no/such/x.pt", "--to", "torch"], "OUT 'no/such/x.pt' cannot be written"),
        (["convert", __file__, "no/such/x", "--to", "dcp"], "there is no folder 'no/such'"),
        (["convert", __file__, str(BENCHMARKS), "--to", "deepspeed"], "exists; name a folder that does not"),
        (["convert", "no/such", "x", "--to", "adamw"], "'no/such' does not exist"),
        (["inspect", "no/such"], "'no/such' does not exist"),
        (["bench", "--rounds", "0"], "--rounds 0 is not allowed; it is a whole number from 1"),
        (["bench", "--out", __file__], "cannot be written: it is a file"),
        (["measure", "--out", "no/such/x", "--", "python", __file__], "--out 'no/such/x' cannot be written"),
        (["measure", "--", "python", sys.executable], "is a binary file"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_said_before_the_work(run, line, sentence):
    code, out, err = run(*line)
    assert code == 2
    assert sentence in err
    assert not out


def test_what_was_written_is_named_and_a_check_leaves_nothing(run, tmp_path):
    page = tmp_path / "page.html"
    assert f"written: {page}" in run("estimate", "8B", "--html", str(page))[1]
    json_ = run("estimate", "8B", "--html", str(page), "--json")
    assert f"written: {page}" in json_[2]
    assert "written" not in json_[1]
    assert run("estimate", "nothing", "--html", str(tmp_path / "other.html"))[0] == 2
    assert not (tmp_path / "other.html").exists()


def test_a_binary_or_an_empty_text_says_so(run, tmp_path):
    (tmp_path / "binary").write_bytes(b"a\0b" * 1000)
    (tmp_path / "empty").touch()
    assert "binary file" in run("train", str(tmp_path / "binary"))[2]
    assert "holds no text" in run("train", str(tmp_path / "empty"))[2]


def test_bench_without_a_repository_is_a_sentence(run, monkeypatch, tmp_path):
    from memopt.cli import bench

    monkeypatch.setattr(bench, "SCRIPT", tmp_path / "none.py")
    code, _, err = run("bench")
    assert code == 2
    assert err == "memopt bench: the benchmark is part of the repository and not of the package; run it in a checkout\n"


@pytest.fixture
def random_lines(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import cli_lines

    return cli_lines


@pytest.mark.parametrize("verb", VERBS)
def test_random_lines_have_every_flag(random_lines, verb):
    parser = ArgumentParser()
    import_module(f"memopt.cli.{verb.replace('-', '_')}").add_arguments(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert flags - {"-h", "--help"} == set(random_lines.VERBS[verb][1]) - {"--no"}


def test_random_lines(random_lines, tmp_path):
    """A few; ``benchmarks/cli_fuzz.py`` has ten thousand."""
    import cli_fuzz

    found = cli_fuzz.run(0, 40, seed=1, every=0)
    assert found["failures"] == []
    assert found["outcomes"]["exit code 0"] > 3
    assert found["outcomes"]["exit code 2"] > 5


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("raise KeyError('x')", "traceback"),
        ("print('Traceback (most recent call last)')", "traceback"),
        ("print('日本')", "traceback"),
        ("return 2", "exit code 2 without a sentence"),
        ("return 3", "exit code 3"),
        ("os._exit(0)", "ended the process"),
        ("while True: pass", "hung"),
    ],
)
def test_what_goes_wrong_in_a_random_line_is_found(random_lines, monkeypatch, tmp_path, body, outcome):
    """In each of two lines: one that ends its process does not end the run."""
    import cli_fuzz

    names = {"os": os}
    exec(f"def main(words):\n    {body}", names)
    monkeypatch.setattr("memopt.cli.main", names["main"])
    monkeypatch.setattr(cli_fuzz, "LIMIT", 0.2)
    fixtures = random_lines.Fixtures(tmp_path)
    assert [found[0] for found in cli_fuzz.outcomes(0, 2, 0, fixtures)] == [outcome] * 2
