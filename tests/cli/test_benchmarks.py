"""Every result says where it comes from."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))


@pytest.fixture
def provenance(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import provenance

    return provenance


def test_no_script_writes_json_without_it():
    for script in BENCHMARKS.glob("*.py"):
        if script.name != "provenance.py":
            assert not re.search(r"write_text\(.*json|json\.dump\(", script.read_text()), script.name


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_committed_result_has_it(path):
    """``recorded_in`` stands in results of before the scripts wrote it: the commit that brought the figures."""
    found = json.loads(path.read_text())["provenance"]
    if "recorded_in" in found:
        assert re.fullmatch(r"[0-9a-f]{40}", found["recorded_in"])
    else:
        assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", found["commit"])
        assert found["command"].startswith("python benchmarks/")
        assert found["processor"]
        assert found["versions"]


def test_it_is_true(provenance, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "startup.py"), "--quick"])
    provenance.write_result(tmp_path / "made" / "x.json", {"ms": 3, "provenance": "of an earlier run"})
    found = json.loads((tmp_path / "made" / "x.json").read_text())
    assert found["ms"] == 3
    assert found["provenance"]["command"] == "python benchmarks/startup.py --quick"
    assert sys.modules["torch"].__version__.startswith(found["provenance"]["versions"]["torch"])
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=BENCHMARKS)
    except (OSError, subprocess.CalledProcessError):
        assert found["provenance"]["commit"] == "unknown"
    else:
        assert found["provenance"]["commit"].removesuffix("+changes") == head.stdout.strip()
    assert json.loads(flat(provenance, tmp_path))["rows"] == [[1, 2], [3, 4]]


def flat(provenance, folder):
    provenance.write_result(folder / "flat.json", {"rows": [[1, 2], [3, 4]]}, flat=True)
    return (folder / "flat.json").read_text()
