"""State of flashoptim. Its kernels are for CUDA: here they run in Triton's interpreter, on tensors that say they are on
a card, and the rest of it is as it is."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import memopt
from memopt.checkpoint import export, source_of

flashoptim = pytest.importorskip("flashoptim")
LR = 1e-3
#: Mean distance after three steps in other codes, as a share of the rate (measured: 0.003 to 0.007).
MEAN_DISTANCE = 0.04
#: Relative error of one encoding: signed moments, second moments.
ENCODED = (0.01, 0.01)


@pytest.fixture
def card(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a card")
    import flashoptim.optimizers as theirs
    from triton import language as tl

    for kernel in (theirs._triton_quantize_kernel, theirs._triton_dequantize_kernel):
        monkeypatch.setattr(kernel, "configs", kernel.configs[-1:])  # nothing is to be tuned
    monkeypatch.setattr(theirs, "_get_sm_count", lambda *_: 4)
    monkeypatch.setattr(theirs.libdevice, "copysign", lambda x, y: tl.where(y < 0, -x, x))  # the interpreter has none

    @contextmanager
    def pretended():
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
            yield

    return pretended


def model(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(65, 24), nn.LayerNorm(24), nn.Linear(24, 20)).to(dtype)


def drive(module, opt, first, steps):
    for step in range(first, first + steps):
        g = torch.Generator().manual_seed(step)
        for p in module.parameters():
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        opt.step()


def trained(card, tmp_path, name, dtype, **keywords):
    """Their model, their optimizer after three steps, and the file."""
    module = model(dtype)
    bits = None if dtype == torch.float32 else keywords.pop("master_weight_bits", 24)
    with card():
        opt = getattr(flashoptim, name)(module.parameters(), lr=LR, fused=False, master_weight_bits=bits, **keywords)
        drive(module, opt, 0, 3)
        torch.save(opt.state_dict(), tmp_path / "theirs.pt")
    return module, opt, tmp_path / "theirs.pt"


TOOLS = [
    ("FlashAdamW", "adamw", torch.bfloat16, {"weight_decay": 0.1}),
    ("FlashAdamW", "adamw", torch.bfloat16, {"master_weight_bits": 32}),
    ("FlashAdamW", "adamw", torch.float16, {}),
    ("FlashAdam", "adam", torch.float32, {"weight_decay": 0.1}),
    ("FlashLion", "lion", torch.bfloat16, {"weight_decay": 0.1}),
    ("FlashSGD", "sgd", torch.float32, {"momentum": 0.9, "weight_decay": 0.1}),
    ("FlashAdamW", "adamw", torch.bfloat16, {"compress_state_dict": False}),
]


@pytest.mark.parametrize(("name", "rule", "dtype", "keywords"), TOOLS)
def test_state_and_weights_are_those_that_flashoptim_decodes(card, tmp_path, name, rule, dtype, keywords):
    theirs_model, theirs, path = trained(card, tmp_path, name, dtype, **keywords)
    module = model(dtype)
    module.load_state_dict(theirs_model.state_dict())
    hyper = {"momentum": 0.9, "nesterov": True} if rule == "sgd" else {}
    spec = memopt.OptimSpec(rule=rule, master="none" if dtype == torch.float32 else "fp32")
    ours = memopt.create(module, spec, **hyper)
    memopt.load(path, optimizer=ours, rule=rule)
    if rule == "sgd":
        assert ours.param_groups[0]["nesterov"] is True  # which flashoptim does not save
    for p, q in zip(module.parameters(), theirs_model.parameters(), strict=True):
        for moment, kept in theirs.state[q].items():
            if moment == "error_bits":
                with card():
                    exact = flashoptim.reconstruct_fp32_param(q.detach(), kept)
                assert not torch.equal(exact, q.float())
                weight = ours_weight(ours, p)
                torch.testing.assert_close(weight, exact, rtol=2e-7, atol=0)  # a bit of fp32
            elif moment != "step":
                with card():
                    exact = kept.materialize()
                torch.testing.assert_close(ours.state[p][moment], exact.float(), rtol=1e-6, atol=1e-30)
    with card():
        drive(theirs_model, theirs, 3, 3)
    if rule != "sgd":
        drive(module, ours, 3, 3)
        pairs = zip(module.parameters(), theirs_model.parameters(), strict=True)
        distance = torch.cat([(a.float() - b.float()).detach().abs().flatten() for a, b in pairs]) / LR
        assert distance.mean() < MEAN_DISTANCE


def ours_weight(optimizer, p):
    from memopt.masters import MASTERS

    master = MASTERS[optimizer.spec.master]
    return master.read(p.detach(), optimizer.state[p].get(master.key))


def test_what_it_does_not_save_must_be_said(card, tmp_path):
    _, _, path = trained(card, tmp_path, "FlashAdamW", torch.bfloat16)
    with pytest.raises(ValueError, match="does not say which of adamw, adam it was"):
        memopt.load(path, optimizer=memopt.create(model(torch.bfloat16), "adamw"))
    _, _, path = trained(card, tmp_path, "FlashSGDW", torch.float32, momentum=0.9, weight_decay=0.1)
    with pytest.raises(ValueError, match="does not say which of sgd, sgdw it was"):
        memopt.load(path, optimizer=memopt.create(model(torch.float32), "sgd", momentum=0.9))


def test_corrections_need_the_weights_beside_them(card, tmp_path, capsys):
    from memopt.cli import main

    _, _, path = trained(card, tmp_path, "FlashAdamW", torch.bfloat16)
    arguments = ["convert", str(path), str(tmp_path / "out"), "--from", "adamw", "--to"]
    assert main([*arguments, "adamw-8bit+split"]) == 2
    assert "beside its weights only" in capsys.readouterr().err
    assert main([*arguments, "adamw-8bit"]) == 0
    assert "correction: not kept by the new spec, dropped" in capsys.readouterr().out
    assert main(["inspect", str(path), "--from", "adamw"]) == 0
    numel = sum(p.numel() for p in model(torch.bfloat16).parameters())
    assert (
        f"exp_avg (flashoptim 8bit): {numel:,} elements in 6 tensors; bytes: codes {numel:,}" in capsys.readouterr().out
    )


EXPORTS = [
    ("FlashAdamW", "adamw-8bit+split", torch.bfloat16, 24, {"weight_decay": 0.1}),
    ("FlashAdamW", "adamw+split16", torch.bfloat16, 32, {}),
    ("FlashAdamW", "adamw-8bit+fp32", torch.float16, 32, {}),
    ("FlashAdamW", "adamw+kahan", torch.bfloat16, 32, {}),
    ("FlashAdam", "adam-4bit", torch.float32, None, {"weight_decay": 0.1}),
    ("FlashLion", "lion-8bit+split", torch.bfloat16, 24, {"weight_decay": 0.1}),
    ("FlashSGD", "sgd", torch.float32, None, {"momentum": 0.9, "weight_decay": 0.1}),
]


@pytest.mark.parametrize(("name", "spec", "dtype", "bits", "keywords"), EXPORTS)
def test_what_is_exported_for_flashoptim_goes_on_in_it(card, tmp_path, run, name, spec, dtype, bits, keywords):
    """Its own codes: loaded, decoded and stepped by flashoptim, read back with the same bits."""
    module, twin = model(dtype), model(dtype)
    ours = memopt.create(module, spec, lr=LR, **keywords)
    drive(module, ours, 0, 3)
    twin.load_state_dict(module.state_dict())
    memopt.save(tmp_path / "ours", model=module, optimizer=ours)
    code, out, _ = run("convert", str(tmp_path / "ours"), str(tmp_path / "theirs.pt"), "--to", "flashoptim")
    assert code == 0
    assert "tensors encoded anew, relative error" in out
    written = torch.load(tmp_path / "theirs.pt")  # weights_only
    full = memopt.parse(spec).replace(format="32bit", hyper=keywords)
    ours.convert_(full)
    with card():
        theirs = getattr(flashoptim, name)(twin.parameters(), lr=1.0, fused=False, master_weight_bits=bits, **keywords)
        theirs.load_state_dict(torch.load(tmp_path / "theirs.pt"))
        assert theirs.param_groups[0]["lr"] == LR
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            if bits is not None:
                weight = flashoptim.reconstruct_fp32_param(q.detach(), theirs.state[q]["error_bits"])
                unit = torch.finfo(dtype).eps / 2 / (126 if bits == 24 else 32766)
                torch.testing.assert_close(weight, ours_weight(ours, p), rtol=unit, atol=1e-8)
            for moment in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                if moment in theirs.state[q]:
                    x, exact = theirs.state[q][moment].materialize(), ours.state[p][moment]
                    assert (x - exact).norm() < ENCODED[moment == "exp_avg_sq"] * exact.norm(), moment
                    assert torch.equal(x != 0, exact != 0) or moment != "exp_avg_sq"
        for mine, again in zip(written["state"].values(), theirs.state_dict()["state"].values(), strict=True):
            assert mine.keys() == again.keys()
            for key, value in mine.items():
                assert value.dtype == again[key].dtype
                assert torch.equal(as_bytes(value), as_bytes(again[key])), key
        back = memopt.create(model(dtype), memopt.OptimSpec(rule=full.rule), **keywords)
        memopt.load(tmp_path / "theirs.pt", optimizer=back, rule=full.rule)
        for p, q in zip(back.param_groups[0]["params"], twin.parameters(), strict=True):
            for moment in back.state[p].keys() - {"step"}:
                decoded = theirs.state[q][moment].materialize()
                torch.testing.assert_close(back.state[p][moment], decoded, rtol=1e-6, atol=1e-30)
        drive(twin, theirs, 3, 3)
    drive(module, ours, 3, 3)
    pairs = zip(module.parameters(), twin.parameters(), strict=True)
    far = torch.cat([(a.float() - b.float()).detach().abs().flatten() for a, b in pairs]) / LR
    assert far.mean() < MEAN_DISTANCE


def as_bytes(x):
    """Bits of corrections under a float's name may spell NaN."""
    return x.reshape(-1).view(torch.uint8)


