"""Saves in the background, and several runs at one folder: nothing is lost without a word, nothing is another's."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import memopt
from memopt.checkpoint import DamagedFile, background_save, opened
from memopt.checkpoint.io import lock
from memopt.checkpoint.opened import Checkpoint
from tests.helpers.cases import odd_model

pytestmark = pytest.mark.usefixtures("impatient_disk")

#: A process that begins to save and ends at once, in one of the ways there are; each is a fork with an end of its own.
ENDS = """
import os, signal, sys, threading, time, torch, memopt
from memopt.checkpoint import saving
torch.set_num_threads(1)
folder, ends = sys.argv[1], sys.argv[2:]
model = torch.nn.Linear(100, 100)
opt = memopt.create(model, "adamw")
opt.init_state()
memopt.save(os.path.join(folder, "before"), model=model, optimizer=opt)
for end in ends:
    if not (child := os.fork()):
        break
    os.waitpid(child, 0)
else:
    os._exit(0)
sys.stderr = open(os.path.join(folder, end + ".err"), "w")
write = saving.write_file
def slow(*arguments, **keywords):
    while threading.main_thread().is_alive() and end != "wait":
        time.sleep(0.001)
    if end == "full":
        raise OSError(28, "No space left on device")
    return write(*arguments, **keywords)
saving.write_file = slow
run = memopt.save(os.path.join(folder, end), model=model, optimizer=opt, asynchronous=True)
if end == "exit":
    sys.exit(3)
if end == "error":
    raise ValueError("of the script")
if end == "signal":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
    os.kill(os.getpid(), signal.SIGTERM)
if end == "ctrl-c":
    os.kill(os.getpid(), signal.SIGINT)
if end == "thread":
    threading.Thread(target=time.sleep, args=(0.05,)).start()
"""


@pytest.mark.parametrize(
    "ends",
    [
        ["end", "ctrl-c", "full"],
        pytest.param(["exit", "error", "signal", "thread"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_save_in_the_background_ends_before_the_process_does(tmp_path, ends):
    subprocess.run([sys.executable, "-c", ENDS, str(tmp_path), *ends], check=True, timeout=120)
    for end in ends:
        said = (tmp_path / f"{end}.err").read_text()
        if end == "full":
            assert f"memopt: the checkpoint {tmp_path / end}/00000001-step0 was not written: OSError" in said
            assert "No space left" in said
            assert [p.name for p in (tmp_path / end).iterdir()] == [lock.NAME]
        else:
            assert "was not written" not in said, end
            Checkpoint(tmp_path / end).close()


def test_what_was_said_at_the_end_is_not_said_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["memopt.checkpoint.saving"], "write_file", broken)
    monkeypatch.setattr(background_save, "_exiting", False)
    saving = memopt.save(tmp_path, model=torch.nn.Linear(2, 2), asynchronous=True)
    with pytest.raises(OSError, match="No space left"):
        saving.wait()
    background_save._after_threads()
    assert capsys.readouterr().err == ""
    background_save._RUNNING.clear()


def broken(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["save elsewhere", "load"])
def test_a_failure_in_the_background_is_raised_at_the_next_call(call, tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)
    memopt.save(tmp_path / "a", model=model)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["memopt.checkpoint.saving"], "write_file", broken)
        memopt.save(tmp_path / "a", model=model, asynchronous=True)._thread.join()
    calls = {"load": lambda: memopt.load(tmp_path / "a", model=model)}
    with pytest.raises(OSError, match="No space left"):
        calls.get(call, lambda: memopt.save(tmp_path / "b", model=model))()
    memopt.save(tmp_path / "b", model=model)


@pytest.mark.parametrize("spec", ["adamw", "adamw-8bit@disk", "adamw@paged"])
def test_what_is_saved_in_the_background_is_what_was_there(spec, tmp_path, monkeypatch):
    model = odd_model()
    opt = memopt.create(model, spec, lr=torch.tensor(0.5) if spec == "adamw" else 0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)

    def step():
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        opt.step()
        scheduler.step()

    step()
    memopt.save(tmp_path / "wanted", model=model, optimizer=opt, scheduler=scheduler, extra={"seen": [1]})
    extra = {"seen": [1]}
    changed, real = threading.Event(), sys.modules["memopt.checkpoint.saving"].write_file

    def late(*arguments, **keywords):
        assert changed.wait(60)
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["memopt.checkpoint.saving"], "write_file", late)
        rng = torch.get_rng_state()
        torch.set_rng_state(Checkpoint(tmp_path / "wanted").random_state(0)["torch"])
        saving = memopt.save(
            tmp_path / "found", model=model, optimizer=opt, scheduler=scheduler, extra=extra, asynchronous=True
        )
        torch.set_rng_state(rng)
        for _ in range(3):
            step()
        extra["seen"].append(2)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        changed.set()
        saving.wait()
    (wanted,), (found,) = ([*(tmp_path / name).glob("0*")] for name in ("wanted", "found"))
    for file in os.listdir(wanted):
        assert (wanted / file).read_bytes() == (found / file).read_bytes(), file


# Several runs ------------------------------------------------------------------------------------------------------

OTHER = """
import sys, torch, memopt
model = torch.nn.Linear(2, 2)
try:
    memopt.save(sys.argv[1], model=model)
    print("saved", flush=True)
