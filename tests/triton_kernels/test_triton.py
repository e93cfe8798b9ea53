"""The Triton kernels against their definition, the plain torch path: rules, formats, masters, shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import memopt
from memopt.masters import MASTERS
from tests.helpers.cases import assert_same_bits, thinned
from tests.helpers.interpreting import DEVICE, MAX_TIES, SHAPES, gradients, parameters, stepped
from tests.kernels.test_kernels import HALF_STEP, TOLERANCE, VARIANTS, as_numbers, assert_close, cases, gradient

pytest.importorskip("triton", minversion="3.3")
pytestmark = pytest.mark.usefixtures("interpreted")


def assert_same_weights(p: Tensor, q: Tensor, a: Tensor, b: Tensor, spec: memopt.OptimSpec) -> None:
    """What p and its master stand for together. Where the last bit of x differs, what is kept of it is rounded
    otherwise: by one unit of a longer number of 16 bits."""
    master = MASTERS[spec.master]
    x, y = master.read(p.detach(), a).double(), master.read(q.detach(), b).double()
    off = (x - y).abs() - TOLERANCE * y.abs().max()
    assert bool((off <= 2.0**-15 * y.abs()).all()), float(off.max())
    assert int((off > 0).sum()) <= 0.02 * x.numel() + 1


def compare(spec, hyper, on, steps=1, **keywords) -> None:
    ours, our_states, opt = stepped(spec, hyper, on, steps, **keywords)
    theirs, their_states, _ = stepped(spec, hyper, on, -steps, **keywords)
    assert type(opt.stepper.plan).__module__ == "memopt.kernels.triton.cached_step"
    fmt = memopt.parse(spec).format
    for p, q, mine, other in zip(ours, theirs, our_states, their_states, strict=True):
        ties = MAX_TIES if fmt not in ("32bit", "factored") else 0
        assert_close(p.detach(), q.detach(), HALF_STEP[p.dtype], ties, f"{tuple(p.shape)} {p.dtype}")
        assert mine.keys() == other.keys()
        for key in mine:
            a, b = mine[key], other[key]
            if key in ("master", "compensation", "correction"):
                assert_same_weights(p, q, a, b, memopt.parse(spec))
            elif key.endswith(".codes"):
                assert int((as_numbers(a) != as_numbers(b)).sum()) <= ties, f"{tuple(p.shape)} {key}"
            else:
                assert_close(a, b, 0.0, ties, f"{tuple(p.shape)} {key}")


@pytest.mark.parametrize(
    ("spec", "hyper"),
    thinned(cases(), 2),
    ids=str,
)
def test_every_rule_on_every_format(spec, hyper, on) -> None:
    compare(spec, hyper, on, shapes=SHAPES[:2] if "factored" in spec or spec in ("adafactor", "came") else SHAPES[::2])


#: Blocks of one width and of two; factors of a matrix and of a stack beside blocks, with and without sums over the
#: tensor; inverse roots; CAME's residual beside codes of every kind; a master with random bits.
PAIRS: list[tuple[str, dict[str, object]]] = [
    ("adamw-8bit.4bit", {}),
    ("adamw-4bit.8bit", {}),
    ("adamw-bf16.fp8", {}),
    ("adamw-4bit.32bit", {}),
    ("ademamix-4bit.8bit", {}),
    ("adamw-8bit.factored", {"weight_decay": 0.1}),
    ("adam-4bit.factored", {"weight_decay": 0.1}),
    ("adamw-8bit.factored+split", {}),
    ("lamb-fp8.factored", {}),
    ("stableadamw-8bit.factored", {}),
    ("adafactor-4bit.factored", {"beta1": 0.9}),
    ("came-8bit.factored", {}),
    ("came-4bit.factored", {}),
    ("came-bf16.factored", {}),
]


@pytest.mark.parametrize(("spec", "hyper"), PAIRS, ids=str)
def test_a_format_for_each_kind_of_moment(spec, hyper, on) -> None:
    dtypes = (torch.bfloat16,) if "split" in spec else (torch.float32,)
    compare(spec, hyper, on, shapes=[(17, 300), (3, 16, 100), (64, 64), (4500,)], dtypes=dtypes)


@pytest.mark.parametrize("spec", ["adammini", "adammini-8bit", "adammini+split"])
def test_row_means_of_matrices_within_a_row(spec, on) -> None:
    """Stacks, whose rows hold several means that blocks straddle; a convolution; vectors; two steps of the kernels."""
    dtypes = (torch.bfloat16,) if "split" in spec else (torch.float32,)
    compare(spec, {"lr": 1e-4}, on, steps=2, shapes=[(3, 16, 100), (8, 70, 3, 3), (4500,)], dtypes=dtypes)


@pytest.mark.parametrize("spec", ["adamw-8bit", "adamw-8bit.4bit", "adamw-4bit.factored", "adammini-8bit"])
def test_rows_of_which_several_share_a_block(spec, on) -> None:
    compare(spec, {}, on, shapes=[(300, 16), (460, 9), (66, 63)])


@pytest.mark.parametrize("spec", ["lookahead(adamw)+split", "lookahead(lamb)-factored"])
def test_slow_weights_begin_follow_and_are_returned_to(spec, on) -> None:
    dtypes = (torch.bfloat16,) if "split" in spec else (torch.float32,)
    hyper = {"lr": 1e-4, "lookahead_steps": 2}
    compare(spec, hyper, on, steps=3, plain_steps=0, shapes=[(17, 300), (33,)], dtypes=dtypes)


def test_the_bounds_of_adabound_follow_a_schedule(on) -> None:
    def stepped(yes: bool) -> Tensor:
        [p] = parameters([(17, 300)])
        opt = memopt.create([p], "adabound", lr=0.1, gamma=0.5)
        rates = torch.optim.lr_scheduler.ExponentialLR(opt, 0.3)
        for step in range(3):
            on(yes)
            gradients([p], step)
            opt.step()
            rates.step()
        return p.detach()

    assert_close(stepped(True), stepped(False), 0.0, 0, "adabound")


@pytest.mark.parametrize("spec", ["adamw", "adamw-bf16", "adamw-8bit", "adamw-fp8", "adamw-4bit", "adafactor", "came"])
def test_shapes_and_dtypes(spec, on) -> None:
    """Two steps of the kernels: without a plan, then with one; rows of whole blocks and others, all three dtypes."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    compare(spec, {}, on, steps=2, shapes=[*SHAPES, (16, 512), (2, 33, 130), (65, 64)], dtypes=dtypes)


