"""``memopt train`` end to end, the way a person runs it: as a command, with processes of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil
import pytest

from memopt.cli import main
from memopt.cli.train import KINDS
from memopt.rules import RULES
from memopt.train.job import Job, ModelConfig, RankResult, Result
from memopt.train.recipe import LEARNING_RATE
from memopt.train.report import to_json
from memopt.train.text import Corpus, Text, load_text
from tests.helpers.ranks import FSDP_ON_CPU, NO_FSDP

ROOT = Path(__file__).parents[2]
MEMOPT = [sys.executable, "-m", "memopt"]
#: Models this small gain nothing from threads that wait for each other.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
#: Longer than any run here takes on a busy machine, shorter than a person waits for one that hangs.
PATIENCE_S = 120
#: Two ranks sum gradients and losses in another order than one.
REORDERED = 1e-3


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, arguments)), capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT, env=ENVIRONMENT
    )


@pytest.fixture(scope="module")
def five_kinds(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, dict[str, Any]]]:
    """What the command printed, and its records by spec."""
    file = tmp_path_factory.mktemp("train") / "figures.json"
    done = command(*MEMOPT, "train", "--steps", "4", "--batch", "4", "--context", "32", "--json", file)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout, {run["spec"]: run for run in json.loads(file.read_text())["runs"]}


def test_the_five_kinds_run_and_cost_what_was_predicted(five_kinds: tuple[str, dict[str, Any]]) -> None:
    printed, runs = five_kinds
    assert tuple(runs) == KINDS
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.split()[0:1]}
    for spec, run in runs.items():
        assert run["state_bytes_predicted"] == run["state_bytes_live"]
        predicted, live, loss, *_ = rows[spec]
        assert predicted == live == f"{max(run['state_bytes_live']):,}"
        assert float(loss) == pytest.approx(run["validation_loss"], abs=1e-4)
        assert min(run["peak_resident_bytes"]) > min(run["resident_bytes_before"]) > 0


def test_where_state_lives_does_not_change_what_is_learned(five_kinds: tuple[str, dict[str, Any]]) -> None:
    _, runs = five_kinds
    loss = {spec: run["validation_loss"] for spec, run in runs.items()}
    assert loss["adamw@paged"] == loss["adamw"]
    assert loss["adamw/zero1"] == pytest.approx(loss["adamw"], rel=REORDERED)
    halves = runs["adamw/zero1"]["state_bytes_live"]
    assert len(halves) == 2
    assert max(halves) < 0.51 * runs["adamw"]["state_bytes_live"][0]


@pytest.mark.skipif(not FSDP_ON_CPU, reason=NO_FSDP)
def test_a_sharded_model_learns_the_same(five_kinds: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    short = ("--steps", "4", "--batch", "4", "--context", "32", "--json", file)
    done = command(*MEMOPT, "train", "--optim", "adamw/zero3", *short)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(file.read_text())["runs"]
    assert run["state_bytes_live"] == run["state_bytes_predicted"]
    assert run["validation_loss"] == pytest.approx(five_kinds[1]["adamw"]["validation_loss"], rel=REORDERED)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["no/such/file"], "no file or folder 'no/such/file'"),
        (["EMPTY"], "holds no text"),
        (["SHORT"], "needs at least 1,281"),
        (["FOLDER"], "holds no text"),
        (["--steps", "0"], "steps 0 is not allowed"),
        (["--batch", "-1"], "batch -1 is not allowed"),
        (["--context", "0"], "context 0 is not allowed"),
        (["--threads", "0"], "threads 0 is not allowed"),
        (["--world", "0"], "world size 0 is not allowed"),
        (["--timeout", "0"], "timeout 0 is not allowed"),
        (["--seed", "-1"], "seed -1 is not allowed"),
        (["--lr", "nan"], "lr=nan is not allowed"),
        (["--optim", "adamq"], "unknown rule 'adamq'"),
        (["--optim", "adamw", "SHORT"], "write it before --optim"),
        (["--batch", "3", "--optim", "adamw/zero1"], "batch of 3 cannot be cut into 2"),
        (["--json", "no/such/folder/file"], "no/such/folder/file"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(
    arguments: list[str], sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "SHORT").write_text("too short " * 10)
    (tmp_path / "FOLDER").mkdir()
    given = [str(tmp_path / a) if (tmp_path / a).exists() else a for a in arguments]
    assert main(["train", *given]) == 2
    error = capfd.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1


def zero1_in_the_middle(*arguments: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A run over two ranks that is already training, and its ranks."""
    steps = ["--steps", "1000", "--batch", "2", "--context", "16"]
    running = subprocess.Popen(
        [*MEMOPT, "train", "--optim", "adamw/zero1", *steps, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert running.stdout is not None
    while "step 1/1000" not in running.stdout.readline():
        assert running.poll() is None
    children = psutil.Process(running.pid).children(recursive=True)
    ranks = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    return running, ranks


def alive(process: psutil.Process) -> bool:
    """A zombie is not: who inherits it may take its time to look."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("fault", "arguments", "sentence"),
    [
        pytest.param(signal.SIGKILL, [], "rank 1: the process was ended by SIGKILL", marks=pytest.mark.slow),
        (signal.SIGSTOP, ["--timeout", "3"], "nothing was heard for 3 seconds"),
    ],
)
def test_a_rank_that_dies_or_stops_ends_the_run(fault: signal.Signals, arguments: list[str], sentence: str) -> None:
    running, ranks = zero1_in_the_middle(*arguments)
    ranks[1].send_signal(fault)
    _, errors = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 1
    assert sentence in errors
    assert not any(map(alive, ranks))


def test_ranks_do_not_outlive_the_command() -> None:
    running, ranks = zero1_in_the_middle()
    running.kill()
    running.communicate()
    deadline = monotonic() + PATIENCE_S
    while any(map(alive, ranks)):
        assert monotonic() < deadline
        sleep(0.1)


def result(predicted: int, live: int, storage: int, loss: float = 1.0) -> Result:
    rank = RankResult(
        live=live,
        storage=storage,
        tensors=2,
        validation_loss=loss,
        step_s=0.1,
        optimizer_step_s=0.1,
        resident_before=1,
        peak_resident=2,
        threads=1,
        skipped_steps=0,
    )
    return Result(Job(spec="adamw", lr=1e-3), (predicted,), (rank,))


def test_state_that_was_not_predicted_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("memopt.train.launch.launch", lambda job, on_step: result(1000, 1004, 1004))
    assert main(["train", "--optim", "adamw"]) == 1
    assert "adamw: 1,000 bytes of state were predicted and 1,004 are there" in capfd.readouterr().err


def test_state_must_have_storage_of_its_own() -> None:
    assert not result(1000, 1000, 1000).mismatches
    assert not result(1000, 1000, 1000 + 2 * 64).mismatches
    assert result(1000, 1000, 1000 + 2 * 64 + 1).mismatches
    assert result(1000, 1000, 999).mismatches


def test_a_loss_that_is_not_a_number_is_valid_json() -> None:
    assert json.loads(json.dumps(to_json(result(8, 8, 8, float("nan"))), allow_nan=False))["validation_loss"] is None


def test_every_rule_has_a_rate() -> None:
    assert set(LEARNING_RATE) == {name for name in RULES if not RULES[name].part_of}
    for rule, lr in LEARNING_RATE.items():
        Job(spec=rule, lr=lr)


def test_a_batch_depends_on_the_seed_and_the_step_only() -> None:
    corpus = Corpus(load_text(), 16)
    assert corpus.batch(0, 5, 8).equal(corpus.batch(0, 5, 8))
    assert not corpus.batch(0, 5, 8).equal(corpus.batch(0, 6, 8))
    assert not corpus.batch(0, 5, 8).equal(corpus.batch(1, 5, 8))


def test_batches_and_validation_do_not_meet() -> None:
    text = Text("two halves", b"a" * 900 + b"b" * 100)
    corpus = Corpus(text, 16)
    assert corpus.batch(0, 0, 1000).unique().tolist() == [ord("a")]
    windows = corpus.validation_windows()
    assert windows.unique().tolist() == [ord("b")]
    assert windows.shape == (6, 17)


def test_the_shortest_text_that_holds_a_context() -> None:
    with pytest.raises(ValueError, match="at least 161"):
        Text("short", b"a" * 160).check(16)
    corpus = Corpus(Text("just long enough", b"a" * 161), 16)
    assert corpus.batch(0, 0, 4).shape == (4, 17)
    assert corpus.validation_windows().shape == (1, 17)


def test_a_folder_is_its_visible_text_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.txt").write_bytes(b"first")
    (tmp_path / "image").write_bytes(b"\0\1")
    (tmp_path / ".hidden").write_bytes(b"hidden")
    assert load_text(str(tmp_path)).content == b"first\nsecond"


def test_help_does_not_wait_for_torch() -> None:
    probe = "import sys, memopt.cli.train; sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    assert command(sys.executable, "-c", probe).returncode == 0


def example(*arguments: str | Path) -> str:
    done = command(sys.executable, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_finetune_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    script, checkpoint = "examples/finetune.py", ["--checkpoint", tmp_path / "run.pt"]
    whole = example(script, "--until", "6").splitlines()[-1]
    example(script, "--until", "3", *checkpoint)
    assert example(script, "--until", "6", *checkpoint).splitlines() == ["going on at step 3", whole]


LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow  # launches of several processes
@pytest.mark.parametrize(
    "arguments",
    [
        ["--optim", "adamw-8bit/zero1"],
        ["--optim", "adamw-8bit/zero3"],
        ["--with", "accelerate"],
        ["--with", "deepspeed", "--optim", "adamw-8bit/zero2", "--offload"],
    ],
    ids=" ".join,
)
def test_one_script_runs_anywhere(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("accelerate", "deepspeed"):
        if package in arguments:
            pytest.importorskip(package)
    monkeypatch.setitem(ENVIRONMENT, "DS_ACCELERATOR", "cpu")
    alone = example("examples/anywhere.py", "--steps", "3")
    printed = example(*LAUNCHER, "examples/anywhere.py", "--steps", "3", *arguments)
    loss = [float(number) for number in re.findall(r"loss ([0-9.]+)", alone + printed)]  # ranks may share a line
    assert len(loss) == 3
    assert loss[1] == loss[2] == pytest.approx(loss[0], rel=1e-3)


def test_model_has_the_size_it_says() -> None:
    from memopt.train.run import shapes

    assert 1.2e6 < sum(p.numel() for p in shapes(ModelConfig()).parameters()) < 1.4e6
