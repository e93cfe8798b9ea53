"""``@disk`` after a process that ended at any call of the system, in a folder that others reach, with files lost."""

import os
import signal
import warnings

import pytest
import torch
from torch import nn

import memopt
from tests.helpers.cases import assert_same_bits

#: What a commit, and the making of a directory, asks of the system.
CALLS = ("open", "pwrite", "fsync", "fdatasync", "posix_fallocate", "rename", "ftruncate", "unlink", "makedirs")
STEPS = 2


def run(directory, steps):
    """``(state of every parameter after each step)`` of a small model, going on from what is there."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = memopt.create(model, "adamw@disk", directory=directory, workspace="1MiB")
        opt.init_state()
    history = [state_of(opt)]
    for step in range(int(opt.state[model.weight]["step"]), steps):
        for p in model.parameters():
            p.grad = torch.full_like(p, float(step + 1))
        opt.step()
        history.append(state_of(opt))
    opt.close()
    return history


def state_of(opt):
    return [{key: value.clone() for key, value in state.items()} for state in opt.state.values()]


def killed(directory, at, after):
    """Whether a process ended before (``after``: behind) its call number ``at``, in a run into ``directory``."""
    child = os.fork()
    if not child:
        left = at

        def interposed(real):
            def call(*args, **keywords):
                nonlocal left
                left -= 1
                if left < 0 and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                found = real(*args, **keywords)
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return found

            return call

        for name in CALLS:
            setattr(os, name, interposed(getattr(os, name)))
        try:
            run(directory, STEPS)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_ended_at_every_call_of_the_system_it_is_the_step_before_or_after(tmp_path, every):
    """And the directory can always be opened again, and goes on to what a run that nobody ended has."""
    expected = run(tmp_path / "twin", STEPS)
    at, ended = 0, True
    while ended:
        for after in (False, True) if every == 1 else (bool(at // every % 2),):
            directory = tmp_path / f"{at}{after}"
            ended = killed(directory, at, after)
            history = run(directory, STEPS)
            first = STEPS + 1 - len(history)
            for found, wanted in zip(history, expected[first:], strict=True):
                for state, other in zip(found, wanted, strict=True):
                    for key, value in state.items():
                        assert_same_bits(value, other[key], (at, after, key))
        at += every
    assert at > 30  # so many calls there are


def linked(directory, name):
    os.symlink(directory.parent / "victim", directory / name)


def named_twice(directory, name):
    os.link(directory.parent / "victim", directory / name)


def a_pipe(directory, name):
    os.mkfifo(directory / name)


def for_everyone(directory, name):
    (directory / name).touch()
    (directory / name).chmod(0o666)


@pytest.mark.parametrize("planted", [linked, named_twice, a_pipe, for_everyone])
@pytest.mark.parametrize("name", ["state", "lock", "record", "record.new"])
def test_files_that_somebody_put_there_are_not_used(tmp_path, planted, name):
    """Nor is what they lead to changed."""
    victim, directory = tmp_path / "victim", tmp_path / "state"
    victim.write_bytes(b"precious " * 2000)
    directory.mkdir(mode=0o700)
    kind, _, suffix = name.partition(".")
    planted(directory, f"{kind}-00000-of-00001" + (f".{suffix}" if suffix else ""))
    if suffix:  # it is replaced, not followed
        run(directory, 1)
    else:
        with pytest.raises(OSError, match=r"a link|second name|is not a file|can be written by others"):
            run(directory, 1)
    assert victim.read_bytes() == b"precious " * 2000


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o703])
def test_a_folder_that_others_may_write_is_refused(tmp_path, mode):
    directory = tmp_path / "shared"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(OSError, match=rf"shared can be written by others \(mode {mode:o}\): chmod go-w"):
        run(directory, 1)
    assert os.listdir(directory) == []


def test_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(OSError, match=f"belongs to user {user}, and this process runs as user {user + 1}"):
        run(tmp_path, 1)


def test_what_is_made_is_the_users_alone(tmp_path):
    before = os.umask(0)
    try:
        run(tmp_path / "state", 1)
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in [tmp_path / "state", *(tmp_path / "state").iterdir()]}
    assert modes.pop("state") == 0o700
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize("lost", ["removed", "emptied", "zeroed", "cut short"])
def test_a_lost_record_truncates_nothing(tmp_path, lost):
    run(tmp_path, 2)
    record, state = tmp_path / "record-00000-of-00001", tmp_path / "state-00000-of-00001"
    before = state.read_bytes()
    if lost == "removed":
        record.unlink()
    elif lost == "emptied":
        os.truncate(record, 0)
    elif lost == "zeroed":
        record.write_bytes(bytes(record.stat().st_size))
    else:
        os.truncate(record, record.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"its record .* is lost|is damaged: it has areas"):
        run(tmp_path, 3)
    assert state.read_bytes() == before


def test_a_record_that_is_not_whole_is_said(tmp_path):
    run(tmp_path, 3)
    record = tmp_path / "record-00000-of-00001"
    content = bytearray(record.read_bytes())
    half = len(content) // 2
    newest = max((0, half), key=lambda area: int.from_bytes(content[area + 16 : area + 24], "little"))
    content[newest + 60] ^= 1
    record.write_bytes(content)
    opt = memopt.create(nn.Linear(8, 8), "adamw@disk", directory=tmp_path)
    with pytest.warns(UserWarning, match=r"has stepped 2 times, by the record before one that is not whole"):
        opt.init_state()
    opt.close()
