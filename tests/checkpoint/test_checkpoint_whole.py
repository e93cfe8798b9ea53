"""A checkpoint is whole or not there: kills, full disks, damage. Each is said in a sentence that names the file."""

import errno
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import memopt
from tests.helpers.saved import build, names

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import checkpoint_sweep

from memopt.checkpoint import DamagedFile, exporting
from memopt.checkpoint.io import checkpoint_dir
from memopt.checkpoint.tensorfile import TensorFile

pytestmark = pytest.mark.usefixtures("impatient_disk")

#: The full sweeps are run by hand: benchmarks/checkpoint_sweep.py.
KILLS, EXPORT_KILLS, FLIPS, FULL = 20, 10, 100, 10


@pytest.mark.parametrize("victim", ["model.safetensors", "state-00000-of-00001.safetensors"])
def test_a_file_that_the_disk_does_not_take_in_the_end_is_named(tmp_path, monkeypatch, victim):
    """Errors of a disk often come with the fsync, when the next file is being written already."""
    model, opt = build("adamw", {})
    opt.init_state()
    memopt.save(tmp_path, model=model, optimizer=opt)

    def broken(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith(victim):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=rf"{victim} could not be written \(Input/output error\)"):
        memopt.save(tmp_path, model=model, optimizer=opt)
    assert names(tmp_path) == ["00000001-step0"]


def test_what_went_wrong_in_the_background_is_raised_at_the_next_save(tmp_path, monkeypatch):
    _, opt = build("adamw", {})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["memopt.checkpoint.saving"], "write_file", full)
        saving = memopt.save(tmp_path, optimizer=opt, asynchronous=True)
        saving._thread.join()
    with pytest.raises(OSError, match="No space left"):
        memopt.save(tmp_path, optimizer=opt)
    assert names(tmp_path) == []


def test_flipped_bits_and_lost_bytes_are_named(tmp_path):
    assert sum(checkpoint_sweep.damage_sweep(tmp_path, FLIPS).values()) == FLIPS


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}',
        b'{"a": {"dtype": "F32", "shape": [99999999999], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
    ],
)
def test_headers_that_cannot_be_true_are_refused(header, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(DamagedFile, match=r"x\.safetensors is not a safetensors file"):
        TensorFile(path)


def test_a_process_killed_while_it_saves_leaves_a_whole_checkpoint(tmp_path):
    assert sum(checkpoint_sweep.kill_sweep(tmp_path, KILLS)["outcomes"].values()) == KILLS


def test_a_process_killed_while_it_exports_leaves_whole_exports(tmp_path):
    assert sum(checkpoint_sweep.kill_exports(tmp_path, EXPORT_KILLS)["outcomes"].values()) == EXPORT_KILLS


def test_a_full_disk_is_said_and_the_old_checkpoint_stays(tmp_path):
    assert sum(checkpoint_sweep.full_sweep(tmp_path, FULL).values()) == FULL


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 4 MiB, where this process may mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield tmp_path
    gc.collect()  # what is mapped keeps the file system busy
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_real_disk_that_is_full_is_said_and_the_old_checkpoint_stays(small_disk):
    model = torch.nn.Linear(256, 256)  # 772 KiB with its state, in two files
    opt = memopt.create(model, "adamw")
    opt.init_state()
    checkpoint_dir, ballast = small_disk / "run", small_disk / "ballast"
    memopt.save(checkpoint_dir, model=model, optimizer=opt, extra={"step": 1}, keep=1)
    room = shutil.disk_usage(small_disk).free
    refused = set()
    for left in range(0, 760 * 1024, 40 * 1024):
        ballast.write_bytes(b"x" * (room - left))
        with pytest.raises(OSError, match="No space left on device") as error:
            memopt.save(checkpoint_dir, model=model, optimizer=opt, extra={"step": 2}, keep=1)
        refused.add(str(error.value).partition(" could not be written")[0].rpartition("/")[2])
        assert memopt.load(checkpoint_dir, model=model, optimizer=opt).extra == {"step": 1}
        assert names(checkpoint_dir) == ["00000001-step0"]
    assert {"model.safetensors", "state-00000-of-00001.safetensors"} <= refused
    ballast.unlink()
    memopt.save(checkpoint_dir, model=model, optimizer=opt, extra={"step": 2}, keep=1)
    assert memopt.load(checkpoint_dir, model=model, optimizer=opt).extra == {"step": 2}


def test_what_a_killed_save_left_is_swept_up(tmp_path):
    (tmp_path / (checkpoint_dir.WRITING + "00000001-step9")).mkdir()
    (tmp_path / (checkpoint_dir.REMOVING + "00000000-step1")).mkdir()
    memopt.save(tmp_path)
    assert names(tmp_path) == ["00000001-step0"]


@pytest.mark.parametrize("tool", ["torch", "dcp", "deepspeed", "torchao-4bit"])
def test_an_export_that_finds_the_disk_full_is_said_and_leaves_nothing(
    small_disk, tmp_path_factory, run, tool, monkeypatch
):
    """Here the disk fills up while it is written: the look at what is free, which comes before, sees nothing."""
    monkeypatch.setattr(exporting, "refuse_too_much", lambda *arguments, **keywords: None)
    if tool == "torchao-4bit":
        pytest.importorskip("torchao")
    model = torch.nn.Linear(256, 256)
    opt = memopt.create(model, "adamw")
    opt.init_state()
    ours = tmp_path_factory.mktemp("ours")
    memopt.save(ours, model=model, optimizer=opt)
    ballast, room = small_disk / "ballast", shutil.disk_usage(small_disk).free
    for left in range(0, 1200 * 1024, 100 * 1024) if tool != "torchao-4bit" else range(0, 120 * 1024, 40 * 1024):
        ballast.write_bytes(b"x" * (room - left))
        code, _, err = run("convert", str(ours), str(small_disk / "theirs"), "--to", tool)
        if code == 0:  # there was room for it, and for what waits beside it
            assert left > 600 * 1024
            subprocess.run(["rm", "-r", str(small_disk / "theirs")], check=True)  # a file or a folder
            continue
        assert code == 2, err
        assert "theirs could not be written (No space left on device); nothing was changed" in err, err
        assert "\n" not in err.strip(), err
        assert [path.name for path in small_disk.iterdir()] == ["ballast"]
