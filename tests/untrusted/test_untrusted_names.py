"""Names in files are not paths, on reading and on writing; what is from a file is shown without control characters."""

import json
import os
import pickle
import shutil
import stat

import pytest
import torch

import memopt
from memopt.untrusted import Refused
from memopt.untrusted.names import component, label, within
from memopt.untrusted.opening import open_regular
from memopt.untrusted.text import printable, printable_lines, shown
from tests.helpers import hostile

PATHS = [
    "",
    ".",
    "..",
    "/etc/passwd",
    "../x",
    "a/b",
    "a\\b",
    "C:x",
    "a\nb",
    "a\0b",
    " a",
    "x\x1b[2J",
    "\u202ea",
    "x" * 300,
]


@pytest.mark.parametrize("path", [*PATHS, None, 3, b"a", ["a"]])
def test_a_component_of_a_path_is_no_path(path):
    with pytest.raises(Refused):
        component(path, "x")


def test_names_of_people_are_names():
    for name in ("layers.0.self_attn.q_proj.weight", "Gewicht_ä", "重み", "a b"):
        assert component(name, "x") == label(name, "x") == name


def links(folder):
    """name -> whether it may be followed, of links in ``folder``."""
    (folder / "own").mkdir()
    (folder / "own" / "file").write_text("x")
    os.symlink("own", folder / "inside")
    os.symlink(folder.parent, folder / "above")
    os.symlink("/etc/passwd", folder / "elsewhere")
    os.symlink("round", folder / "round")
    return {"inside": True, "above": False, "elsewhere": False, "round": False}


def test_links_that_lead_out_of_their_folder(tmp_path):
    for name, good in links(tmp_path).items():
        if good:
            assert within(tmp_path, name, "x") == tmp_path / name
        else:
            with pytest.raises(Refused, match="is a link that leads"):
                within(tmp_path, name, "x")


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    os.symlink("../../blobs/abc", snapshot / "config.json")
    assert within(snapshot, "config.json", "x").read_text() == "{}"


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/null", tmp_path):
        with pytest.raises(Refused, match=r"is (a pipe|a device|a folder), and a file is read"):
            open_regular(path)


@pytest.mark.parametrize(
    ("raw", "fit"),
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\r\nb", r"a\r\nb"),
        ("\u202etxt", r"\u202etxt"),
        ("\x9b31m", r"\x9b31m"),
        ("\ud800", r"\ud800"),
        ("größer 🙂", "größer 🙂"),
    ],
)
def test_text_for_a_terminal(raw, fit):
    assert printable(raw) == fit
    assert printable_lines(f"{raw[:0]}ours\n{fit}") == f"ours\n{fit}"
    assert printable(shown(raw)).isprintable()


# Every place where a file has a name --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    opt = memopt.create(model, "adamw")
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    return memopt.save(tmp_path_factory.mktemp("saved"), model=model, optimizer=opt).path


def renamed(mapping, new):
    old = next(iter(mapping))
    mapping[new] = mapping.pop(old)


MANIFEST = {
    "files": lambda body, name: renamed(body["files"], name),
    "parameters": lambda body, name: renamed(body["optimizer"]["parameters"], name),
    "groups": lambda body, name: body["optimizer"]["groups"][0]["parameters"].__setitem__(0, name),
    "tied": lambda body, name: body["model"]["tied"].update({name: "weight"}),
    "sharded": lambda body, name: body["model"]["sharded"].update({name: ["float32", [1]]}),
    "moments": lambda body, name: renamed(body["optimizer"]["parameters"]["weight"]["moments"], name),
}


@pytest.mark.parametrize("place", MANIFEST)
@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "\x1b[2Jx", "x\ny", ""])
def test_a_manifest(saved, tmp_path, run, place, name):
    copy = shutil.copytree(saved, tmp_path / "copy")
    hostile.resealed(copy, lambda body: MANIFEST[place](body, name))
    code, out, err = run("inspect", str(copy))
    harmless = place == "tied" and name.isprintable() and name  # a name of a tensor, which becomes no path
    assert code == (0 if harmless else 2)
    assert harmless or out == ""
    assert harmless or err.count("\n") == 1
    assert all(line.isprintable() for line in (out + err).split("\n"))


