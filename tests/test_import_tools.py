"""State of the real tools: read, continued, and given back to them."""

import pytest
import torch
from torch import nn

import memopt
from memopt.checkpoint import export, source_of

#: Exact formats: other order of operations only; a hundredth of a step.
EXACT = 1e-5
#: Mean distance after five steps in other codes, as a share of the rate (measured: 0.021, 0.052 and 0.32).
MEAN_DISTANCE = {"8bit": 0.04, "fp8": 0.1, "4bit": 0.5}
LR = 1e-3


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 80))


def drive(module, opt, first, steps):
    for step in range(first, first + steps):
        g = torch.Generator().manual_seed(step)
        for p in module.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        opt.step()


def torch_tool(name, **keywords):
    return lambda params: getattr(torch.optim, name)(params, **keywords)


def bnb_tool(name, **keywords):
    def build(params):
        bnb = pytest.importorskip("bitsandbytes")
        return getattr(bnb.optim, name)(params, **keywords)

    return build


def torchao_tool(name):
    def build(params):
        module = pytest.importorskip("torchao.optim")
        return getattr(module, name)(params, lr=LR, weight_decay=0.1)

    return build


def transformers_tool(**keywords):
    def build(params):
        return pytest.importorskip("transformers.optimization").Adafactor(params, **keywords)

    return build


#: id -> (what builds the tool, our spec, rule= where it must be said, hyperparameters and fields of ours)
EXACT_TOOLS = {
    "torch.Adam": (torch_tool("Adam", lr=LR, weight_decay=0.1), "adam", None, {}),
    "torch.AdamW": (torch_tool("AdamW", lr=LR, amsgrad=True), "adamw", None, {"amsgrad": True}),
    "torch.RAdam": (torch_tool("RAdam", lr=LR), "radam", None, {}),
    "torch.SGD": (torch_tool("SGD", lr=LR, momentum=0.9), "sgd", None, {"momentum": 0.9}),
    "torch.RMSprop": (
        torch_tool("RMSprop", lr=LR, centered=True, momentum=0.9), "rmsprop", None, {"centered": True, "momentum": 0.9},
    ),
    "torch.Adafactor": (torch_tool("Adafactor", lr=1e-2), "adafactor", None, {}),
    "transformers.Adafactor": (transformers_tool(), "adafactor", None, {"convention": "transformers"}),
    "transformers.Adafactor beta1": (
        transformers_tool(beta1=0.9, lr=LR, relative_step=False), "adafactor", None,
        {"convention": "transformers", "beta1": 0.9, "lr": LR},
    ),
    "bnb.AdamW32bit": (bnb_tool("AdamW32bit", lr=LR), "adamw", None, {}),
    "bnb.AdamW8bit": (bnb_tool("AdamW8bit", lr=LR), "adamw-8bit", None, {"engine": "bitsandbytes"}),
    "bnb.Lion8bit": (bnb_tool("Lion8bit", lr=LR), "lion-8bit", "lion", {"engine": "bitsandbytes"}),
    "bnb.SGD8bit": (
        bnb_tool("SGD8bit", lr=LR, momentum=0.9), "sgd-8bit", "sgd", {"engine": "bitsandbytes", "momentum": 0.9},
    ),
    "bnb.RMSprop8bit": (bnb_tool("RMSprop8bit", lr=LR), "rmsprop-8bit", "rmsprop", {"engine": "bitsandbytes"}),
}  # fmt: skip

