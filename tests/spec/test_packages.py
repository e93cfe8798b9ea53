"""What is distributed: the source distribution is whole, a wheel is tagged by what is in it, workflows are YAML."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github").rglob("*.yml"))


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / "CITATION.cff"], ids=lambda p: p.name)
def test_files_for_others_are_yaml(path):
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load(path.read_text())
    if path.parent.name == "workflows":
        assert all(job["steps"] and "runs-on" in job for job in found["jobs"].values())
        assert found["permissions"] == {"contents": "read"}


def test_the_citation_has_the_version():
    from memopt import __version__

    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Unpacked, as whoever downloads it has it."""
    folder = tmp_path_factory.mktemp("sdist")
    script = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (unpacked,) = [p for p in folder.iterdir() if p.is_dir()]
    return unpacked


@pytest.mark.slow
def test_the_source_distribution_is_whole(sdist):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git repository")
    elsewhere = (".ci/", ".github/", ".gitignore")
    wanted = {n for n in tracked.stdout.splitlines() if not n.startswith(elsewhere)}
    there = {p.relative_to(sdist).as_posix() for p in sdist.rglob("*") if p.is_file()}
    assert wanted - there == set()


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["", "off"])
def test_a_wheel_is_tagged_by_what_is_in_it(sdist, tmp_path, kernels):
    """With a compiler it holds the kernels and is for one platform, without one it is for all."""
    script = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    environment = {**os.environ, "MEMOPT_KERNELS": kernels}
    subprocess.run([sys.executable, "-c", script], cwd=sdist, check=True, capture_output=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "-py3-none-" in wheel.name
    assert wheel.name.endswith("-none-any.whl") == (kernels == "off")
    assert ("memopt/kernels/libmemopt_kernels.so" in names) == (kernels != "off")
    assert "memopt/py.typed" in names
    assert "memopt/kernels/src/step.cpp" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/"))]
