"""Every parameter in exactly one group, decay and rates where they belong."""

import pytest
import torch
from torch import nn

import memopt
from memopt.core.hyperparameters import SpecError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4)) for _ in range(3))
        self.norm = nn.GroupNorm(1, 4)
        self.head = nn.Linear(4, 10)
        self.tied = nn.Linear(4, 10, bias=False)
        self.tied.weight = self.embed.weight


def names(groups):
    return {name: g for g in groups for name, _ in g["params"]}


def test_decay_by_module_type_and_every_parameter_once():
    model = Net()
    groups = memopt.param_groups(model, 0.1, no_decay=["layers.2.0.weight"])
    where = names(groups)
    assert sorted(where) == sorted(n for n, _ in model.named_parameters())
    assert sum(len(g["params"]) for g in groups) == len(where)
    decayed = {n for n, g in where.items() if g["weight_decay"] == 0.1}
    assert decayed == {"layers.0.0.weight", "layers.1.0.weight", "head.weight"}
    opt = memopt.create(groups, "adamw-8bit", lr=1e-3)
    assert opt.param_groups[0]["lr"] == 1e-3


def test_frozen_parameters_are_in_no_group():
    model = Net()
    model.embed.weight.requires_grad_(False)
    assert "embed.weight" not in names(memopt.param_groups(model, 0.1))


def test_rates_by_layer_and_by_name():
    where = names(memopt.param_groups(Net(), 0.0, lr=1.0, layerwise_decay=0.5, rates={"head.*": 3.0}))
    assert where["head.weight"]["lr"] == 3.0
    assert where["norm.weight"]["lr"] == 1.0
    assert [where[f"layers.{i}.0.weight"]["lr"] for i in range(3)] == [0.125, 0.25, 0.5]
    assert where["embed.weight"]["lr"] == 0.0625


def test_describe_says_who_is_where():
    opt = memopt.create(memopt.param_groups(Net(), 0.1, rates={"head.*": 0.5}), "adamw")
    text = memopt.describe(opt)
    assert len(text.splitlines()) == len(opt.param_groups)
    assert "weight_decay=0.1, " in text.replace("lr=0.001, ", "")
    assert "head.weight" in text
    assert "as all" in memopt.describe(memopt.create([torch.ones(2, requires_grad=True)], "adamw"))


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"no_decay": ["nothing.*"]}, r"'nothing.\*' matches no parameter; the names are embed.weight"),
        ({"rates": {"hed.*": 1.0}}, r"'hed.\*' matches no parameter"),
        ({"rates": {"head.*": 1.0, "*.weight": 2.0}}, r"head.weight matches 'head.\*' and '\*.weight'"),
        ({"rates": {"head.*": -1.0}}, r"rates\['head.\*'\]=-1.0"),
        ({"layerwise_decay": 0.9}, "layerwise_decay needs lr"),
        ({"layerwise_decay": 1.5, "lr": 1.0}, "layerwise_decay=1.5"),
        ({"lr": float("nan")}, "lr=nan"),
    ],
)
def test_bad_input(keywords, words):
    with pytest.raises(SpecError, match=words):
        memopt.param_groups(Net(), 0.1, **keywords)


def test_layerwise_decay_needs_numbered_layers():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)

    with pytest.raises(SpecError, match="needs numbered layers"):
        memopt.param_groups(Flat(), 0.1, lr=1.0, layerwise_decay=0.9)