except OSError as error:
    print(error, flush=True)
sys.stdin.read(1)
"""


def other_run(folder):
    command = [sys.executable, "-c", OTHER, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_second_run_at_a_folder_gets_a_sentence(tmp_path):
    with other_run(tmp_path) as first:
        assert first.stdout.readline() == "saved\n"
        model = torch.nn.Linear(2, 2)
        there = sorted(os.listdir(tmp_path))
        for saved in (lambda: memopt.save(tmp_path, model=model), lambda: memopt.save(tmp_path, model=model, keep=1)):
            with pytest.raises(OSError, match=rf"is written by another run \(process {first.pid} on .*a folder of its"):
                saved()
        assert sorted(os.listdir(tmp_path)) == there
        memopt.load(tmp_path, model=model)  # reading is free
        first.kill()
    memopt.save(tmp_path, model=model)


def test_a_folder_is_free_again_when_model_and_optimizer_are_gone(tmp_path):
    model = torch.nn.Linear(2, 2)
    opt = memopt.create(model, "adamw")
    memopt.save(tmp_path, optimizer=opt)
    assert tmp_path in lock._CLAIMS
    opt.close()
    assert tmp_path not in lock._CLAIMS
    memopt.save(tmp_path, model=model)
    del model, opt
    assert tmp_path not in lock._CLAIMS
    memopt.save(tmp_path, extra={"alone": 1})
    assert tmp_path not in lock._CLAIMS


def test_a_forked_child_does_not_keep_the_folder(tmp_path):
    model = torch.nn.Linear(2, 2)
    memopt.save(tmp_path, model=model)
    read, write = os.pipe()
    if not (child := os.fork()):
        os.write(write, b"x" if not lock._CLAIMS else b"y")
        os._exit(0)
    assert os.read(read, 1) == b"x"
    os.waitpid(child, 0)


def test_a_folder_that_was_removed_is_locked_anew(tmp_path):
    model = torch.nn.Linear(2, 2)
    memopt.save(tmp_path / "run", model=model)
    shutil.rmtree(tmp_path / "run")
    memopt.save(tmp_path / "run", model=model)
    with open(tmp_path / "run" / lock.NAME) as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run" / lock.NAME).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="no checkpoint can be begun there"):
        memopt.save(tmp_path / "run", model=torch.nn.Linear(2, 2))
    assert (tmp_path / "victim").read_text() == "precious"


def test_where_files_cannot_be_locked_it_is_said(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unknown)
    with pytest.warns(UserWarning, match="locks no files"):
        saved = memopt.save(tmp_path, model=torch.nn.Linear(2, 2))
    assert (saved.path / "manifest.json").is_file()


# Damage ------------------------------------------------------------------------------------------------------------


def spoil(path: Path):
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (path / "model.safetensors").write_bytes(data)


def test_with_a_damaged_newest_the_newest_whole_one_is_named(tmp_path):
    model = torch.nn.Linear(8, 8)
    paths = [memopt.save(tmp_path, model=model, keep=5).path for _ in range(4)]
    spoil(paths[3])
    (paths[2] / "manifest.json").unlink()
    with pytest.raises(
        DamagedFile, match=rf"is damaged between bytes .*the newest whole checkpoint there is {paths[1].name}"
    ):
        memopt.load(tmp_path, model=model)
    with pytest.raises(DamagedFile, match=r"00000003-step0/manifest.json is missing"):
        memopt.load(paths[2], model=model)
    memopt.load(paths[1], model=model)
    for path in paths[:2]:
        spoil(path)
    with pytest.raises(DamagedFile, match="no other checkpoint there is whole"):
        memopt.load(tmp_path, model=model)


def test_keep_counts_what_is_whole(tmp_path):
    model = torch.nn.Linear(8, 8)
    paths = [memopt.save(tmp_path, model=model, keep=3).path for _ in range(3)]
    spoil(paths[1])
    spoil(paths[2])
    with pytest.warns(UserWarning, match=rf"{paths[1].name} is damaged .*removed before any that is whole"):
        paths.append(memopt.save(tmp_path, model=model, keep=3).path)
    names = [p.name for p in (paths[0], paths[2], paths[3])]
    assert sorted(p.name for p in tmp_path.glob("0*")) == names
    with pytest.warns(UserWarning, match=rf"{paths[2].name} is damaged"):
        new = memopt.save(tmp_path, model=model, keep=2).path
    assert sorted(p.name for p in tmp_path.glob("0*")) == [paths[3].name, new.name]


def test_what_this_process_wrote_is_not_read_again(tmp_path, monkeypatch):
    model = torch.nn.Linear(8, 8)
    memopt.save(tmp_path, model=model, keep=2)
    monkeypatch.setattr(opened, "verify_file", broken)  # headers are looked at before a commit, bytes are not
    for _ in range(3):
        memopt.save(tmp_path, model=model, keep=2)
    assert len([*tmp_path.glob("0*")]) == 2