@pytest.mark.parametrize("master", ["fp32", "kahan", "stochastic", "split", "split16"])
@pytest.mark.parametrize(
    "rule",
    [
        "adamw-8bit",
        "adafactor",
        pytest.param("adamw", marks=pytest.mark.slow),
        pytest.param("came-8bit", marks=pytest.mark.slow),
    ],
)
def test_masters(rule, master, on) -> None:
    """Two dtypes and 32 bits; small rates, so that updates are of the size that a master is for."""
    spec = memopt.parse(rule).replace(master=master)
    hyper = {"lr": 1e-4} if "adafactor" not in rule else {}
    shapes = [(17, 300), (20, 210), (2, 30, 70), (4500,)] if "8bit" in rule else [(17, 300), (2, 30, 100)]
    compare(spec, hyper, on, steps=2, shapes=shapes, dtypes=(torch.bfloat16, torch.float16))


@pytest.mark.parametrize("master", ["fp32", "kahan", "split", "split16"])
def test_a_weight_that_somebody_else_changed_wins(master, on) -> None:
    def stepped(yes: bool) -> Tensor:
        [p] = parameters([(17, 300)], (torch.bfloat16,))
        opt = memopt.create([p], memopt.parse("adamw").replace(master=master), lr=1e-4)
        for step in range(3):
            on(yes)
            gradients([p], step)
            opt.step()
            p.data[::2] = 0.5
        return p.detach()

    assert_close(stepped(True), stepped(False), HALF_STEP[torch.bfloat16], 0, master)


@pytest.mark.parametrize("spec", ["adamw-8bit", "lion-4bit", "came-8bit"])
def test_many_tiles_and_programs(spec, on, monkeypatch) -> None:
    """Loops over tiles, and tensors cut among programs, with the smallest sizes instead of the fastest."""
    from memopt.kernels.triton import tables

    monkeypatch.setattr(tables, "WARPS", 4)
    monkeypatch.setattr(tables, "PROGRAM", 2048)
    compare(spec, {}, on, shapes=[(19, 513), (5000,)])


def test_a_matrix_of_several_bands(on) -> None:
    compare("adafactor", {}, on, shapes=[(300, 600), (2, 260, 70)])


def test_a_gradient_of_another_dtype(on) -> None:
    def stepped(yes: bool) -> Tensor:
        [p] = parameters([(20, 256)], (torch.bfloat16,))
        opt = memopt.create([p], "adamw-8bit")
        p.grad = torch.ones_like(p)
        for step in range(2):
            on(yes)
            p.grad = gradient((20, 256), torch.bfloat16).to(DEVICE)
            torch.manual_seed(step)
            opt.step()
        return p.detach().float()

    torch.manual_seed(1)
    ours = stepped(True)
    torch.manual_seed(1)
    assert_close(ours, stepped(False), HALF_STEP[torch.bfloat16], 0, "bf16")


@pytest.mark.parametrize("rule", sorted(VARIANTS))
def test_the_bits_do_not_depend_on_how_tensors_are_grouped(rule, on) -> None:
    """Alone or among others, the same bits: sums have an order of their own."""
    on(True)
    shapes = [(17, 300), (4500,)]
    together, _, _ = stepped(rule, VARIANTS[rule][0], on, 2, shapes, plain_steps=0)
    for i, shape in enumerate(shapes):
        torch.manual_seed(0)
        params = parameters(shapes)
        opt = memopt.create([params[i]], rule, **VARIANTS[rule][0])
        for step in range(2):
            gradients(params, step)
            opt.step()
        assert_same_bits(params[i].detach(), together[i].detach(), f"{rule} {shape}")


@pytest.mark.parametrize("yes", [True, False])
def test_a_cards_nan_stays_one_in_bf16(yes, on) -> None:
    """All its bits are set: to cut it off with random bits added would make -0 of it."""
    on(yes)
    [p] = parameters([(17, 300)])
    opt = memopt.create([p], "adamw-bf16", nonfinite="propagate")
    p.grad = torch.ones_like(p)
    p.grad.view(torch.int32)[3, 4] = 0x7FFFFFFF
    opt.step()
    for moment in ("exp_avg", "exp_avg_sq"):
        assert opt.state[p][moment].isnan().sum() == opt.state[p][moment][3, 4].isnan() == 1
