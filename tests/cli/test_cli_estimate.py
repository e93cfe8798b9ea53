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


STEP = ("llama-3.2-1b", "--gpu", "24GiB", "--seq", "1024", "--batch", "2", "--checkpointing", "full")


class TestStep:
    """Everything that --seq adds."""

    def test_activations_have_a_column_and_bounds(self, run):
        code, out, _ = run("estimate", *STEP)
        assert code == 0
        assert "2 x 1,024 tokens, sdpa attention, full checkpointing" in out
        assert "activ." in out
        assert "at least" in out
        assert "without" not in out
        assert max(map(len, out.splitlines())) <= 80

    def test_state_that_is_elsewhere_is_marked(self, run):
        _, out, _ = run("estimate", "gpt2", "--gpu", "24GiB", "--optim", "adamw", "adamw@cpu", "adamw@disk")
        assert [line.split()[0] for line in out.splitlines() if "iB^" in line] == ["adamw@cpu", "adamw@disk"]
        assert "^ on the host or on disk, not in the GPU peak: adamw@cpu 1." in " ".join(out.split())

    def test_what_a_sequence_means_is_said(self, run):
        _, out, _ = run("estimate", "whisper-tiny", "--seq", "449")
        said = " ".join(out.split())
        assert "30 seconds whatever --seq says" in said
        assert "--seq 449 does not run: the model has 448 positions" in said
        assert "does not run" not in run("estimate", "gpt2", "--seq", "1024")[1]

    def test_what_has_no_formula_is_said(self, run):
        _, out, _ = run("estimate", "falcon-7b", "--seq", "64", "--attention", "eager")
        assert "without activations (there is no formula for 'eager attention' yet)" in " ".join(out.split())

    def test_what_to_change_first(self, run):
        _, out, _ = run(
            "estimate", "llama-3.1-8b", "--gpu", "24GiB", "--seq", "4096", "--batch", "8", "--optim", "lion-8bit"
        )
        assert "Change first: --checkpointing full" in out
        _, out, _ = run("estimate", "llama-3.1-8b", "--gpu", "24GiB", "--optim", "adamw")
        assert "Change first: --optim adamw-8bit" in out
        assert "Change first" not in run("estimate", "gpt2", "--gpu", "24GiB")[1]

    @pytest.mark.parametrize("kind", ["accelerate", "transformers", "python"])
    @pytest.mark.parametrize(
        "more", [(), ("--lora", "8", "--quantised", "nf4"), ("--world", "4", "--attention", "eager")]
    )
    def test_what_is_emitted_reads_back_to_the_same_figures(self, run, tmp_path, kind, more):
        _, text, _ = run("estimate", *STEP, *more, "--optim", "adamw-8bit", "--emit", kind)
        path = tmp_path / "emitted"
        path.write_text(text)
        if kind != "accelerate":
            compile(text, "emitted", "exec")
        want = json.loads(run("estimate", *STEP, *more, "--optim", "adamw-8bit", "--json")[1])
        assert json.loads(run("estimate", "--from", str(path), "--json")[1]) == want

    def test_accelerate_reads_what_is_emitted_for_it(self, run, tmp_path):
        yaml = pytest.importorskip("yaml")
        config = yaml.safe_load(run("estimate", *STEP, "--world", "4", "--emit", "accelerate")[1])
        assert (config["num_processes"], config["distributed_type"], config["mixed_precision"]) == (
            4,
            "MULTI_GPU",
            "no",
        )

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (("gpt2", "--seq", "x"), ("--seq", "whole number")),
            (("gpt2", "--batch", "2"), ("seq",)),
            (("gpt2", "--seq", "64", "--checkpointing", "some"), ("none, full",)),
            (("8B", "--lora", "8"), ("a parameter count has none",)),
            (("gpt2", "--emit", "python", "--json"), ("both print",)),
            (("gpt2", "--attention", "eager"), ("need seq",)),
            (("gpt2", "--accumulate", "4"), ("need seq",)),
            (("gpt2", "--emit", "lightning"), ("accelerate, deepspeed, transformers, python",)),
            (("gpt2", "--from", "/no/such/file"), ("/no/such/file",)),
        ],
    )
    def test_bad_input_is_one_sentence(self, run, argv, words):
        code, out, err = run("estimate", *argv)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert all(word in err for word in words)

    def test_a_page_needs_nothing_else(self, run, tmp_path):
        path = tmp_path / "out.html"
        run("estimate", *STEP, "--html", str(path))
        page = path.read_text()
        for forbidden in ("http", "src=", "<script", "<link", "@import", "url("):
            assert forbidden not in page
        assert 'name="viewport"' in page
        for words in ("llama-3.2-1b", "adamw-8bit", "FITS", "24.00 GiB"):
            assert words in page

    def test_names_cannot_break_the_page(self, run, tmp_path):
        source = tmp_path / "<b>&.json"
        source.write_text(json.dumps({"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 99}))
        run("estimate", str(source), "--html", str(tmp_path / "out.html"))
        assert "<b>&" not in (tmp_path / "out.html").read_text()

    def test_a_picture(self, run, tmp_path):
        pytest.importorskip("matplotlib")
        assert run("estimate", *STEP, "--plot", str(tmp_path / "out.png"))[0] == 0
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")

    def test_without_matplotlib_it_says_what_to_install(self, run, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        code, _, err = run("estimate", *STEP, "--plot", str(tmp_path / "out.png"))
        assert code == 2
        assert "pip install matplotlib" in err

    def test_bars_are_as_long_as_their_totals(self):
        from estimators import estimate
        from estimators.report.bars import bars

        e = estimate("llama-3.2-1b", ["adamw", "adamw-8bit"], seq=1024, gpu="24GiB")
        *lines, key = bars(e)
        most = max(*(c.peak.nbytes for c in e.columns), e.gpu)
        width = 79 - len("adamw-8bit") - 1 if 79 - len("adamw-8bit") - 1 < 60 else 60
        for line, column in zip(lines, e.columns, strict=True):
            drawn = sum(line.split(" ", 1)[1].count(letter) for letter in "WbGSATr")
            assert drawn == round(column.peak.nbytes * width / most)
        assert "| is 24.00 GiB" in key


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
