"""Rules chosen by parameter through what is priced, saved, loaded and converted."""

import copy
import pickle

import pytest
import torch

import memopt
from memopt.core.hyperparameters import SpecError
from tests.helpers.by_parameter import model, train, weights

SPECS = ["muon", "muon-8bit(lion-4bit)", "muon-8bit(adamw)@host", "muon-4bit+kahan@disk", "sinkgd-8bit@disk"]
SPECS += ["apollo-8bit@disk"]


@pytest.mark.parametrize("spec", SPECS)
def test_price_is_the_ledger(spec):
    net = model().bfloat16() if "+" in spec else model()
    opt = memopt.create(net, spec)
    opt.init_state()
    assert opt.ledger() == memopt.price(net, spec)


@pytest.mark.parametrize("spec", [*SPECS[:3], "sinkgd-8bit", "apollo-8bit", "apollomini"])
def test_a_state_dict_a_pickle_and_a_checkpoint_go_on(spec, tmp_path):
    net = model()
    opt = memopt.create(net, spec, lr=1e-2)
    train(net, opt, 0, 2)
    copies = [copy.deepcopy(net) for _ in range(3)]
    loaded = memopt.create(copies[0], spec)
    loaded.load_state_dict(opt.state_dict())
    if "host" not in spec:
        whole = pickle.loads(pickle.dumps((net, opt)))
        copies[1], pickled = whole
    else:
        pickled = memopt.create(copies[1], spec)
        pickled.load_state_dict(opt.state_dict())
    memopt.save(tmp_path / "checkpoint", model=net, optimizer=opt)
    resumed = memopt.create(copies[2], spec)
    memopt.load(tmp_path / "checkpoint", model=copies[2], optimizer=resumed)
    for one, other in zip((opt, loaded, pickled, resumed), (net, *copies), strict=True):
        assert [group["rule"] for group in one.param_groups] == [group["rule"] for group in opt.param_groups]
        train(other, one, 2, 2)
        assert torch.equal(weights(other), weights(net))


def test_another_format_is_a_conversion_and_a_load(tmp_path):
    net = model()
    opt = memopt.create(net, "muon", lr=1e-2)
    train(net, opt, 0, 2)
    memopt.save(tmp_path / "checkpoint", model=net, optimizer=opt)
    other = model()
    coded = memopt.create(other, "muon-8bit")
    memopt.load(tmp_path / "checkpoint", model=other, optimizer=coded)
    report = opt.convert_("muon-8bit")
    assert set(report.losses) == {"momentum_buffer", "exp_avg", "exp_avg_sq"}
    assert max(report.relative_error.values()) < 0.05
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert opt.state[p].keys() == coded.state[q].keys()
    assert opt.ledger() == memopt.price(net, "muon-8bit")


def test_from_adamw_and_back_with_a_stated_fill():
    net = model()
    opt = memopt.create(net, "adamw", lr=1e-2)
    train(net, opt, 0, 2)
    means = {p: opt.state[p]["exp_avg"].clone() for p in net.parameters()}
    first = opt.param_groups[0]
    with pytest.raises(SpecError, match="muon needs 'momentum_buffer'"):
        opt.convert_("muon")
    assert [id(group) for group in opt.param_groups] == [id(first)]
    assert len(first["params"]) == len(list(net.parameters()))
    opt.convert_("muon", fill={"momentum_buffer": "exp_avg"}, rules={"adamw": {"lr": 3e-3}})
    assert [group["rule"] for group in opt.param_groups] == ["muon", "adamw"]
    assert [group["lr"] for group in opt.param_groups] == [1e-2, 3e-3]
    assert opt.param_groups[0] is first
    for name, p, _ in opt.params.entries():
        kept = "momentum_buffer" if name in ("up.weight", "down.weight") else "exp_avg"
        assert torch.equal(opt.state[p][kept], means[p]), name
    train(net, opt, 2, 1)
    opt.convert_("adamw", fill={"exp_avg": "momentum_buffer", "exp_avg_sq": 1.0})
    assert not any("rule" in group for group in opt.param_groups)
    assert (opt.state[net.up.weight]["exp_avg_sq"] == 1).all()
    assert (opt.state[net.embed.weight]["exp_avg_sq"] != 1).all()  # it was AdamW's all the time
    train(net, opt, 3, 1)
    assert torch.isfinite(weights(net)).all()