def test_scales_are_rounded_up_and_no_second_moment_is_lost():
    from memopt.core.rows import Rows
    from memopt.formats import Shard
    from memopt.formats.foreign.flashoptim import Companded
    from memopt.rules import Moment

    fmt, rows = Companded(32), Rows.whole((64, 32))
    for moment in (Moment("exp_avg"), Moment("exp_avg_sq", signed=False)):
        x = torch.rand(64, 32) * 10 ** torch.linspace(-14, 3, 64)[:, None]
        x = x if moment.signed else x.square()
        x[5] = 0
        parts = {
            part: torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for part, s in fmt.layout(moment, rows).items()
        }
        fmt.write(x, parts, moment, Shard(rows))
        top = (x if moment.signed else x.sqrt()).amax(-1)
        assert (parts["scales"].float() >= top).all()
        assert (parts["scales"].float() <= top * (1 + 2**-10) + 6e-8).all()
        y = fmt.read(parts, moment, Shard(rows))
        if not moment.signed:
            assert torch.equal(y != 0, x != 0)
        large = top > 1e-4
        assert (y - x)[large].norm() < 0.01 * x[large].norm()


@pytest.mark.parametrize(
    ("spec", "hyper", "message"),
    [
        ("adafactor", {}, "flashoptim has no adafactor; it has adam, adamw, lion, sgd"),
        ("adamw", {"amsgrad": True}, "neither amsgrad nor maximize"),
        ("sgd", {}, "no state of SGD without momentum"),
    ],
)
def test_what_flashoptim_cannot_hold_is_refused(spec, hyper, message):
    ours = memopt.create(model(torch.float32), spec, **hyper)
    with pytest.raises(ValueError, match=message):
        export(source_of(ours), "flashoptim")


def test_a_dtype_that_is_not_known_is_refused():
    from memopt.checkpoint.importers import read_state_dict

    module = model(torch.bfloat16)
    theirs = torch.optim.AdamW(module.parameters())
    drive(module, theirs, 0, 1)
    with pytest.raises(ValueError, match="does not say of which dtype the weight 0 is"):
        export(read_state_dict(theirs.state_dict(), "theirs"), "flashoptim")


def test_what_is_exported_for_torch_loads_into_flashoptim(card):
    module = model(torch.bfloat16)
    ours = memopt.create(module, "adamw-8bit", lr=LR)
    drive(module, ours, 0, 3)
    twin = model(torch.bfloat16)
    with card():
        theirs = flashoptim.FlashAdamW(twin.parameters(), lr=LR, fused=False)
        theirs.load_state_dict(export(source_of(ours), "torch"))
        states = [{k: v.materialize() for k, v in theirs.state[q].items() if k != "step"} for q in twin.parameters()]
    ours.convert_("adamw")
    for p, state in zip(module.parameters(), states, strict=True):
        for moment, x in state.items():
            exact = ours.state[p][moment]
            assert (x - exact).norm() < 0.02 * exact.norm()
