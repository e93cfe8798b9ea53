"""DeepSpeed's universal checkpoint as it is written: what is in it, and what cannot be. Engines load it in
``test_import_zero.py``."""

import pytest
import torch

import memopt
from tests.helpers.folders import LR, model, train


def test_what_has_no_gradient_yet_has_zeros(run, tmp_path):
    """As in DeepSpeed, which steps all of a flat group."""
    module = model()
    opt = memopt.create(module, "adamw", lr=LR)
    module[2].weight.requires_grad_(False)
    train(module, opt, 0, 1)
    module[2].weight.requires_grad_(True)
    memopt.save(tmp_path / "ours", model=module, optimizer=opt)
    assert run("convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "deepspeed")[0] == 0
    folder = tmp_path / "theirs" / "global_step1" / "zero" / "2.weight"
    assert torch.equal(torch.load(folder / "fp32.pt")["param"], module[2].weight)
    assert not torch.load(folder / "exp_avg_sq.pt")["param"].any()
    train(module, opt, 1, 1)
    memopt.save(tmp_path / "ours", model=module, optimizer=opt)
    code, _, err = run("convert", str(tmp_path / "ours"), str(tmp_path / "more"), "--to", "deepspeed")
    assert code == 2
    assert "DeepSpeed counts the steps of all parameters together, and these differ (2.weight 1, 1.bias 2)" in err
    assert not (tmp_path / "more").exists()
    arguments = ["convert", str(tmp_path / "ours"), str(tmp_path / "more"), "--to", "deepspeed", "--fill", "step=2"]
    assert run(*arguments)[0] == 0
    assert torch.load(tmp_path / "more" / "global_step2" / "zero" / "2.weight" / "step.pt") == 2


@pytest.mark.parametrize(
    ("spec", "hyper", "message"),
    [
        ("lion", {}, "are of adam and adamw without amsgrad; this is lion"),
        ("adamw", {"amsgrad": True}, "this is adamw with amsgrad"),
        ("adamw", {}, "does not have the weight 0.weight"),
    ],
)
def test_what_a_universal_checkpoint_cannot_hold_is_refused(run, tmp_path, spec, hyper, message):
    opt = memopt.create(model(), spec, **hyper)
    opt.init_state()
    memopt.save(tmp_path / "ours", optimizer=opt)
    code, _, err = run("convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "deepspeed", "--dry-run")
    assert code == 2
    assert message in err


def test_an_export_that_fails_leaves_nothing(tmp_path, run, monkeypatch):
    from memopt.checkpoint.exporters import deepspeed

    module = model()
    opt = memopt.create(module, "adamw")
    opt.init_state()
    memopt.save(tmp_path / "ours", model=module, optimizer=opt)
    whole, left = deepspeed.save_durably, [6]

    def full(content, path):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device", str(path))
        whole(content, path)

    monkeypatch.setattr(deepspeed, "save_durably", full)
    code, _, err = run("convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "deepspeed")
    assert code == 2
    assert "theirs could not be written (No space left on device); nothing was changed" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]
