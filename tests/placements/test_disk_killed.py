"""A step into a directory that ends in its middle, by whatever: it holds the step before or after, never a mix."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import memopt
from memopt.placements.arena import Arena
from memopt.placements.stores.atomic_record import Journal
from tests.helpers.cases import assert_same_bits, odd_model
from tests.placements.test_disk import state_of
from tests.placements.test_placements import assert_same, drive

RUN = textwrap.dedent("""
    import os, sys, warnings
    warnings.simplefilter("ignore")
    import torch
    torch.set_num_threads(1)
    import memopt
    from tests.helpers.cases import odd_model
    from tests.placements.test_placements import drive
    directory, parameters, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
    model = odd_model()
    opt = memopt.create(model, "adamw-8bit@disk", directory=directory, workspace="1MiB")
    opt.init_state()
    done = int(opt.state[model.vector]["step"])
    if done:
        model.load_state_dict(torch.load(f"{parameters}/{done}.pt"))
    for step in range(done, last):
        print(step, flush=True)
        drive(model, opt, step, 1)
        torch.save(model.state_dict(), f"{parameters}/new.pt")
        os.replace(f"{parameters}/new.pt", f"{parameters}/{step + 1}.pt")
""")


def start(directory: Path, parameters: Path, last: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(directory), str(parameters), str(last)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_kill_in_mid_step_loses_at_most_that_step(tmp_path, kills):
    """Killed with SIGKILL a few milliseconds into a step, again and again: the directory is the state before or after
    that step, bit for bit that of a run that nobody killed."""
    last = 15
    twin = odd_model()
    reference = memopt.create(twin, "adamw-8bit")
    history = []
    for step in range(last):
        drive(twin, reference, step, 1)
        history.append((state_of(reference), {k: v.clone() for k, v in twin.state_dict().items()}))
    directory, parameters = tmp_path / "state", tmp_path / "parameters"
    parameters.mkdir()
    for kill in range(kills):
        process = start(directory, parameters, last)
        assert process.stdout is not None
        begun = int(process.stdout.readline())
        for line in process.stdout:
            if int(line) >= begun + 2:
                break
        time.sleep(0.007 * kill)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        begun = max([int(line), *map(int, process.stdout.read().split())])
        opt = memopt.create(odd_model(), "adamw-8bit@disk", directory=directory)
        with pytest.warns(UserWarning, match="state of earlier steps"):
            opt.init_state()
        (step,) = {int(s["step"]) for s in opt.state.values()}
        assert step in (begun, begun + 1)
        for state, expected in zip(state_of(opt), history[step - 1][0], strict=True):
            for key, value in state.items():
                assert_same_bits(value, expected[key], key)
        opt.close()
        torch.save(history[step - 1][1], parameters / f"{step}.pt")  # a training run saves them; here they are known
    process = start(directory, parameters, last)
    assert process.wait(timeout=120) == 0
    model = odd_model()
    model.load_state_dict(torch.load(parameters / f"{last}.pt"))
    opt = memopt.create(model, "adamw-8bit@disk", directory=directory)
    with pytest.warns(UserWarning, match="state of earlier steps"):
        opt.init_state()
    assert_same((model, opt), (twin, reference))


class Died(Exception):
    """Stands for the end of the process at this point."""


@pytest.mark.parametrize("at", range(0, 24, 3))
def test_ended_at_any_write_the_directory_is_the_step_before_or_after(tmp_path, monkeypatch, at):
    """Not a step later, not half of one: the writes of a step, the record's included, are cut off after each in turn,
    the last of them in its middle."""
    model = odd_model()
    opt = memopt.create(model, "adamw@disk", directory=tmp_path, workspace="1MiB")
    drive(model, opt, 0, 2)
    after_two = state_of(opt)
    writes = 0
    real = os.pwrite

    def pwrite(descriptor, data, offset):
        nonlocal writes
        writes += 1
        if writes > at:
            if writes == at + 1:
                half = len(data) // 2 // 4096 * 4096 if len(data) >= 8192 else 0
                real(descriptor, data[:half], offset)
            raise Died
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(Died):
        drive(model, opt, 2, 1)
    monkeypatch.undo()
    assert writes > at
    opt.close()
    again = memopt.create(model, "adamw@disk", directory=tmp_path)
    with pytest.warns(UserWarning, match="has stepped 2 times"):
        again.init_state()
    for state, old in zip(state_of(again), after_two, strict=True):
        for key, value in state.items():
            assert_same_bits(value, old[key], key)


def test_a_step_that_failed_in_the_middle_is_not_stepped_on(tmp_path, monkeypatch):
    model = odd_model()
    opt = memopt.create(model, "adamw@disk", directory=tmp_path, workspace="1MiB")
    drive(model, opt, 0, 2)
    memopt.save(tmp_path / "checkpoint", model=model, optimizer=opt)
    real, count = Arena.write, 0

    def write(self, view, offset):
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(errno.EIO, "Input/output error")
        real(self, view, offset)

    monkeypatch.setattr(Arena, "write", write)
    with pytest.raises(OSError, match="Input/output error"):
        drive(model, opt, 2, 1)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"stopped in the middle .*Load a checkpoint"):
        drive(model, opt, 2, 1)
    memopt.load(tmp_path / "checkpoint", model=model, optimizer=opt)
    drive(model, opt, 2, 2)
    twin = odd_model()
    reference = memopt.create(twin, "adamw")
    drive(twin, reference, 0, 4)
    assert_same((model, opt), (twin, reference))


def test_a_commit_that_fails_is_made_good(tmp_path, monkeypatch):
    model = odd_model()
    opt = memopt.create(model, "adamw@disk", directory=tmp_path)
    drive(model, opt, 0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", lambda self, record: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
        with pytest.raises(OSError, match="the step was made, and could not be committed"):
            drive(model, opt, 1, 1)
    drive(model, opt, 2, 1)
    opt.close()
    opt = memopt.create(model, "adamw@disk", directory=tmp_path)
    with pytest.warns(UserWarning, match="has stepped 3 times"):
        opt.init_state()
    twin = odd_model()
    reference = memopt.create(twin, "adamw")
    drive(twin, reference, 0, 3)
    assert_same((model, opt), (twin, reference))
