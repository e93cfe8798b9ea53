"""State given to the real tools, and continued in them."""

import pytest
import torch

import memopt
from memopt.checkpoint import export, source_of
from tests.helpers.tools import (
    EXACT,
    LR,
    MEAN_DISTANCE,
    distance,
    drive,
    model,
    torch_tool,
    torchao_tool,
    transformers_tool,
)

pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.mark.parametrize(
    ("spec", "keywords", "build"),
    [
        ("adamw-8bit", {}, torch_tool("AdamW", lr=LR)),
        ("adam-bf16", {}, torch_tool("Adam", lr=LR)),
        ("radam", {}, torch_tool("RAdam", lr=LR)),
        ("sgd-8bit", {"momentum": 0.9}, torch_tool("SGD", lr=LR, momentum=0.9)),
        ("rmsprop-fp8", {}, torch_tool("RMSprop", lr=LR)),
        ("adafactor", {"convention": "torch"}, torch_tool("Adafactor", lr=LR)),
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


#: what is exported -> its optimizer and its class of the moments
TORCHAO = {
    "torchao": ("AdamW8bit", "OptimState8bit"),
    "torchao-4bit": ("AdamW4bit", "OptimState4bit"),
    "torchao-fp8": ("AdamWFp8", "OptimStateFp8"),
}
#: What ``memopt inspect`` calls the codes.
INSPECTED = {"torchao": "dynamic8", "torchao-4bit": "torchao 4bit", "torchao-fp8": "torchao fp8"}
#: Relative error of one encoding of the test model's moments (measured: 0.011, 0.15 and 0.026; 0.006, 0.054 and 0.026).
ENCODED = {"torchao": (0.02, 0.01), "torchao-4bit": (0.2, 0.08), "torchao-fp8": (0.035, 0.035)}

#: Share of elements that stand in the middle between two codes, to the last bit (measured: 1 of half a million).
TIES = 1e-5


def encoded_by_torchao(kind, x, signed):
    """What torchao keeps of a tensor."""
    cls = getattr(pytest.importorskip(f"torchao.optim.subclass_{kind.removeprefix('OptimState').lower()}"), kind)
    own = cls.zeros(x.shape) if kind == "OptimStateFp8" else cls.zeros(x.shape, signed)
    return own.copy_(x)


def assert_same_codes(a, b):
    assert torch.equal(a.codes.view(torch.uint8), b.codes.view(torch.uint8))
    assert torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("tool", TORCHAO)
def test_exported_state_goes_on_in_torchao(tool, tmp_path, run):
    name, kind = TORCHAO[tool]
    a, b = model(), model()
    ours = memopt.create(a, "adamw", lr=LR, weight_decay=0.1)
    drive(a, ours, 0, 5)
    b.load_state_dict(a.state_dict())
    theirs = torchao_tool(name)(b.parameters())
    memopt.save(tmp_path / "ours", optimizer=ours)
    code, out, _ = run("convert", str(tmp_path / "ours"), str(tmp_path / "theirs.pt"), "--to", tool)
    assert code == 0
    assert f"adamw -> adamw of {tool}" in out
    assert "exp_avg_sq: 2 tensors encoded anew, relative error" in out
    code, out, _ = run("inspect", str(tmp_path / "theirs.pt"), "--from", "adamw")
    assert code == 0
    assert f"exp_avg ({INSPECTED[tool]}): 13,312 elements in 2 tensors" in out
    theirs.load_state_dict(torch.load(tmp_path / "theirs.pt"))  # weights_only
    assert type(theirs.state[b[0].bias]["exp_avg"]) is torch.Tensor
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        for moment, bound in zip(("exp_avg", "exp_avg_sq"), ENCODED[tool], strict=True):
            x, y = ours.state[p][moment], theirs.state[q][moment]
            if p.numel() < 4096:
                assert torch.equal(x, y)
                continue
            assert type(y).__name__ == kind
            assert_same_codes(y, encoded_by_torchao(kind, x, moment == "exp_avg"))
            assert (y.dequantize() - x).norm() < bound * x.norm()
    drive(a, ours, 5, 5)
    drive(b, theirs, 5, 5)
    fmt = {"torchao": "8bit", "torchao-4bit": "4bit", "torchao-fp8": "fp8"}[tool]
    assert distance(a, b).mean() < MEAN_DISTANCE[fmt]


@pytest.mark.parametrize("tool", TORCHAO)
def test_what_came_from_torchao_goes_back_bit_for_bit(tool):
    from memopt.checkpoint.importers import read_state_dict

    m = model()
    theirs = torchao_tool(TORCHAO[tool][0])(m.parameters())
    drive(m, theirs, 0, 2)
    back = export(read_state_dict(theirs.state_dict(), "theirs", "adamw"), tool)
    again = memopt.create(m, "adamw", lr=1.0)
    memopt.load(back, optimizer=again, rule="adamw")
    assert again.param_groups[0]["weight_decay"] == 0.1
    for p, state in zip(m.parameters(), back["state"].values(), strict=True):
        assert state["step"] == theirs.state[p]["step"]
        for moment in ("exp_avg", "exp_avg_sq"):
            mine, own = state[moment], theirs.state[p][moment]
            if p.numel() < 4096:
                assert torch.equal(mine, own)
            else:
                assert_same_codes(mine, own)
                assert torch.equal(again.state[p][moment], own.dequantize())


@pytest.mark.parametrize("tool", TORCHAO)
@pytest.mark.parametrize("shape", [(515, 1024), (128, 65), (65, 65), (300 * 1024,)])
def test_blocks_of_torchao_straddle_rows_and_pieces(tool, shape):
    """The first and the last are decoded in pieces; 128 and 65 rows of 65 have blocks across rows, and no whole number
    of blocks of 256, and none at all."""
    pytest.importorskip("torchao")
    from memopt.checkpoint.state.moment_codes import CHUNK_NUMEL

    assert CHUNK_NUMEL < 300 * 1024
    block, zeros = 128 if tool == "torchao-4bit" else 256, 256 if len(shape) == 1 else shape[1]
    p = torch.nn.Parameter(torch.zeros(shape))
    ours = memopt.create([p], "adamw", amsgrad=True)
    ours.init_state()
    for moment in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        x = ours.state[p][moment].normal_().mul_(10 ** torch.randn(shape[0], *[1] * (len(shape) - 1)))
        if moment != "exp_avg":
            x.abs_()
        x.view(-1)[:zeros] = 0  # blocks of zeros stay zeros, where torchao's codes of 4 bits have none
    for moment, mine in export(source_of(ours), tool)["state"][0].items():
        if moment == "step":
            continue
        x = ours.state[p][moment]
        if x.numel() % block:
            assert torch.equal(mine, x)
            continue
        assert mine.block_size == block
        own = encoded_by_torchao(TORCHAO[tool][1], x, moment == "exp_avg")
        a, b = (y.dequantize().view(-1) for y in (mine, own))
        assert (a[zeros:] != b[zeros:]).float().mean() < TIES, moment
        assert not a[: zeros - zeros % block].any()


def test_a_code_book_that_is_not_torchaos_is_said():
    m = model()
    theirs = torchao_tool("AdamW4bit")(m.parameters())
    drive(m, theirs, 0, 1)
    theirs.state[m[0].weight]["exp_avg"].qmap[3] += 0.1
    with pytest.raises(ValueError, match=r"exp_avg is not in the code book that torchao 0\.18 has for OptimState4bit"):
        memopt.load(theirs.state_dict(), optimizer=memopt.create(m, "adamw"), rule="adamw")


def test_the_command_line_names_every_tool(run):
    from memopt.checkpoint.exporting import TOOLS

    _, out, _ = run("convert", "--help")
    words = out.replace(",", " ").split()
    assert set(TOOLS) <= set(words)
    with pytest.raises(ValueError, match=r"state can be exported to torch, dcp, .*, not to 'tensorflow'"):
        export(source_of(memopt.create(model(), "adamw")), "tensorflow")
    with pytest.raises(ValueError, match="deepspeed has no state_dict of an optimizer: memopt convert IN OUT"):
        export(source_of(memopt.create(model(), "adamw")), "deepspeed")
