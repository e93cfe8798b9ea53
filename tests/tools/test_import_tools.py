"""State of the real tools: read, and continued."""

import pytest
import torch
from torch import nn

import memopt
from tests.helpers.tools import (
    EXACT,
    LR,
    MEAN_DISTANCE,
    bnb_tool,
    distance,
    drive,
    model,
    torch_tool,
    torchao_tool,
    transformers_tool,
)

pytestmark = pytest.mark.usefixtures("uncompiled")

#: Before torch 2.7 a state_dict of AdamW is that of Adam.
SILENT = "decoupled_weight_decay" not in torch.optim.Adam([torch.zeros(1)]).defaults or None

#: id -> (what builds the tool, our spec, rule= where it must be said, hyperparameters and fields of ours)
EXACT_TOOLS = {
    "torch.Adam": (torch_tool("Adam", lr=LR, weight_decay=0.1), "adam", SILENT and "adam", {}),
    "torch.AdamW": (torch_tool("AdamW", lr=LR, amsgrad=True), "adamw", SILENT and "adamw", {"amsgrad": True}),
    "torch.RAdam": (torch_tool("RAdam", lr=LR), "radam", None, {}),
    "torch.SGD": (torch_tool("SGD", lr=LR, momentum=0.9), "sgd", None, {"momentum": 0.9}),
    "torch.RMSprop": (
        torch_tool("RMSprop", lr=LR, centered=True, momentum=0.9),
        "rmsprop",
        None,
        {"centered": True, "momentum": 0.9},
    ),
    "torch.Adafactor": (torch_tool("Adafactor", lr=1e-2), "adafactor", None, {"convention": "torch"}),
    "transformers.Adafactor": (transformers_tool(), "adafactor", None, {"convention": "transformers"}),
    "transformers.Adafactor beta1": (
        transformers_tool(beta1=0.9, lr=LR, relative_step=False),
        "adafactor",
        None,
        {"convention": "transformers", "beta1": 0.9, "lr": LR},
    ),
    "bnb.AdamW32bit": (bnb_tool("AdamW32bit", lr=LR), "adamw", None, {}),
    "bnb.AdamW8bit": (bnb_tool("AdamW8bit", lr=LR), "adamw-8bit", None, {"engine": "bitsandbytes"}),
    "bnb.Lion8bit": (bnb_tool("Lion8bit", lr=LR), "lion-8bit", "lion", {"engine": "bitsandbytes"}),
    "bnb.SGD8bit": (
        bnb_tool("SGD8bit", lr=LR, momentum=0.9),
        "sgd-8bit",
        "sgd",
        {"engine": "bitsandbytes", "momentum": 0.9},
    ),
    "bnb.RMSprop8bit": (bnb_tool("RMSprop8bit", lr=LR), "rmsprop-8bit", "rmsprop", {"engine": "bitsandbytes"}),
}

#: Their codes to our codes, or to fp32: id -> (tool, spec, rule)
LOSSY_TOOLS = {
    "bnb.AdamW8bit": (bnb_tool("AdamW8bit", lr=LR), "adamw-8bit", None),
    "torchao.AdamW8bit": (torchao_tool("AdamW8bit"), "adamw-8bit", "adamw"),
    "torchao.AdamW4bit": (torchao_tool("AdamW4bit"), "adamw-4bit", "adamw"),
    "torchao.AdamWFp8": (torchao_tool("AdamWFp8"), "adamw-fp8", "adamw"),
    "torch.AdamW": (torch_tool("AdamW", lr=LR), "adamw-8bit", SILENT and "adamw"),
}


def continued(build, spec, rule, keywords, tmp_path):
    """The distance of parameters, as a share of the rate, between going on in the tool and going on in ours."""
    theirs_model, ours_model = model(), model()
    theirs = build(theirs_model.parameters())
    drive(theirs_model, theirs, 0, 5)
    torch.save({"optimizer": theirs.state_dict()}, tmp_path / "theirs.pt")
    ours_model.load_state_dict(theirs_model.state_dict())
    ours = memopt.create(ours_model, spec, **keywords)
    memopt.load(tmp_path / "theirs.pt", optimizer=ours, rule=rule)
    drive(theirs_model, theirs, 5, 5)
    drive(ours_model, ours, 5, 5)
    return distance(theirs_model, ours_model)


@pytest.mark.parametrize("name", EXACT_TOOLS)
def test_going_on_is_going_on_in_the_tool(name, tmp_path):
    build, spec, rule, keywords = EXACT_TOOLS[name]
    assert continued(build, spec, rule, keywords, tmp_path).max() < EXACT / LR


@pytest.mark.parametrize("name", LOSSY_TOOLS)
def test_low_bit_state_goes_on_within_its_codes(name, tmp_path):
    build, spec, rule = LOSSY_TOOLS[name]
    assert continued(build, spec, rule, {}, tmp_path).mean() < MEAN_DISTANCE[memopt.parse(spec).format]


def test_a_bigger_file_of_torchao_is_decoded_in_pieces():
    pytest.importorskip("torchao.optim")
    from memopt.checkpoint.state.moment_codes import CHUNK_NUMEL

    for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8"):
        p = nn.Parameter(torch.randn(CHUNK_NUMEL // 512 + 3, 1024))
        theirs = torchao_tool(name)([p])
        p.grad = torch.randn_like(p)
        theirs.step()
        ours = memopt.create([p], "adamw")
        memopt.load(theirs.state_dict(), optimizer=ours, rule="adamw")
        for moment in ("exp_avg", "exp_avg_sq"):
            exact = theirs.state[p][moment].dequantize()
            assert torch.equal(ours.state[p][moment], exact), (name, moment)


def test_the_code_book_is_bitsandbytes_own():
    functional = pytest.importorskip("bitsandbytes.functional")
    from memopt.formats.foreign.bitsandbytes import code_book

    for signed in (True, False):
        assert torch.equal(code_book(signed), functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize(
    ("content", "rule", "message"),
    [
        ({"state": {}}, None, "lacks 'state' or 'param_groups'"),
        ({"state": {0: {"wheel": torch.ones(1)}}, "param_groups": [{"params": [0]}]}, None, "not known here"),
        (torch.ones(3), None, "holds a Tensor"),
    ],
)
def test_what_is_not_known_is_said(content, rule, message, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        memopt.load(tmp_path / "x.pt", optimizer=memopt.create(model(), "adamw"), rule=rule)


def test_an_ambiguous_rule_must_be_said():
    pytest.importorskip("bitsandbytes")
    m = model()
    theirs = bnb_tool("Lion8bit", lr=LR)(m.parameters())
    drive(m, theirs, 0, 1)
    with pytest.raises(ValueError, match="does not say which of lion, rmsprop, sgd it was"):
        memopt.load(theirs.state_dict(), optimizer=memopt.create(m, "lion-8bit"))
