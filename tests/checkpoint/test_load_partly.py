"""``memopt.load(..., strict=False)``: layers added and removed, rows more and fewer, and what is said of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memopt
from tests.helpers.cases import HYPER, assert_same_bits


class Net(nn.Module):
    def __init__(self, rows=80, extra=(), without=()):
        super().__init__()
        self.embed = nn.Embedding(rows, 64)
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 66)
        for name in extra:
            setattr(self, name, nn.Linear(64, 70))
        for name in without:
            delattr(self, name)


def trained(spec, steps=3, **keywords):
    torch.manual_seed(0)
    model = Net(**keywords).to(torch.bfloat16 if "+" in spec else torch.float32)
    opt = memopt.create(model, spec, lr=1e-2, **HYPER.get(memopt.parse(spec).rule, {}))
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        opt.step()
    return model, opt


SPECS = ["adamw-8bit", "adamw-4bit@disk", "adafactor", "lookahead(adamw)", "adamw-8bit+split", "came-8bit@paged", "sgd"]


@pytest.mark.parametrize("spec", SPECS)
def test_layers_and_rows(spec, tmp_path):
    old, opt = trained(spec)
    memopt.save(tmp_path, model=old, optimizer=opt)
    model, fresh = trained(spec, 1, rows=100, extra=["value"], without=["head"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError):
        memopt.load(tmp_path, model=model, optimizer=fresh)
    loaded = memopt.load(tmp_path, model=model, optimizer=fresh, strict=False)
    assert_same_bits(model.body.weight, old.body.weight)
    assert_same_bits(model.embed.weight[:80], old.embed.weight)
    assert_same_bits(model.embed.weight[80:], before["embed.weight"][80:])
    assert_same_bits(model.value.weight, before["value.weight"])
    assert not fresh.state.get(model.value.weight)
    for key, x in opt.state[old.body.weight].items():
        assert_same_bits(fresh.state[model.body.weight][key], x, key)
    for key, x in opt.state[old.embed.weight].items():
        now = fresh.state[model.embed.weight][key]
        if x.dim() and len(x) == 80:
            assert_same_bits(now[:80], x, key)
            assert torch.equal(
                now[80:].float(), model.embed.weight[80:].float() if key == "slow" else 0 * now[80:].float()
            )
    text = str(loaded)
    for words in (
        "model: 2 tensors as they were saved",
        "model: embed.weight has 100 rows, 80 were saved; as it is here: rows 80 to 99",
        "model: as it is here: value.weight, value.bias",
        "model: left: head.weight, head.bias",
        "state: embed.weight has 100 rows, 80 were saved; begins at zero: rows 80 to 99",
        "state: begins at zero: value.weight, value.bias",
    ):
        assert words in text, text
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    fresh.step()
    assert float(fresh.state[model.body.weight]["step"]) == 4
    assert float(fresh.state[model.value.weight]["step"]) == 1


def test_fewer_rows_another_spec_and_other_groups(tmp_path):
    old, opt = trained("adamw-8bit")
    opt.param_groups[0]["lr"] = 0.5
    memopt.save(tmp_path, model=old, optimizer=opt)
    torch.manual_seed(1)
    model = Net(rows=30)
    groups = [{"params": [("body.weight", model.body.weight), ("embed.weight", model.embed.weight)]}]
    groups.append({"params": [("new", nn.Parameter(torch.zeros(3)))], "lr": 0.25})
    fresh = memopt.create(groups, "adamw-4bit")
    loaded = memopt.load(tmp_path, model=model, optimizer=fresh, strict=False)
    assert [g["lr"] for g in fresh.param_groups] == [0.5, 0.25]
    assert "left: rows 30 to 79" in str(loaded)
    exact, coded = opt.state[old.embed.weight]["exp_avg.scales"], fresh.state[model.embed.weight]
    assert coded["exp_avg"].shape == (30, 64)  # too few elements to be coded
    assert torch.allclose(coded["exp_avg"].abs().amax(1), exact[:30, 0])


def test_what_is_refused(tmp_path):
    model, opt = trained("adamw")
    memopt.save(tmp_path, model=model, optimizer=opt)
    unnamed = memopt.create(list(Net().parameters()), "adamw")
    with pytest.raises(ValueError, match="by name, and the optimizer has numbers only"):
        memopt.load(tmp_path, optimizer=unnamed, strict=False)
    with pytest.raises(ValueError, match="bfloat16, and float32 was saved"):
        memopt.load(tmp_path, model=Net().bfloat16(), strict=False)
    theirs = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="numbers only"):
        memopt.load(theirs.state_dict(), optimizer=opt, rule="adamw", strict=False)
