"""Bad input gets one sentence that names the value and what is allowed, and nothing is changed."""

import sys
import tempfile
import warnings

import pytest
import torch
from torch import nn

import memopt
from memopt.core.hyperparameters import SpecError
from tests.helpers.cases import PLAIN_SPECS, assert_same_bits, odd_model, train

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("spec", "hyper", "words"),
    [
        ("adamw", {"lr": -1.0}, ["lr=-1.0", "finite number >= 0"]),
        ("adamw", {"lr": NAN}, ["lr=nan", "finite number >= 0"]),
        ("adamw", {"lr": INF}, ["lr=inf"]),
        ("adamw", {"lr": "fast"}, ["lr='fast'"]),
        ("adamw", {"lr": None}, ["lr=None"]),
        ("adamw", {"lr": True}, ["lr=True"]),
        ("adamw", {"betas": (0.9, 1.0)}, ["betas=(0.9, 1.0)", "[0, 1)"]),
        ("adamw", {"betas": (-0.1, 0.9)}, ["betas=(-0.1, 0.9)"]),
        ("adamw", {"betas": (0.9,)}, ["betas=(0.9,)"]),
        ("adamw", {"betas": 0.9}, ["betas=0.9"]),
        ("adamw", {"betas": (0.9, 0.99, 0.999)}, ["2 numbers"]),
        ("came", {"betas": (0.9, 0.99)}, ["3 numbers"]),
        ("adamw", {"eps": -1e-8}, ["eps=-1e-08"]),
        ("adamw", {"eps": (1e-8, 1e-3)}, ["eps", "one number"]),
        ("adafactor", {"eps": 1e-30}, ["eps=1e-30", "2 numbers"]),
        ("adafactor", {"d": 0.5}, ["d=0.5", ">= 1"]),
        ("adafactor", {"convention": "google"}, ["convention='google'", "'absolute', 'torch' or"]),
        ("adafactor", {"warmup_init": True}, ["convention='transformers'"]),
        ("adafactor", {"convention": "transformers", "lr": 1e-3, "relative_step": True}, ["give one of them"]),
        ("adafactor", {"lr": None}, ["lr=None", "convention='transformers'"]),
        ("adafactor", {"scale_parameter": True}, ["scale_parameter=True", "taken as it stands"]),
        ("adafactor", {"convention": "torch", "lr": None}, ["lr=None"]),
        ("adamw", {"weight_decay": -0.1}, ["weight_decay=-0.1"]),
        ("sgd", {"momentum": -0.9}, ["momentum=-0.9"]),
        ("sgd", {"nesterov": True}, ["momentum > 0"]),
        ("sgd-8bit", {}, ["keeps no state", "momentum=0.9", "nearest: sgd"]),
        ("rmsprop-8bit", {"centered": True}, ["centered", "nearest: rmsprop"]),
        ("adamw-factored", {"amsgrad": True}, ["amsgrad", "nearest: adamw"]),
        ("adabound", {"final_lr": 0.0}, ["final_lr=0.0", "> 0"]),
        ("adabound", {"gamma": 1.0}, ["gamma=1.0", "(0, 1)"]),
        ("ademamix", {"alpha": -1}, ["alpha=-1", ">= 0"]),
        ("ademamix", {"t_alpha": 0}, ["t_alpha=0", "number of steps"]),
        ("ademamix", {"betas": (0.9, 0.999)}, ["3 numbers"]),
        ("rmsprop", {"alpha": 5.0}, ["alpha=5.0", "[0, 1]"]),
        ("lookahead(adamw)", {"lookahead_steps": 0}, ["lookahead_steps=0", "integer >= 1"]),
        ("lookahead(adamw)", {"lookahead_rate": 0.0}, ["lookahead_rate=0.0", "(0, 1]"]),
        ("adamw", {"amsgrad": 1}, ["amsgrad=1", "True or False"]),
        ("adamw", {"momentum": 0.9}, ["no hyperparameter 'momentum'", "it has lr, betas, eps"]),
        ("adamw", {"fused": True}, ["'fused'", "memopt chooses its kernel itself"]),
        ("adamw", {"nonfinite": "ignore"}, ["nonfinite='ignore'", "skip, raise, propagate"]),
        ("adamw", {"seed": 1.5}, ["seed=1.5", "integer"]),
        ("adamw", {"engine": "magic"}, ["unknown engine 'magic'", "native, bitsandbytes"]),
    ],
)
def test_hyperparameters(spec, hyper, words):
    with pytest.raises(SpecError) as error:
        memopt.create(nn.Linear(2, 2), spec, **hyper)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


