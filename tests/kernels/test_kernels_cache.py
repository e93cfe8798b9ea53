"""The cache of compiled kernels loads what this user compiled, and nothing that somebody put there."""

import hashlib
import os
import shutil
import tempfile

import pytest

from memopt.kernels import build, loader
from memopt.kernels.build import BuildError


def compiled(directory, extra=()):
    """In the place of the compiler, which takes a minute."""
    path = build.Path(directory) / build.NAME
    path.write_bytes(b"a library")
    return path


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "build", compiled)
    monkeypatch.setattr(build, "fingerprint", lambda: "f")
    root = tmp_path / "cache"
    monkeypatch.setenv("MEMOPT_CACHE", str(root))
    return root


def test_what_was_compiled_is_found_again_and_is_the_users_alone(cache, monkeypatch):
    path = build.cached()
    monkeypatch.setattr(build, "build", None)
    assert build.cached() == path
    assert hashlib.sha256(b"a library").hexdigest() in path.name
    assert [p.stat().st_mode & 0o777 for p in (cache, path.parent, path)] == [0o700] * 3
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    os.close(build.verified(path))


def other_content(path):
    path.write_bytes(b"another library")


def writable(path):
    path.chmod(0o722)


def a_link(path):
    shutil.move(path, path.parent.parent / "elsewhere")
    os.symlink(path.parent.parent / "elsewhere", path)


def a_second_name(path):
    os.link(path, path.parent.parent / "second")


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("change", [other_content, writable, a_link, a_second_name, a_pipe])
def test_a_library_that_somebody_changed_is_not_loaded(cache, change):
    path = build.cached()
    change(path)
    with pytest.raises(BuildError, match="is not loaded"):
        build.verified(path)
    if change is not a_pipe:
        path.unlink()
        assert build.cached().read_bytes() == b"a library"  # compiled anew


def test_one_planted_under_the_old_name_is_not_looked_at(cache):
    (cache / "f").mkdir(parents=True, mode=0o700)
    cache.chmod(0o700)
    (cache / "f" / build.NAME).write_bytes(b"planted")
    assert build.cached().read_bytes() == b"a library"


@pytest.mark.parametrize("where", ["root", "inside"])
def test_a_cache_that_others_may_write_is_refused(cache, where):
    build.cached()
    (cache if where == "root" else cache / "f").chmod(0o777)
    with pytest.raises(BuildError, match=r"can be written by others .*MEMOPT_CACHE"):
        build.cached()


def test_a_library_of_somebody_else_is_not_loaded(cache, monkeypatch):
    path = build.cached()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(BuildError, match=f"belongs to user {user}"):
        build.verified(path)


def test_why_there_are_no_kernels_is_said(cache, monkeypatch):
    monkeypatch.setattr(loader, "INSTALLED", cache / "none")
    build.cached()
    cache.chmod(0o777)
    found = loader._load()
    assert isinstance(found, loader.Missing)
    assert "can be written by others" in found.reason


@pytest.mark.parametrize("home", ["/proc/none", "~"])
def test_without_a_home_there_is_a_folder_of_the_users_own(cache, monkeypatch, tmp_path, home):
    monkeypatch.delenv("MEMOPT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: home)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    root = build.cache_root()
    assert root == tmp_path / f"memopt-{os.getuid()}"
    assert root.stat().st_mode & 0o777 == 0o700
    root.chmod(0o777)  # as if another had been there first
    private = build.cache_root()
    assert private not in (root, tmp_path)
    assert private.stat().st_mode & 0o777 == 0o700


def test_a_long_compilation_shows_that_it_lives(monkeypatch, capsys):
    import time

    from memopt.kernels import build

    monkeypatch.setattr(build, "HEARTBEAT", 0.01)
    with build._said_to_live():
        time.sleep(0.1)
    assert "memopt: still compiling, 0 s" in capsys.readouterr().err
