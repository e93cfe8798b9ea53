"""``memopt estimate`` of a whole step: what --seq adds."""

import json
import sys

import pytest

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
        lines, key = bars(e)[:2], " ".join(bars(e)[2:])
        most = max(*(c.peak.nbytes for c in e.columns), e.gpu)
        width = 79 - len("adamw-8bit") - 1 if 79 - len("adamw-8bit") - 1 < 60 else 60
        for line, column in zip(lines, e.columns, strict=True):
            drawn = sum(line.split(" ", 1)[1].count(letter) for letter in "WbGSATr")
            assert drawn == round(column.peak.nbytes * width / most)
        assert "| is 24.00 GiB" in key
