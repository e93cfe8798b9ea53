"""``memopt completion``: scripts that their shells accept, and in bash what Tab offers."""

import shutil
import subprocess

import pytest

from memopt.cli import VERBS
from memopt.cli.completion import SHELLS, command_line

shtab = pytest.importorskip("shtab")


@pytest.fixture(scope="module")
def parser():
    return command_line()


@pytest.fixture(scope="module")
def scripts(parser, tmp_path_factory):
    """shell -> a file with its script"""
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        (folder / shell).write_text(shtab.complete(parser, shell))
    return {shell: folder / shell for shell in SHELLS}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_reads_its_script(scripts, shell):
    program = shutil.which(shell) or pytest.skip(f"{shell} is not installed")
    subprocess.run([program, "-n", scripts[shell]], check=True, timeout=20)


OFFERED = {
    "memopt e": {"estimate"},
    "memopt estimate --checkp": {"--checkpointing"},
    "memopt estimate llama-3.1-": {"llama-3.1-8b", "llama-3.1-70b"},
    "memopt estimate 8B --gpu rtx-40": {"rtx-4090"},
    "memopt estimate 8B --optim adamw-8b": {"adamw-8bit"},
    "memopt estimate 8B --loss ": {"full", "chunked", "fused"},
    "memopt schedule cos": {"cosine", "cosine_restarts"},
    "memopt solve 8B --largest ": {"batch", "seq"},
    "memopt convert a b --to d": {"dcp", "deepspeed"},
    "memopt completion ": set(SHELLS),
    "memopt estimate 8B --html pag": {"page.html"},
}


@pytest.mark.parametrize("line", OFFERED)
def test_what_tab_offers_in_bash(scripts, tmp_path, line):
    (tmp_path / "page.html").touch()
    words = line.split(" ")
    ask = (
        f"source {scripts['bash']}; COMP_WORDS=({' '.join(words)} ''); COMP_CWORD={len(words) - 1}; "
        "_shtab_memopt; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    if words[-1]:
        ask = ask.replace(" '');", ");")
    shown = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert shown.stderr == ""
    assert OFFERED[line] <= {word.strip() for word in shown.stdout.splitlines()}


def test_every_verb_has_its_flags(parser):
    (verbs,) = (action for action in parser._actions if action.dest == "==SUPPRESS==" and action.choices)
    assert list(verbs.choices) == list(VERBS)
    for verb, one in verbs.choices.items():
        assert len(one._actions) > 1 or verb == "bench", verb


def test_what_is_offered_is_allowed(parser, run):
    """A value that the calculator knows no longer would be a wrong offer."""
    (verbs,) = (action for action in parser._actions if action.choices)
    flags = {action.dest: action for action in verbs.choices["estimate"]._actions if action.choices}
    for name in ("gpu", "optim", "checkpointing", "attention", "loss", "quantised", "emit", "lora_kind", "mixed"):
        words = ["estimate", "gpt2", "--seq", "64", flags[name].option_strings[0], flags[name].choices[-1]]
        words += ["--lora", "8"] if name in ("lora_kind", "quantised") else []
        assert run(*words)[2] == "", words


def test_without_shtab_a_sentence_says_how(run, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "shtab", None)
    code, _, err = run("completion", "bash")
    assert code == 2
    assert "pip install shtab" in err
