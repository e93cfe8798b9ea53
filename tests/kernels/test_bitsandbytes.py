"""The bitsandbytes engine: its own optimizers' numbers, our keys, an exact ledger."""

import pytest
import torch

import memopt
from memopt.core.hyperparameters import SpecError
from tests.helpers.cases import live_nbytes, odd_model, train

bnb = pytest.importorskip("bitsandbytes")

#: (spec, hyperparameters, bitsandbytes' class, its keywords)
PAIRS = [
    ("adamw", {"weight_decay": 0.1}, "AdamW32bit", {"weight_decay": 0.1}),
    ("adamw-8bit", {"weight_decay": 0.1}, "AdamW8bit", {"weight_decay": 0.1}),
    ("adam", {}, "Adam32bit", {}),
    ("adam-8bit", {}, "Adam8bit", {}),
    ("lion", {"weight_decay": 0.1, "lr": 1e-4}, "Lion32bit", {"weight_decay": 0.1, "lr": 1e-4}),
    ("lion-8bit", {"lr": 1e-4}, "Lion8bit", {"lr": 1e-4}),
    ("rmsprop", {"lr": 1e-2}, "RMSprop32bit", {"lr": 1e-2}),
    ("rmsprop-8bit", {"lr": 1e-2}, "RMSprop8bit", {"lr": 1e-2}),
    ("sgd", {"momentum": 0.9, "lr": 1e-2}, "SGD32bit", {"momentum": 0.9, "lr": 1e-2}),
    ("sgd-8bit", {"momentum": 0.9, "lr": 1e-2}, "SGD8bit", {"momentum": 0.9, "lr": 1e-2}),
]


def model_without_empties():
    """bitsandbytes itself fails on empty tensors."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(67, 80), torch.nn.Linear(80, 70), torch.nn.LayerNorm(70))


def run(model, opt, steps=10):
    for seed in range(steps):
        g = torch.Generator().manual_seed(seed)
        opt.zero_grad()
        (model(torch.randn(16, 67, generator=g)) - 1).abs().mean().backward()
        opt.step()


@pytest.mark.parametrize(("spec", "hyper", "cls", "keywords"), PAIRS, ids=[p[2] for p in PAIRS])
def test_parameters_and_codes_are_bitsandbytes_own(spec, hyper, cls, keywords):
    a, b = model_without_empties(), model_without_empties()
    ours = memopt.create(a, spec, engine="bitsandbytes", **hyper)
    theirs = getattr(bnb.optim, cls)(b.parameters(), **keywords)
    run(a, ours)
    run(b, theirs)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
        mine = [v for k, v in ours.state[p].items() if k != "step"]
        names = ("state1", "absmax1", "state2", "absmax2")
        for x, y in zip(mine, [theirs.state[q][n] for n in names if n in theirs.state[q]], strict=True):
            assert torch.equal(x.flatten(), y.flatten())


@pytest.mark.parametrize("spec", [str(s) for s in memopt.specs("bitsandbytes")])
def test_the_claim_of_the_ledger_is_the_live_bytes(spec):
    from memopt.engines.bitsandbytes import _BOOKS

    hyper = {"momentum": 0.9} if spec.startswith("sgd") else {}
    model = odd_model()
    predicted = memopt.price(model, spec, engine="bitsandbytes", **hyper)
    opt = memopt.create(model, spec, engine="bitsandbytes", **hyper)
    _BOOKS.clear()
    train(model, opt, 0, 1)
    books = sum(t.numel() * t.element_size() for t in _BOOKS.values())
    assert predicted.nbytes == live_nbytes(opt) + books
    assert opt.ledger() == predicted
    assert books == ({"adamw": 2048, "adam": 2048}.get(spec.split("-")[0], 1024) if "8bit" in spec else 0)


def test_resume_is_bit_exact():
    a = odd_model()
    opt = memopt.create(a, "adamw-8bit", engine="bitsandbytes")
    train(a, opt, 0, 3)
    b = odd_model()
    b.load_state_dict(a.state_dict())
    other = memopt.create(b, "adamw-8bit", engine="bitsandbytes")
    other.load_state_dict(opt.state_dict())
    train(a, opt, 3, 3)
    train(b, other, 3, 3)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_state_of_the_other_engine_is_refused():
    model = odd_model()
    theirs = memopt.create(model, "adamw-8bit", engine="bitsandbytes")
    theirs.init_state()
    with pytest.raises(ValueError, match=r"saved by 'adamw-8bit \(bitsandbytes\)', this is 'adamw-8bit'"):
        memopt.create(model, "adamw-8bit", on_mismatch="refuse").load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("spec", "hyper", "words"),
    [
        ("adafactor", {}, "it has no adafactor; it has adamw, adam, lion, rmsprop, sgd"),
        ("adamw-4bit", {}, "it has no format '4bit'; it has 32bit, 8bit"),
        ("adamw/zero1", {}, "cannot shard its state"),
        ("adamw", {"amsgrad": True}, "amsgrad=True is not allowed"),
        ("adam", {"weight_decay": 0.1}, "weight_decay=0.1 is not allowed"),
        ("sgd", {"momentum": 0.9, "nesterov": True}, "nesterov=True is not allowed"),
        ("rmsprop", {"centered": True}, "centered=True is not allowed"),
    ],
)
def test_what_it_has_not_is_refused(spec, hyper, words):
    with pytest.raises(SpecError, match=words):
        memopt.create(odd_model(), spec, engine="bitsandbytes", **hyper)


def test_explain_names_the_engine_and_its_version():
    text = memopt.create(odd_model(), "adamw-8bit", engine="bitsandbytes").explain()
    assert f"bitsandbytes {bnb.__version__}" in text


def test_a_parameter_that_it_cannot_count_is_refused():
    with pytest.raises(SpecError, match="2,147,483,648 elements, and bitsandbytes counts them in 32 bits"):
        memopt.price({"experts": (2**16, 2**15)}, "adamw-8bit", engine="bitsandbytes")


def test_in_32_bits_on_cuda_two_rules_step_bf16_as_fp32():
    """Its kernels read parameter and gradient as one dtype, and two of them have no bf16."""
    from types import SimpleNamespace

    from memopt.engines.bitsandbytes import _stepped_as

    p = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert _stepped_as("momentum", False, p) == _stepped_as("rmsprop", False, p) == torch.float32
    assert _stepped_as("momentum", True, p) == _stepped_as("adam", False, p) == torch.bfloat16
    assert _stepped_as("momentum", False, SimpleNamespace(is_cuda=True, dtype=torch.float16)) == torch.float16
    assert _stepped_as("momentum", False, SimpleNamespace(is_cuda=False, dtype=torch.bfloat16)) == torch.bfloat16


def test_on_cuda_the_current_stream_and_that_of_its_kernels_wait_for_each_other(monkeypatch):
    from memopt.engines.bitsandbytes import _in_order

    said = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

    side, default = Stream("side"), Stream("default")
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
    for current, expected in (
        (side, ["default waits for side", "step", "side waits for default"]),
        (default, ["step"]),
    ):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, current=current: current)
        with _in_order([torch.device("cuda:1")]):
            said.append("step")
        assert said == expected
        said.clear()
    with _in_order([torch.device("cpu")]):
        pass
    assert not said