W = nn.Parameter(torch.ones(2, 2))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ([], "parameter list is empty"),
        (torch.ones(2), "not a single tensor"),
        ({"params": [W]}, "not a dict"),
        ([{"lr": 1e-3}], "with 'params'"),
        ([W, W], r"\(2, 2\) appears more than once"),
        ([{"params": [W]}, {"params": [W]}], "appears more than once"),
        ([("w", W), ("v", W)], "v of shape .* appears more than once"),
        ([W * 2], "not a leaf"),
        ([3], "a int; an optimizer takes tensors"),
        ([torch.ones(2, dtype=torch.complex64, requires_grad=True)], "dtype torch.complex64"),
        ([{"params": {W}}], "must be ordered"),
        ([{"params": [W], "weigth_decay": 0.0}], "did you mean 'weight_decay'"),
        ([{"params": [W], "lr": -1}], "lr=-1"),
        ([{"params": [W], "betas": (0.9, 2)}], r"betas=\(0.9, 2\)"),
    ],
)
def test_parameters(params, words):
    with pytest.raises(SpecError, match=words):
        memopt.create(params, "adamw-8bit")


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    opt = memopt.create([W], "adamw")
    with pytest.raises(SpecError):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": NAN})
    assert len(opt.param_groups) == 1


def test_notes_of_the_caller_in_a_group_are_kept():
    opt = memopt.create([{"params": [W], "lr_scale": 0.5}], "adamw")
    assert opt.param_groups[0]["lr_scale"] == 0.5


def test_sparse_gradients():
    table = nn.Embedding(10, 4, sparse=True)
    opt = memopt.create(table, "adamw")
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"weight has a sparse gradient.*sparse=False"):
        opt.step()
    assert not opt.state


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("spec", PLAIN_SPECS)
def test_nan_and_inf_gradients_skip_the_whole_step(spec, bad):
    hyper = {"momentum": 0.9} if spec.startswith("sgd") else {}
    model = odd_model()
    opt = memopt.create(model, spec, **hyper)
    train(model, opt, 0, 2)
    params = [p.detach().clone() for p in model.parameters()]
    state = [{k: v.clone() for k, v in opt.state[p].items()} for p in model.parameters()]
    opt.zero_grad()
    model(2).backward()
    model.wide.weight.grad[3, 5] = bad
    with pytest.warns(UserWarning, match=r"NaN or Inf in the gradient of wide\.weight: this step was skipped"):
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()  # the second time it is only counted
    assert opt.skipped_steps == 2
    assert "2 steps skipped" in opt.explain()
    for p, before, old in zip(model.parameters(), params, state, strict=True):
        assert_same_bits(p, before)
        for key, value in opt.state[p].items():
            assert_same_bits(value, old[key], key)
    train(model, opt, 3, 1)
    assert not torch.equal(model.wide.weight, params[[n for n, _ in model.named_parameters()].index("wide.weight")])


def test_nan_gradients_can_raise_or_propagate():
    w = nn.Parameter(torch.ones(2, 2))
    w.grad = torch.full((2, 2), NAN)
    with pytest.raises(FloatingPointError, match=r"gradient of 0; nothing was changed"):
        memopt.create([w], "adamw", nonfinite="raise").step()
    assert torch.equal(w, torch.ones(2, 2))
    memopt.create([w], "adamw", nonfinite="propagate").step()
    assert torch.isnan(w).all()


def test_a_missing_bitsandbytes_says_how_to_install_it(monkeypatch):
    for module in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, module, None)
    w = nn.Parameter(torch.ones(2, 2))
    w.grad = torch.ones(2, 2)
    with pytest.raises(ImportError, match=r"engine='bitsandbytes' needs bitsandbytes.*: pip install bitsandbytes"):
        memopt.create([w], "adamw", engine="bitsandbytes")
    memopt.create([w], "adamw").step()


@pytest.mark.parametrize(("world_size", "rank"), [(0, 0), (2, 2), (2, -1), (1.5, 0)])
def test_price_refuses_a_world_that_cannot_be(world_size, rank):
    with pytest.raises(SpecError, match="0 <= rank < world_size"):
        memopt.price([(10, 10)], "adamw/zero1", world_size=world_size, rank=rank)


def test_price_refuses_what_is_no_shape():
    with pytest.raises(SpecError, match=r"w: .* is not a shape"):
        memopt.price({"w": (10, -1)}, "adamw")


def test_paged_refuses_a_temporary_directory_in_memory(monkeypatch, tmp_path):
    import psutil

    class Mount:
        mountpoint, fstype = str(tmp_path), "tmpfs"

    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [Mount])
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    opt = memopt.create(nn.Linear(80, 64), "adamw@paged")
    with pytest.raises(RuntimeError, match=r"is tmpfs, which is memory itself.*set TMPDIR"):
        opt.init_state()
