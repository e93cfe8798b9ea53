"""A manifest in which anything stands in any place, and files that are cut short: a sentence, soon."""

import itertools
import json
import shutil

import pytest
import torch

import memopt
from memopt.checkpoint.conversion import rewrite  # noqa: F401 - imported before times are taken
from memopt.cli import convert, estimate, inspect  # noqa: F401
from tests.helpers import hostile
from tests.helpers.bounded import at_once  # noqa: F401


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    opt = memopt.create(model, "adamw-8bit", master="none")
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    return memopt.save(tmp_path_factory.mktemp("saved"), model=model, optimizer=opt, extra={"a": 1}).path


def places(body, path=()):
    """Every place in a manifest."""
    if path:
        yield path
    if isinstance(body, (dict, list)):
        for key in body if isinstance(body, dict) else range(min(len(body), 2)):
            yield from places(body[key], (*path, key))


VALUES = [
    None,
    True,
    0,
    -1,
    1.5,
    2**70,
    10**400,
    float("inf"),
    "x",
    "\x1b[2J",
    [],
    [[]],
    {},
    {"$tensor": ["float32", [10**12], []]},
    {"$x": 1},
]


def test_every_place_of_a_manifest_with_every_value(saved, tmp_path, run):
    """A sentence, from inspect and load alike, or what it says is true. Never a trace (at each place one value)."""
    copy = shutil.copytree(saved, tmp_path / "copy")
    original = (copy / "manifest.json").read_bytes()
    body = json.loads(original)
    del body["sha256"]
    model = torch.nn.Linear(3, 2)
    opt = memopt.create(model, "adamw-8bit")
    refused = 0
    for i, path in enumerate(places(body)):
        for value in ("gone", VALUES[i % len(VALUES)]):

            def change(changed, path=path, value=value):
                *above, last = path
                for key in above:
                    changed = changed[key]
                if value == "gone":
                    del changed[last]
                else:
                    changed[last] = value

            (copy / "manifest.json").write_bytes(original)
            try:
                hostile.resealed(copy, change)
            except ValueError:  # not even JSON
                continue
            before = model.weight.clone()
            code, out, err = run("inspect", str(copy))
            assert all(line.isprintable() for line in (out + err).split("\n")), (path, value)
            try:
                memopt.load(copy, model=model, optimizer=opt)
            except ValueError:
                refused += 1
                assert torch.equal(model.weight, before)
            else:
                assert code == 0, (path, value, err)
    assert refused > 50


def test_a_world_of_no_ranks(saved, tmp_path, run):
    for where, world in itertools.product(("optimizer", None), (0, -1, True, 2, 10**9, 2**64)):
        copy = shutil.copytree(saved, tmp_path / f"{where}{world}")
        hostile.resealed(copy, lambda body, w=where, n=world: (body[w] if w else body).update(world_size=n))
        assert run("inspect", str(copy))[0] == 2
        with pytest.raises(ValueError, match="ranks"):
            memopt.load(copy, optimizer=memopt.create(torch.nn.Linear(3, 2), "adamw-8bit"))


def test_every_file_cut_short_or_with_a_bit_turned(saved, tmp_path, run):
    for name_, size in [(p.name, p.stat().st_size) for p in saved.iterdir()]:
        for at in {0, 1, 7, 8, 9, size // 3, size // 2, size - 1}:
            for how in ("cut", "turned"):
                shutil.rmtree(tmp_path / "copy", ignore_errors=True)
                copy = shutil.copytree(saved, tmp_path / "copy")
                content = bytearray((copy / name_).read_bytes())
                if how == "cut":
                    del content[at:]
                else:
                    content[at] ^= 0x10
                (copy / name_).write_bytes(content)
                code, _, err = run("inspect", str(copy))
                assert (code, str(copy) in err, err.count("\n")) == (2, True, 1), (name_, at, how)
