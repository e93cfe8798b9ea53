"""memopt.save and memopt.load on meshes of two dimensions: HSDP's replicas, tensor parallelism's rows and columns."""

import json
from pathlib import Path

import pytest

from memopt.checkpoint import DamagedFile
from memopt.checkpoint.io import manifest
from tests.helpers import sharded
from tests.helpers.cases import assert_same_bits
from tests.helpers.meshes import STEPS, Meshed, alone, loaded
from tests.helpers.sharded_runs import WORLD, of_checkpoints, session


def folder(name):
    return Path(session(of_checkpoints)[0]["mesh"]["path"]) / name


@pytest.mark.parametrize("name", ["meshed", "swapped", "alone", "hsdp"])
def test_a_mesh_saves_and_loads_to_the_bit(name):
    if name == "hsdp":
        model, opt = sharded.build("adamw-8bit", overrides=sharded.CUT_WITHIN)
        sharded.drive(model, opt, 0, 2 * STEPS)
    else:
        model, _ = alone(2 * STEPS)
    for rank in session(of_checkpoints):
        for (parameter, p), a in zip(model.named_parameters(), rank["mesh"][name], strict=True):
            assert_same_bits(a, p, parameter)


@pytest.mark.parametrize("name", ["meshed", "hsdp"])
def test_one_process_loads_what_a_mesh_saved(name):
    built = sharded.build("adamw-8bit", overrides=sharded.CUT_WITHIN) if name == "hsdp" else alone(0)
    for p, a in zip(built[0].parameters(), loaded(folder(name), built), strict=True):
        assert_same_bits(a, p)
    for p, a in zip(built[0].parameters(), session(of_checkpoints)[0]["mesh"][name], strict=True):
        assert_same_bits(a, p)


def test_replicas_are_written_once():
    """By bytes: all ranks' files together are one process's, and the ranks' random states."""
    one = sum(f.stat().st_size for f in folder("alone").rglob("state-*"))
    mesh = sum(f.stat().st_size for f in folder("meshed").rglob("state-*"))
    model = sum(p.numel() * 2 for n, p in Meshed().named_parameters() if n != "plain")
    assert one + model < mesh < one + model + WORLD * 16384


def test_slabs_that_cannot_be_are_not_believed(tmp_path):
    body = json.loads(next(folder("meshed").glob("*/manifest.json")).read_text())
    del body["sha256"]
    entry = body["optimizer"]["parameters"]["columns"]
    good = [list(slab) for slab in entry["slabs"]]
    for bad, reason in (
        ([], "are none"),
        ([[9, *good[0][1:]], *good[1:]], "are not of ranks"),
        ([[0, [0], [66]]], "have other dimensions"),
        ([[0, [0, 0], [66, 72]]], "reach beyond it"),
        (good[1:], "are no grid"),
        ([[0, [0, 0], [66, 36]], [1, [0, 35], [66, 36]]], "leave out or repeat"),
        ([*good, good[0]], "are no grid"),
    ):
        entry["slabs"] = bad
        there = tmp_path / "bad"
        there.mkdir(exist_ok=True)
        Path(there / "manifest.json").write_bytes(manifest.dump(body))
        with pytest.raises(DamagedFile, match=f"the slabs of columns {reason}"):
            manifest.read(there)
