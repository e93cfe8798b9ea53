"""What does not fit, or cannot be saved, is said before anything is changed."""

import json

import pytest
import torch

import memopt
from memopt.checkpoint.io import manifest
from memopt.checkpoint.io.safetensors_write import write_file
from memopt.checkpoint.tensorfile import spec_of
from tests.helpers.cases import assert_same_bits, odd_model, train
from tests.helpers.saved import build, names


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("saved")
    model, opt = build("adamw-8bit", {})
    train(model, opt, 0, 1)
    return memopt.save(path, model=model, optimizer=opt).path, model, opt


def test_a_manifest_of_another_schema_says_so(saved, tmp_path):
    path, _, _ = saved
    body = json.loads((path / "manifest.json").read_text())
    del body["sha256"]
    (tmp_path / "manifest.json").write_bytes(manifest.dump({**body, "schema": "memopt.checkpoint/9"}))
    with pytest.raises(ValueError, match="this version of memopt reads"):
        memopt.load(tmp_path)


def test_second_moments_in_the_code_of_an_earlier_version_are_refused(saved, tmp_path):
    path, _, _ = saved
    body = json.loads((path / "manifest.json").read_text())
    assert body.pop("schema") == "memopt.checkpoint/3"
    del body["sha256"]
    for number in (1, 2):
        text = manifest.dump({"schema": f"memopt.checkpoint/{number}", **body})
        (tmp_path / "manifest.json").write_bytes(text)
        with pytest.raises(ValueError, match="another code then: convert it to 32bit"):
            memopt.load(tmp_path)


def test_a_state_dict_in_the_code_of_an_earlier_version_is_refused(saved):
    _, _, opt = saved
    before = opt.state_dict()
    ours = {key: value for key, value in before["memopt"].items() if key != "codes"}
    with pytest.raises(ValueError, match="another code in the version that wrote it"):
        opt.load_state_dict({**before, "memopt": ours})


def test_state_of_a_version_that_kept_narrow_rows_in_32_bits_is_read():
    narrow = torch.nn.Parameter(torch.randn(515, 9))
    plain = memopt.create([narrow], "adamw-8bit", overrides={"*": "32bit"})
    narrow.grad = torch.randn(515, 9)
    plain.step()
    before = memopt.create([narrow], "adamw-8bit").state_dict()
    saved = {**before, "state": plain.state_dict()["state"]}
    opt = memopt.create([narrow], "adamw-8bit")
    with pytest.warns(UserWarning, match="exp_avg"):
        opt.load_state_dict(saved)
    assert opt.state[narrow]["exp_avg.codes"].shape == (515, 9)
    narrow.grad = torch.randn(515, 9)
    opt.step()


def test_a_checkpoint_that_cut_narrow_rows_one_by_one_is_read(tmp_path):
    """Two ranks of /zero1 in the schema before: 257 and 258 rows, where the cut is at a block of 28 today."""
    narrow = torch.nn.Parameter(torch.randn(515, 9))
    opt = memopt.create([("narrow", narrow)], "adamw/zero1")
    narrow.grad = torch.randn(515, 9)
    opt.step()
    path = memopt.save(tmp_path, optimizer=opt, rng=False).path
    body = json.loads((path / "manifest.json").read_text())
    del body["sha256"]
    body |= {"schema": "memopt.checkpoint/1", "world_size": 2, "files": {}}
    body["optimizer"]["world_size"] = 2
    (path / "state-00000-of-00001.safetensors").unlink()
    for rank, rows in enumerate((slice(0, 257), slice(257, 515))):
        parts = {f"narrow/{key}": opt.state[narrow][key][rows].clone() for key in ("exp_avg", "exp_avg_sq")}
        name = f"state-0000{rank}-of-00002.safetensors"
        info = write_file(path / name, {key: spec_of(x) for key, x in parts.items()}, parts.items())
        body["files"][name] = info._asdict()
    (path / "manifest.json").write_bytes(manifest.dump(body))
    for spec in ("adamw/zero1", "adamw"):
        other = memopt.create([("narrow", narrow)], spec)
        memopt.load(path, optimizer=other)
        assert_same_bits(other.state[narrow]["exp_avg"], opt.state[narrow]["exp_avg"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"model": torch.nn.Linear(2, 2)}, "'vector'"),
        (lambda: {"optimizer": memopt.create(torch.nn.Linear(2, 2), "adamw")}, "has no parameter 'weight'"),
        (lambda: {"optimizer": memopt.create(list(torch.nn.Linear(2, 2).parameters()), "adamw")}, "here there are 2"),
        (lambda: {"scheduler": object()}, "holds no scheduler"),
        (lambda: {"optimizer": memopt.create(odd_model(), "came")}, "came"),
        (lambda: {"model": odd_model(torch.bfloat16)}, "was saved"),
    ],
)
def test_what_does_not_fit_is_said(saved, change, message):
    with pytest.raises(ValueError, match=message):
        memopt.load(saved[0], **change())


def test_other_groups_are_refused_unless_they_are_to_be_kept(saved):
    model = odd_model()
    names = dict(model.named_parameters())
    groups = [{"params": [("vector", names.pop("vector"))], "lr": 0.5}, {"params": list(names.items())}]
    opt = memopt.create(groups, "adamw-8bit")
    with pytest.raises(ValueError, match="param groups differ"):
        memopt.load(saved[0], optimizer=opt)
    memopt.load(saved[0], optimizer=opt, hyper=False)
    assert opt.param_groups[0]["lr"] == 0.5
    assert_same_bits(opt.state[model.vector]["exp_avg.codes"], saved[2].state[saved[1].vector]["exp_avg.codes"])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"extra": {"f": print}}, r"extra\['f'\] is a builtin_function_or_method"),
        ({"keep": 0}, "keep=0 is not allowed"),
    ],
)
def test_what_cannot_be_saved_is_said(keywords, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        memopt.save(tmp_path, **keywords)
    assert names(tmp_path) == []


def test_a_state_dict_of_another_spec_names_what_converts_it():
    model, opt = build("adamw-8bit", {})
    train(model, opt, 0, 1)
    _, other = build("adamw", {"on_mismatch": "refuse"})
    with pytest.raises(ValueError, match=r"saved by 'adamw-8bit', this is 'adamw': .* opt.convert_\('adamw'\), or"):
        other.load_state_dict(opt.state_dict())
    theirs = torch.optim.SGD(model.parameters(), momentum=0.9)
    theirs.step()
    with pytest.raises(ValueError, match=r"memopt.load\(state_dict, optimizer=...\) reads and converts"):
        other.load_state_dict({**other.state_dict(), "state": theirs.state_dict()["state"], "memopt": {}})
