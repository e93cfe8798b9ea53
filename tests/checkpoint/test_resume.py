"""Save, load into a fresh process, continue: bit for bit as if never stopped, for every spec."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import memopt
from tests.helpers.cases import HYPER, PAIRS, VARIANTS, assert_same_bits, odd_model, sampled, train

BEFORE, AFTER = 3, 6
#: A quarter of the plain specs, and everything else that is there.
PLAIN = [(s, HYPER.get(memopt.parse(s).rule, {})) for s in sampled(8)[::3]]
SLOW = [case for i, case in enumerate(PLAIN) if i % 3]
CASES = PLAIN[::3] + VARIANTS + PAIRS + SLOW
QUICK = len(CASES) - len(SLOW)
CASE_IDS = [s + "".join(f" {k}={v}" for k, v in h.items()) for s, h in CASES]
EACH = [pytest.param(i, id=CASE_IDS[i], marks=[pytest.mark.slow] * (i >= QUICK)) for i in range(len(CASES))]


def checkpoint(directory: Path, i: int) -> Path:
    return directory / f"{i}.pt"


def build(i: int):
    spec, hyper = CASES[i]
    model = odd_model()
    return model, memopt.create(model, spec, lr=1e-2, **hyper) if "convention" not in hyper else memopt.create(
        model, spec, **hyper
    )


def resume_all(directory: Path) -> None:
    """The fresh process: load each checkpoint, continue, save what came out."""
    for i in sorted(int(path.stem) for path in directory.glob("*.pt")):
        model, opt = build(i)
        saved = torch.load(checkpoint(directory, i), weights_only=True)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        train(model, opt, BEFORE, AFTER)
        torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, directory / f"{i}.resumed.pt")


@pytest.fixture(scope="module")
def resumed(request, tmp_path_factory):
    """Checkpoints after BEFORE steps, and what a fresh process made of them: of the cases that are to run."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("resume")
    uninterrupted = {}
    asked = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    for i in sorted(params["i"] for params in asked if "i" in params):
        model, opt = build(i)
        train(model, opt, 0, BEFORE)
        torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, checkpoint(directory, i))
        train(model, opt, BEFORE, AFTER)
        uninterrupted[i] = model, opt
    code = "import sys, torch; torch.set_num_threads(1); from pathlib import Path; "
    code += "from tests.checkpoint import test_resume; test_resume.resume_all(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(directory)], check=True, cwd=Path(__file__).parents[2], timeout=600)
    return directory, uninterrupted


@pytest.mark.parametrize("i", EACH)
def test_a_fresh_process_continues_bit_for_bit(resumed, i):
    directory, uninterrupted = resumed
    model, opt = uninterrupted[i]
    saved = torch.load(directory / f"{i}.resumed.pt", weights_only=True)
    for name, value in model.state_dict().items():
        assert_same_bits(value, saved["model"][name], name)
    expected = opt.state_dict()["state"]
    assert expected.keys() == saved["optimizer"]["state"].keys()
    for index, state in expected.items():
        for key, value in state.items():
            assert_same_bits(value, saved["optimizer"]["state"][index][key], f"{index} {key}")


def test_loading_keeps_dtype_and_placement_and_does_not_alias():
    model = odd_model(torch.bfloat16)
    opt = memopt.create(model, "adamw-8bit@paged")
    train(model, opt, 0, 1)
    other = memopt.create(model, "adamw-8bit@paged")
    other.load_state_dict(opt.state_dict())
    assert other.ledger() == opt.ledger()
    for p, state in opt.state.items():
        for key, value in state.items():
            assert_same_bits(value, other.state[p][key])
            assert value.numel() == 0 or value.data_ptr() != other.state[p][key].data_ptr()


def test_a_plain_torch_adamw_state_loads_into_adamw():
    a, b = odd_model(), odd_model()
    theirs = torch.optim.AdamW(a.parameters(), lr=1e-2)
    train(a, theirs, 0, 3)
    b.load_state_dict(a.state_dict())
    ours = memopt.create(list(b.parameters()), "adamw")
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 1e-2
    train(a, theirs, 3, 3)
    train(b, ours, 3, 3)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        # A hundredth of the rate: the model turns the last bit of a parameter into other gradients.
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)


def broken(opt, edit):
    saved = opt.state_dict()
    saved["state"] = {i: dict(s) for i, s in saved["state"].items()}
    saved["param_groups"] = [dict(g) for g in saved["param_groups"]]
    edit(saved)
    return saved


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("state"), "lacks 'state'"),
        (lambda s: s["state"][0].pop("exp_avg.scales"), "parameter weight: the state lacks 'exp_avg.scales'"),
        (lambda s: s["state"][0].update({"exp_avg.codes": torch.zeros(64, 80)}), "[64, 80], and 'adamw-8bit' has int8"),
        (lambda s: s["state"][0].update({"exp_avg.scales": torch.zeros(3, 1)}), "'adamw-8bit' has float32 [64, 1]"),
        (lambda s: s["state"][0].update({"exp_avg.codes": 3}), "exp_avg.codes is int, and"),
        (lambda s: s["param_groups"].append(s["param_groups"][0]), "a parameter is in it twice"),
        (
            lambda s: s["param_groups"].append({**s["param_groups"][0], "params": [], "param_names": []}),
            "param groups differ",
        ),
        (lambda s: s["param_groups"][0].update(lr=-1.0), "lr=-1.0 is not allowed"),
        (lambda s: s["param_groups"][0].update(param_names=["bias", "weight"]), "saved 'bias' where there is 'weight'"),
        (lambda s: s["memopt"].update(world_size=4, rank=2), "rank 2 of 4"),
        (lambda s: s["state"].update({7: {}}), "1 parameters that are in none of its groups"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(edit, message):
    model = torch.nn.Linear(80, 64)
    opt = memopt.create(model, "adamw-8bit")
    model(torch.randn(4, 80)).sum().backward()
    opt.step()
    saved = broken(opt, edit)
    opt.step()
    before = {k: t.clone() for k, t in opt.state[model.weight].items()}
    with pytest.raises(ValueError) as error:
        opt.load_state_dict(saved)
    assert message in str(error.value)
    for key, value in opt.state[model.weight].items():
        assert_same_bits(value, before[key])


def test_the_message_names_both_specs():
    model = torch.nn.Linear(80, 64)
    a, b = memopt.create(model, "adamw"), memopt.create(model, "adamw-8bit", on_mismatch="refuse")
    a.init_state()
    with pytest.raises(ValueError, match="saved by 'adamw', this is 'adamw-8bit'"):
        b.load_state_dict(a.state_dict())
