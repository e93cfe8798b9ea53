"""State in a directory: it survives the process, whatever ends it; what can go wrong says so before it does harm."""

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
from cases import assert_same_bits, odd_model
from test_placements import assert_same, drive
from torch import nn

import memopt
from memopt.placements.arena import Arena
from memopt.placements.journal import Journal

SPECS = ["adamw", "adamw-8bit", "adafactor-32bit"]


def state_of(opt):
    return [{k: t.clone() for k, t in opt.state[p].items()} for g in opt.param_groups for p in g["params"]]


@pytest.mark.parametrize("spec", SPECS)
def test_a_new_optimizer_goes_on_where_the_last_one_stopped(tmp_path, spec):
    model = odd_model()
    opt = memopt.create(model, f"{spec}@disk", directory=tmp_path, workspace="1MiB")
    drive(model, opt, 0, 3)
    assert opt.ledger() == memopt.price(model, f"{spec}@disk", directory=tmp_path, workspace="1MiB")
    opt.close()
    again = memopt.create(model, f"{spec}@disk", directory=tmp_path)
    with pytest.warns(UserWarning, match=r"state of earlier steps is in .* has stepped 3 times"):
        drive(model, again, 3, 3)
    twin = odd_model()
    reference = memopt.create(twin, spec)
    drive(twin, reference, 0, 6)
    assert_same((model, again), (twin, reference))
    assert "committed after every step" in again.explain()


def test_the_directory_is_read_by_init_state_and_a_part_of_it_stays(tmp_path):
    """Parameters that have no gradient in the first step keep what the directory has of them."""
    model = odd_model()
    opt = memopt.create(model, "adamw@disk", directory=tmp_path)
    drive(model, opt, 0, 2)
    before = state_of(opt)
    opt.close()
    opt = memopt.create(model, "adamw@disk", directory=tmp_path)
    model.zero_grad()
    model.vector.grad = torch.ones_like(model.vector)
    with pytest.warns(UserWarning, match="state of earlier steps"):
        opt.step()
    opt.close()
    opt = memopt.create(model, "adamw@disk", directory=tmp_path)
    with pytest.warns(UserWarning, match="state of earlier steps"):
        opt.init_state()
    for p, old in zip(model.parameters(), before, strict=True):
        assert opt.state[p]["step"] == (3 if p is model.vector else 2)
        if p is not model.vector:
            assert_same_bits(opt.state[p]["exp_avg"], old["exp_avg"])