#: Their codes to our codes, or to fp32: id -> (tool, spec, rule)
LOSSY_TOOLS = {
    "bnb.AdamW8bit": (bnb_tool("AdamW8bit", lr=LR), "adamw-8bit", None),
    "torchao.AdamW8bit": (torchao_tool("AdamW8bit"), "adamw-8bit", "adamw"),
    "torchao.AdamW4bit": (torchao_tool("AdamW4bit"), "adamw-4bit", "adamw"),
    "torchao.AdamWFp8": (torchao_tool("AdamWFp8"), "adamw-fp8", "adamw"),
    "torch.AdamW": (torch_tool("AdamW", lr=LR), "adamw-8bit", None),
}


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    """torchao compiles its step; the plain function computes the same."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


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
    pairs = zip(theirs_model.parameters(), ours_model.parameters(), strict=True)
    return torch.cat([(a - b).detach().abs().flatten() for a, b in pairs]) / LR


@pytest.mark.parametrize("name", EXACT_TOOLS)
def test_going_on_is_going_on_in_the_tool(name, tmp_path):
    build, spec, rule, keywords = EXACT_TOOLS[name]
    assert continued(build, spec, rule, keywords, tmp_path).max() < EXACT / LR


@pytest.mark.parametrize("name", LOSSY_TOOLS)
def test_low_bit_state_goes_on_within_its_codes(name, tmp_path):
    build, spec, rule = LOSSY_TOOLS[name]
    distance = continued(build, spec, rule, {}, tmp_path)
    assert distance.mean() < MEAN_DISTANCE[memopt.parse(spec).format]


@pytest.mark.parametrize(
    ("spec", "keywords", "build"),
    [
        ("adamw-8bit", {}, torch_tool("AdamW", lr=LR)),
        ("adam-bf16", {}, torch_tool("Adam", lr=LR)),
        ("radam", {}, torch_tool("RAdam", lr=LR)),
        ("sgd-8bit", {"momentum": 0.9}, torch_tool("SGD", lr=LR, momentum=0.9)),
        ("rmsprop-fp8", {}, torch_tool("RMSprop", lr=LR)),
        ("adafactor", {}, torch_tool("Adafactor", lr=LR)),
    ],
)
def test_exported_state_loads_into_torch(spec, keywords, build):
    a, b = model(), model()
    ours = memopt.create(a, spec, lr=LR, **keywords)
    drive(a, ours, 0, 5)
    b.load_state_dict(a.state_dict())
    theirs = build(b.parameters())
    theirs.load_state_dict(export(source_of(ours), "torch"))
    exact = memopt.parse(spec).format if spec != "adafactor" else "factored"
    ours.convert_(memopt.parse(spec).replace(format="factored" if exact == "factored" else "32bit", hyper=keywords))
    drive(a, ours, 5, 5)
    drive(b, theirs, 5, 5)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=EXACT)


@pytest.mark.parametrize("tool", ["bitsandbytes", "bitsandbytes-32bit"])
def test_exported_state_loads_into_bitsandbytes(tool):
    bnb = pytest.importorskip("bitsandbytes")
    a, b = model(), model()
    ours = memopt.create(a, "adamw-8bit", lr=LR)
    drive(a, ours, 0, 5)
    b.load_state_dict(a.state_dict())
    theirs = (bnb.optim.AdamW8bit if tool == "bitsandbytes" else bnb.optim.AdamW32bit)(b.parameters())
    theirs.load_state_dict(export(source_of(ours), tool))
    ours.convert_("adamw-8bit" if tool == "bitsandbytes" else "adamw", engine="bitsandbytes")
    drive(a, ours, 5, 5)
    drive(b, theirs, 5, 5)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_exported_state_loads_into_transformers(beta1):
    hyper = {"beta1": beta1, "lr": LR, "relative_step": False}
    a, b = model(), model()
    ours = memopt.create(a, "adafactor", convention="transformers", **hyper)
    drive(a, ours, 0, 5)
    b.load_state_dict(a.state_dict())
    theirs = transformers_tool(**hyper)(b.parameters())
    theirs.load_state_dict(export(source_of(ours), "transformers"))
    drive(a, ours, 5, 5)
    drive(b, theirs, 5, 5)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=EXACT)
    with pytest.raises(ValueError, match=r"torch.optim has no adafactor with these hyperparameters"):
        export(source_of(ours), "torch")


def test_exported_state_loads_into_torchao():
    a, b = model(), model()
    ours = memopt.create(a, "adamw-8bit", lr=LR, weight_decay=0.1)
    drive(a, ours, 0, 5)
    b.load_state_dict(a.state_dict())
    theirs = torchao_tool("AdamW8bit")(b.parameters())
    theirs.load_state_dict(export(source_of(ours), "torchao"))
    assert type(theirs.state[b[0].weight]["exp_avg"]).__name__ == "OptimState8bit"
    assert type(theirs.state[b[0].bias]["exp_avg"]) is torch.Tensor
    again = memopt.create(b, "adamw", lr=LR)
    memopt.load(theirs.state_dict(), optimizer=again, rule="adamw")
    ours.convert_("adamw-8bit", engine="bitsandbytes")  # the same code
    ours.convert_("adamw", engine="native")
    assert again.param_groups[0]["weight_decay"] == 0.1
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        for key, value in ours.state[p].items():
            assert torch.equal(value, again.state[q][key]), key
    drive(b, theirs, 5, 5)
    drive(a, ours, 5, 5)
    distance = torch.cat(
        [(p - q).detach().abs().flatten() for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    )
    assert distance.mean() / LR < MEAN_DISTANCE["8bit"]


def test_a_bigger_file_of_torchao_is_decoded_in_pieces():
    pytest.importorskip("torchao.optim")
    from memopt.checkpoint.codes import CHUNK_NUMEL

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
    from memopt.checkpoint.dynamic import code_book

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


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_pickles_are_not_executed(tmp_path):
    torch.save({"state": Evil(), "param_groups": []}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="without executing"):
        memopt.load(tmp_path / "evil.pt", optimizer=memopt.create(model(), "adamw"))
