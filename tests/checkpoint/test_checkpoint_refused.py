"""What does not fit, or cannot be saved, is said before anything is changed."""

import json

import pytest
import torch

import memopt
from memopt.checkpoint.io import manifest
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
