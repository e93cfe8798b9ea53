"""A directory that cannot be used, is somebody else's, is full, damaged or gone: it is said before it does harm."""

import errno
import os

import pytest
from torch import nn

import memopt
from tests.helpers.cases import assert_same_bits, odd_model
from tests.placements.test_placements import assert_same, drive


def test_two_processes_cannot_have_one_directory(tmp_path):
    opt = memopt.create(odd_model(), "adamw@disk", directory=tmp_path)
    with pytest.raises(RuntimeError, match="is in use by another optimizer of this process"):
        memopt.create(odd_model(), "adamw@disk", directory=tmp_path)
    (tmp_path / "said").write_text("nothing")
    if not (child := os.fork()):
        try:
            memopt.create(nn.Linear(2, 2), "adamw@disk", directory=tmp_path)
        except RuntimeError as error:
            (tmp_path / "said").write_text(str(error))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert f"is in use by process {os.getpid()}" in (tmp_path / "said").read_text()
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
    real, left = os.posix_fallocate, 80_000

    def fallocate(descriptor, offset, nbytes):
        nonlocal left
        left -= nbytes
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor, offset, nbytes)

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


def test_damage_is_found_before_anything_is_used(tmp_path):
    model = odd_model()
    opt = memopt.create(model, "adamw@disk", directory=tmp_path)
    drive(model, opt, 0, 2)
    entry = opt.placement_stores.of("wide.weight").entries["wide.weight"]
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
