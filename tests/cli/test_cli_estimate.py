"""memopt estimate as a person or a script meets them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import estimators
import memopt

ROOT = Path(__file__).parents[2]


class TestEstimate:
    def test_a_count_side_by_side(self, run):
        code, out, err = run("estimate", "8B")
        assert (code, err) == (0, "")
        assert "8,000,000,000 parameters" in out
        for spec in ("adamw", "adamw@paged", "adamw-8bit", "adamw-4bit", "adafactor"):
            assert f"\n{spec} " in out
        assert "without activations" in out
        assert "\033" not in out

    @pytest.mark.parametrize(
        "argv",
        [
            ("8B",),
            ("llama-3.1-405b", "--gpu", "h100-80gb", "--world", "64", "--optim", "adamw", "adamw-8bit@paged/zero1"),
            ("llama-3.1-8b", "--gpu", "24GiB", "--world", "8"),
            ("gpt2", "--gpu", "24GiB"),
            ("1",),
            ("1000T", "--gpu", "1MiB"),
            ("1000T",),
        ],
    )
    def test_it_fits_80_columns(self, run, argv):
        _, out, _ = run("estimate", *argv)
        assert max(map(len, out.splitlines())) <= 80

    def test_exit_codes(self, run):
        gpt2 = ("estimate", "gpt2", "--seq", "128", "--optim")
        assert run(*gpt2, "adamw", "--gpu", "24GiB")[0] == 0
        assert run("estimate", "gpt2", "--optim", "adamw", "--gpu", "24GiB")[0] == 1  # without activations
        assert run("estimate", "llama-3.1-8b", "--gpu", "24GiB")[0] == 1
        assert run(*gpt2, "adamw", "--gpu", "1GiB")[0] == 1
        column = estimators.estimate("gpt2", "adamw", seq=128).columns[0]
        card = ("--gpu", f"{(column.process.expected + 2**20) // 2**20}MiB")
        assert run(*gpt2, "adamw", *card)[0] == 1
        assert run(*gpt2, "adamw", *card, "--accept-tight")[0] == 0
        assert run(*gpt2, "adamw", "adafactor", *card)[0] == 0

    def test_verdicts(self, run):
        argv = ("estimate", "gpt2", "--seq", "128", "--gpu", "1800MiB")
        _, out, _ = run(*argv, "--optim", "adamw", "adamw@paged", "adafactor")
        adamw, paged, adafactor = (line for line in out.splitlines() if line.startswith("ada") and "GiB" in line)
        assert "over by" in adamw
        assert paged.endswith("FITS, paging")
        assert adafactor.endswith("FITS")
        _, out, _ = run("estimate", "gpt2", "--gpu", "24GiB", "--optim", "adamw")
        assert "no verdict" in out
        assert "No verdict without activations (say --seq)" in out

    def test_three_figures(self, run):
        _, out, _ = run("estimate", "gpt2", "--seq", "128", "--optim", "adamw")
        for name, said in (("allocated", "max_memory_allocated"), ("reserved", "max_memory_reserved")):
            assert re.search(rf"^{name} +[\d.]+ GiB +[\d.]+ GiB +[\d.]+ GiB +torch.cuda.{said}$", out, re.MULTILINE)
        assert re.search(r"^process +[\d.]+ GiB +[\d.]+ GiB +[\d.]+ GiB +nvidia-smi$", out, re.MULTILINE)
        form = json.loads(run("estimate", "gpt2", "--seq", "128", "--optim", "adamw", "--json")[1])
        peak = form["specs"][0]["peak"]
        for name in ("allocated", "reserved", "process"):
            assert list(peak[name]) == ["low", "expected", "high"]
            assert peak[name]["low"] <= peak[name]["expected"] <= peak[name]["high"]
        assert [peak["process"][k] for k in ("low", "expected", "high")] == [
            peak[k] for k in ("low_nbytes", "gpu_nbytes", "high_nbytes")
        ]

    def test_json_is_the_documented_form(self, run):
        argv = ("estimate", "gpt2", "--seq", "64", "--gpu", "1800MiB", "--optim", "adamw", "adamw@paged", "--json")
        code, out, _ = run(*argv)
        form = json.loads(out)
        assert code == 0
        assert list(form) == [
            "schema",
            "model",
            "weights",
            "gradients",
            "world_size",
            "gpu_nbytes",
            "without",
            "training",
            "saved_nbytes",
            "fits",
            "specs",
        ]
        assert form["schema"] == "memopt.estimate/1"
        assert form["model"]["parameters"] == 124_439_808
        adamw, paged = form["specs"]
        assert adamw["fits"] is False
        assert adamw["over_nbytes"] == adamw["peak"]["gpu_nbytes"] - 1800 * 2**20 > 0
        assert paged["fits"] is True
        assert paged["peak"]["pageable_nbytes"] == 8 * 124_439_808
        shapes = estimators.resolve("gpt2").shapes
        assert adamw["state_nbytes"] == memopt.price(shapes, "adamw").nbytes
        for spec in form["specs"]:
            counted = [row for row in spec["rows"] if row["what"] in ("weights", "state")]
            assert {row["provenance"] for row in counted} == {"exact"}
            assert sum(row["nbytes"] for row in spec["rows"] if row["what"] == "state") == spec["state_nbytes"]

    def test_every_key_of_the_form_is_in_the_docs(self, run):
        def keys(value):
            if isinstance(value, dict):
                return set(value) | {k for v in value.values() for k in keys(v)}
            return {k for v in value for k in keys(v)} if isinstance(value, list) else set()

        page = (ROOT / "docs" / "estimates.md").read_text()
        form = json.loads(run("estimate", "gpt2", "--json")[1])
        assert [key for key in sorted(keys(form)) if f"`{key}`" not in page] == []

    def test_sharded_specs_join_when_there_are_ranks(self, run):
        assert "/zero1" not in run("estimate", "8B")[1]
        assert "adamw-8bit/zero1" in run("estimate", "8B", "--world", "8")[1]

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (("lama-3-8b",), ("lama-3-8b", "llama-3-8b")),
            ((), ("which model?",)),
            (("8B", "--gpu", "24"), ("24GiB",)),
            (("8B", "--gpu", "rtx-4091"), ("rtx-4090",)),
            (("8B", "--world", "0"), ("0", "1")),
            (("8B", "--world", "-2"), ("-2",)),
            (("8B", "--world", "two"), ("two", "whole number")),
            (("8B", "--world", "9" * 5000), ("whole number",)),
            (("8B", "--weights", "fp4"), ("fp4", "bf16")),
            (("8B", "--optim", "adamw-9bit"), ("9bit", "8bit")),
            (("8B", "--optim", "lion-factored"), ("lion", "factored")),
            (("8B", "--models"), ("--models", "8B")),
            (("0B",), ("0", "1000T")),
            (("\0",), ("neither",)),
            (("/",), ("config.json",)),
        ],
    )
    def test_bad_input_is_one_sentence(self, run, argv, words):
        code, out, err = run("estimate", *argv)
        assert (code, out) == (2, "")
        assert err.startswith("memopt estimate: ")
        assert err.count("\n") == 1
        assert all(word in err for word in words)

    def test_unknown_flags_are_refused(self, run):
        code, _, err = run("estimate", "8B", "--gpus", "7", "--nonsense")
        assert code == 2
        assert "unrecognized arguments" in err

    def test_models_are_listed(self, run):
        code, out, _ = run("estimate", "--models")
        assert code == 0
        assert "llama-3.1-8b" in out.split()
        assert json.loads(run("estimate", "--models", "--json")[1]) == out.split()

    def test_colour_is_for_terminals_only(self):
        from estimators import estimate
        from estimators.report.text import as_text

        e = estimate("gpt2", ["adamw", "adafactor"], gpu="1800MiB", seq=128)
        painted = as_text(e, colour=True)
        assert re.search("\033\\[31mover by [\\d.]+ GiB\033\\[0m", painted)
        assert "\033[32mFITS\033[0m" in painted
        plain = painted
        for code in ("\033[31m", "\033[32m", "\033[1m", "\033[2m", "\033[0m"):
            plain = plain.replace(code, "")
        assert plain == as_text(e)

    def test_it_starts_without_torch(self):
        code = "import sys; from memopt.cli import main; main(['estimate', '8B']); sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


HEAVY = ("ctypes", "dataclasses", "json", "subprocess", "tempfile", "textwrap", "rich", "torch")


def test_start_up_imports_nothing_heavy():
    code = (
        "import sys; before = set(sys.modules); from memopt.cli import main; main(['estimate', '8B']);"
        "print(*sorted(set(sys.modules) - before), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert set(result.stderr.split()) & set(HEAVY) == set()


@pytest.mark.parametrize(("content", "said"), [(b"", "is empty"), (b"\0\xff", "it is a binary file")])
@pytest.mark.parametrize("how", ["config", "--against", "--from"])
def test_a_file_that_is_none_is_said_before_any_work(run, tmp_path, how, content, said):
    file = tmp_path / "f.json"
    argv = [str(file)] if how == "config" else ["350M", how, str(file)]
    assert run("estimate", *argv)[0] == 2  # it is not there
    file.write_bytes(content)
    code, out, err = run("estimate", *argv)
    assert (code, out, err.count("\n"), said in err) == (2, "", 1, True)


def test_against_needs_the_table(run, tmp_path):
    for flag in (["--json"], ["--emit", "python"]):
        code, _, err = run("estimate", "350M", "--against", "measured.json", *flag)
        assert code == 2
        assert "--against is laid beside the table" in err


@pytest.mark.parametrize("flag", ["--seq", "--lora", "--batch", "--world", "--accumulate"])
def test_none_of_a_number_is_refused(run, flag):
    code, _, err = run("estimate", "llama-3.2-1b", flag, "0")
    assert (code, f"{flag} '0' is not allowed" in err) == (2, True)


@pytest.mark.parametrize(("verb", "flag"), [("train", "--steps"), ("schedule", "--lr"), ("bench", "--rounds")])
def test_what_argparse_refuses_is_one_sentence(run, verb, flag):
    code, out, err = run(verb, *["cosine"][: verb == "schedule"], flag, "x")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{flag}: 'x' is not allowed; it is a" in err