def deepspeed_folder(folder, name, latest="global_step1"):
    """A stage 3 checkpoint of one rank with one parameter of this name."""
    inside = folder / "global_step1"
    inside.mkdir(parents=True)
    group = {**torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0], "params": [0]}
    torch.save(
        {"param_shapes": [{name: torch.Size([4])}], "module": {name: torch.zeros(4)}},
        inside / "mp_rank_00_model_states.pt",
    )
    state = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}
    content = {
        "partition_count": 1,
        "fp32_flat_groups": [torch.ones(4)],
        "optimizer_state_dict": {"state": {0: state}, "param_groups": [group]},
    }
    torch.save({"optimizer_state_dict": content}, inside / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (folder / "latest").write_text(latest)
    return folder


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("to", ["deepspeed", "torch"])
def test_parameters_of_deepspeed(tmp_path, run, name, to):
    """The export makes a folder of each."""
    deepspeed_folder(tmp_path / "in", name)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run("convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", to)
    assert code == 2
    assert "has the name" in err or "has an empty name" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_parameters_of_ours_become_no_paths_of_deepspeeds(tmp_path, run):
    """The same from a checkpoint of ours, whose names stand in one file."""
    p = torch.nn.Parameter(torch.zeros(2))
    opt = memopt.create([("../../escaped", p)], "adamw")
    p.grad = torch.ones(2)
    opt.step()
    memopt.save(tmp_path / "in", optimizer=opt)
    code, _, err = run("convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "deepspeed")
    assert (code, "escaped" in err) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("latest", ["..", "/", "../in/global_step1", "a\x1b[0mb", "x" * 5000, "\n"])
def test_latest(tmp_path, run, latest):
    deepspeed_folder(tmp_path / "in", "w", latest)
    code, _, err = run("inspect", str(tmp_path / "in"))
    assert code == 2
    assert err.rstrip("\n").isprintable()


def test_files_of_a_folder_that_are_links(tmp_path, run):
    folder = deepspeed_folder(tmp_path / "in", "w")
    said = ("inspect", str(folder), "--from", "adamw")  # torch before 2.7 does not say it
    assert run(*said)[0] == 0
    file = next(folder.rglob("*optim_states.pt"))
    shutil.move(file, tmp_path / "elsewhere.pt")
    os.symlink(tmp_path / "elsewhere.pt", file)
    code, _, err = run(*said)
    assert (code, "is a link that leads out of its folder" in err) == (2, True)


def test_a_checkpoint_that_is_a_link(saved, tmp_path, run):
    os.symlink(saved, tmp_path / "00000001-step1")
    code, _, err = run("inspect", str(tmp_path))
    assert (code, "is a link that leads out of its folder" in err) == (2, True)
    assert run("inspect", str(tmp_path / "00000001-step1"))[0] == 0  # named by the user, it is what they mean


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/b", "", 3])
def test_an_index(tmp_path, run, name):
    hostile.safetensors_file(tmp_path / "x.safetensors", {}, b"")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    code, _, err = run("estimate", str(tmp_path / "in"))
    assert code == 2
    assert err.rstrip("\n").isprintable()


@pytest.mark.parametrize("name", ["../ds.json", "/etc/passwd", "a/b.json", "ds\n.json"])
def test_deepspeed_config_file(tmp_path, run, name):
    pytest.importorskip("yaml")
    (tmp_path / "ds.json").write_text("{}")
    (tmp_path / "in").mkdir()
    file = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": name}}
    (tmp_path / "in" / "accelerate.yaml").write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in file.items()))
    code, _, err = run("estimate", "8B", "--from", str(tmp_path / "in" / "accelerate.yaml"))
    assert (code, "which is not that of a file in its folder" in err or "printable" in err) == (2, True)


@pytest.mark.parametrize("file", ["../x", "/etc/passwd", "a/../../x", "x\x1b", ""])
def test_pieces_of_dcp(tmp_path, run, file):
    metadata = pytest.importorskip("torch.distributed.checkpoint.metadata")
    filesystem = pytest.importorskip("torch.distributed.checkpoint.filesystem")
    index = metadata.MetadataIndex("optimizer.state.w.step")
    content = metadata.Metadata(
        {"k": metadata.BytesStorageMetadata()}, {"k": ("optimizer",)}, {index: filesystem._StorageInfo(file, 0, 1)}
    )
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / ".metadata").write_bytes(pickle.dumps(content))
    (tmp_path / "x").write_text("x")
    code, _, err = run("inspect", str(tmp_path / "in"))
    assert (code, "has the name" in err or "has an empty name" in err) == (2, True)


@pytest.mark.parametrize("where", ["param_names", "state key", "params"])
def test_names_in_a_state_dict(tmp_path, run, where):
    evil = "\x1b]0;pwned\x07\x1b[2JEVIL"
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.full((2, 2), float("nan")), "exp_avg_sq": torch.ones(2, 2)}
    content = torch.optim.AdamW([torch.zeros(2, 2)]).state_dict()
    content["state"] = {0: moments}
    if where == "param_names":
        content["param_groups"][0]["param_names"] = [evil]
    elif where == "params":
        content["param_groups"][0]["params"], content["state"] = [evil], {evil: moments}
    else:
        moments[evil] = torch.ones(2, 2)
    torch.save(content, tmp_path / "x.pt")
    for command in (["inspect"], ["convert", "--to", "lion"], ["convert", "--to", "deepspeed"]):
        out = [] if command[0] == "inspect" else [str(tmp_path / "out")]
        code, said, err = run(command[0], str(tmp_path / "x.pt"), *out, *command[1:])
        assert code == 2
        assert all(line.isprintable() for line in (said + err).split("\n"))


def test_folders_that_are_pipes_do_not_wait(tmp_path, run):
    """One with the name of each file that is looked for."""
    for name in ("latest", ".metadata", "manifest.json", "config.json", "model.safetensors"):
        os.mkfifo(tmp_path / name)
        assert stat.S_ISFIFO((tmp_path / name).stat().st_mode)
        assert run("inspect", str(tmp_path))[0] == 2
        assert run("estimate", str(tmp_path))[0] == 2
        assert run("estimate", "--from", str(tmp_path / name))[0] == 2
        assert run("inspect", str(tmp_path / name))[0] == 2