RUN = textwrap.dedent("""
    import os, sys, warnings
    warnings.simplefilter("ignore")
    import torch
    torch.set_num_threads(1)
    import memopt
    from cases import odd_model
    from test_placements import drive
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
    return subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)


def test_kill_in_mid_step_loses_at_most_that_step(tmp_path):
    """Killed with SIGKILL a few milliseconds into a step, again and again: the directory is the state before or after
    that step, bit for bit that of a run that nobody killed."""
    last, kills = 15, 3
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


def test_damage_is_found_before_anything_is_used(tmp_path):
    model = odd_model()
    opt = memopt.create(model, "adamw@disk", directory=tmp_path)
    drive(model, opt, 0, 2)
    entry = opt.homes.of("wide.weight").entries["wide.weight"]
    begin = entry.begins[entry.copy]
    opt.close()
    path = next(tmp_path.glob("state-*"))
    with open(path, "r+b") as file:
        file.seek(begin + 1000)
        byte = file.read(1)
        file.seek(begin + 1000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ValueError, match=r"state of wide\.weight .* is damaged \(exp_avg, bytes"):
        memopt.create(model, "adamw@disk", directory=tmp_path)
    os.truncate(path, 8192)
    with pytest.raises(ValueError, match="is cut short"):
        memopt.create(model, "adamw@disk", directory=tmp_path)


def test_two_processes_cannot_have_one_directory(tmp_path):
    opt = memopt.create(odd_model(), "adamw@disk", directory=tmp_path)
    with pytest.raises(RuntimeError, match="is in use by another optimizer of this process"):
        memopt.create(odd_model(), "adamw@disk", directory=tmp_path)
    code = f"import torch, memopt; memopt.create(torch.nn.Linear(2, 2), 'adamw@disk', directory={str(tmp_path)!r})"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert f"is in use by process {os.getpid()}" in there.stderr
    opt.close()
    memopt.create(odd_model(), "adamw@disk", directory=tmp_path).close()


def test_a_directory_of_something_else(tmp_path):
    opt = memopt.create(odd_model(), "adamw@disk", directory=tmp_path)
    opt.init_state()
    opt.close()
    with pytest.raises(ValueError, match=r"as 'adamw@disk' keeps it .*'adamw-8bit@disk' keeps"):
        memopt.create(odd_model(), "adamw-8bit@disk", directory=tmp_path)
    with pytest.raises(ValueError, match=r"holds the state of '.*', which is none of these parameters"):
        memopt.create(nn.Linear(2, 2), "adamw@disk", directory=tmp_path)
    (tmp_path / "record-00000-of-00001").rename(tmp_path / "record-00001-of-00002")
    with pytest.raises(RuntimeError, match="holds the state of 2 ranks, and there are 1 now"):
        memopt.create(odd_model(), "adamw@disk", directory=tmp_path)


def test_a_directory_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match=r"cannot be used as a directory for state"):
        memopt.create(odd_model(), "adamw@disk", directory=file / "below")
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(OSError, match="Permission denied"):
            memopt.create(odd_model(), "adamw@disk", directory=tmp_path / "below")


def test_read_only(tmp_path, monkeypatch):
    real = os.open

    def read_only(path, flags, *rest, **more):
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError, match=r"cannot be used as a directory for state \(Read-only file system\)"):
        memopt.create(odd_model(), "adamw@disk", directory=tmp_path)


@pytest.mark.parametrize(("spec", "named"), [("adamw@disk", True), ("adamw@disk", False), ("adamw@paged", False)])
def test_a_full_disk_is_found_before_the_first_step(tmp_path, monkeypatch, spec, named):
    """Nothing has changed, and when there is room it goes on."""
    model = odd_model()
    opt = memopt.create(model, spec, **({"directory": tmp_path} if named else {}))
    real, left = os.posix_fallocate, 10

    def fallocate(*args):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    before = [p.detach().clone() for p in model.parameters()]
    remedy = "give another directory=" if named else "set TMPDIR to a directory on a disk with room"
    with pytest.raises(OSError, match=rf"cannot reserve [0-9,]+ bytes in .*No space left.*{remedy}"):
        drive(model, opt, 0, 1)
    monkeypatch.undo()
    for p, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(p, old)
    assert not any(opt.state.values())
    drive(model, opt, 0, 2)
    twin = odd_model()
    reference = memopt.create(twin, "adamw")
    drive(twin, reference, 0, 2)
    assert_same((model, opt), (twin, reference))


@pytest.mark.parametrize("what", ["state-*", "record-*", "everything"])
def test_files_that_vanish_are_noticed_before_a_step_and_nothing_is_lost(tmp_path, what):
    import shutil

    model = odd_model()
    opt = memopt.create(model, "adamw@disk", directory=tmp_path / "d")
    drive(model, opt, 0, 2)
    if what == "everything":
        shutil.rmtree(tmp_path / "d")
    else:
        next((tmp_path / "d").glob(what)).unlink()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(OSError, match=r"is gone \(No such file or directory\).*othing was changed"):
        drive(model, opt, 2, 1)
    for p, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(p, old)
    opt.convert_("adamw")  # the state is still there
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


def test_without_direct_reads_it_is_the_same_and_says_so(tmp_path, monkeypatch):
    from memopt.placements import arena

    monkeypatch.setattr(arena, "_open_direct", lambda path: None)
    model, twin = odd_model(), odd_model()
    opt, reference = memopt.create(model, "adamw-4bit@disk", directory=tmp_path), memopt.create(twin, "adamw-4bit")
    drive(model, opt, 0, 5)
    drive(twin, reference, 0, 5)
    assert_same((model, opt), (twin, reference))
    assert "through the page cache" in opt.explain()


def test_room_is_given_back(tmp_path):
    """Loading, converting and moving away leave no more on the disk than the state takes."""
    model = odd_model()
    opt = memopt.create(model, "adamw@disk", directory=tmp_path)
    drive(model, opt, 0, 1)
    path = next(tmp_path.glob("state-*"))
    used = path.stat().st_blocks
    for _ in range(5):
        opt.load_state_dict(opt.state_dict())
    assert path.stat().st_blocks <= 1.2 * used
    opt.convert_("adamw-8bit@disk")
    drive(model, opt, 1, 1)
    assert path.stat().st_blocks < 0.6 * used
    opt.convert_("adamw-8bit")
    assert not path.exists()
    memopt.create(model, "adamw@disk", directory=tmp_path).init_state()  # and a later run does not find it


def test_a_state_dict_outlives_what_it_was_taken_from(tmp_path):
    model = odd_model()
    opt = memopt.create(model, "adamw@disk", directory=tmp_path)
    drive(model, opt, 0, 1)
    old = {k: t for k, t in opt.state[model.vector].items() if k != "step"}
    values = {k: t.clone() for k, t in old.items()}
    opt.load_state_dict(opt.state_dict())
    opt.convert_("lion@disk")
    drive(model, opt, 1, 1)
    for key, value in old.items():
        assert_same_bits(value, values[key], key)


def test_a_named_directory_is_not_copied(tmp_path):
    import copy

    opt = memopt.create(odd_model(), "adamw@disk", directory=tmp_path)
    with pytest.raises(TypeError, match="an optimizer with a directory cannot be pickled or copied"):
        copy.deepcopy(opt)


@pytest.mark.parametrize(
    ("spec", "options"), [("adamw@disk", {"workspace": "8MiB"}), ("adamw@paged", {"resident": "16MiB"})]
)
def test_memory_does_not_grow_with_the_state(spec, options):
    """A small version of benchmarks/offload.py: 128 MiB of state through a few."""
    import psutil

    params = [nn.Parameter(torch.randn(1024, 2048).bfloat16()) for _ in range(8)]
    for p in params:
        p.grad = torch.randn(p.shape).bfloat16()
    opt = memopt.create(params, spec, nonfinite="propagate", **options)
    process = psutil.Process()
    opt.step()
    before = process.memory_info().rss
    for _ in range(3):
        opt.step()
    assert opt.ledger().by("lifetime")["persistent"] > 128 * 2**20
    assert process.memory_info().rss - before < 8 * 2**20
    total = sum(float(s["exp_avg"].abs().sum()) for s in opt.state.values())  # reads all of it, as a checkpoint does
    assert total > 0
    opt.step()
    assert process.memory_info().rss - before < 24 * 2**20
