"""The Triton kernels against their definition, the plain torch path: compiled where there is a GPU, else in Triton's
interpreter, on small tensors."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import assert_same_bits, live_nbytes
from test_kernels import HALF_STEP, TOLERANCE, VARIANTS, as_numbers, assert_close, cases, gradient
from torch import Tensor

import memopt
from memopt import kernels
from memopt.kernels import loader, triton
from memopt.masters import MASTERS

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: In 8 and 4 bits the approximate root and other orders of operations meet about 15 ties in a million codes.
MAX_TIES = 2
#: A ragged matrix, a stack, a flat tensor, one that stays in 32 bits, and none: enough for every branch of a kernel.
SHAPES = [(17, 300), (3, 16, 100), (4500,), (33,), (0, 3)]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch):
    """On the CPU these tests mean the interpreter, not the C++ kernels. Larger tiles, because it is slow per tile."""
    monkeypatch.setattr(loader, "_loaded", loader.Missing("a test of the Triton kernels"))
    if DEVICE == "cpu":
        from memopt.kernels.triton import tables

        monkeypatch.setattr(tables, "WARPS", 64)
        monkeypatch.setattr(tables, "WIDE", (512, 128))
        monkeypatch.setattr(tables, "NARROW", (64, 128))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
        yield


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch):
    """``on(True)`` turns the kernels on for the device of these tests, ``on(False)`` off."""

    def switch(yes: bool) -> None:
        monkeypatch.setattr(triton, "DEVICES", {DEVICE} if yes else set())

    return switch


def parameters(shapes, dtypes=(torch.float32,)) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    made = [torch.randn(shape).to(dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes)]
    return [torch.nn.Parameter(x.to(DEVICE)) for x in made]


def gradients(params: list[torch.nn.Parameter], step: int, dtype: torch.dtype | None = None) -> None:
    torch.manual_seed(100 + step)
    for p in params:
        p.grad = gradient(tuple(p.shape), torch.float32).to(DEVICE, dtype or p.dtype)


def run(spec, hyper, on, kernel_steps: int, shapes=SHAPES, dtypes=(torch.float32,), plain_steps: int = 1, **keywords):
    """Parameters and state after a plain step, so that there is state to decode, and steps of the kernels or none."""
    params = parameters(shapes, dtypes)
    opt = memopt.create(params, spec, **hyper, **keywords)
    for step in range(plain_steps + abs(kernel_steps)):
        on(kernel_steps > 0 and step >= plain_steps)
        gradients(params, step)
        opt.step()
    return params, [dict(opt.state[p]) for p in params], opt


def assert_same_weights(p: Tensor, q: Tensor, a: Tensor, b: Tensor, spec: memopt.OptimSpec) -> None:
    """What p and its master stand for together. Where the last bit of x differs, what is kept of it is rounded
    otherwise: by one unit of a longer number of 16 bits."""
    master = MASTERS[spec.master]
    x, y = master.read(p.detach(), a).double(), master.read(q.detach(), b).double()
    off = (x - y).abs() - TOLERANCE * y.abs().max()
    assert bool((off <= 2.0**-15 * y.abs()).all()), float(off.max())
    assert int((off > 0).sum()) <= 0.02 * x.numel() + 1


def compare(spec, hyper, on, steps=1, **keywords) -> None:
    ours, our_states, opt = run(spec, hyper, on, steps, **keywords)
    theirs, their_states, _ = run(spec, hyper, on, -steps, **keywords)
    assert type(opt._plan).__module__ == "memopt.kernels.triton.plan"
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


@pytest.mark.parametrize(("spec", "hyper"), cases(), ids=str)
def test_every_rule_on_every_format(spec, hyper, on) -> None:
    compare(spec, hyper, on, shapes=SHAPES[:2] if "factored" in spec or spec in ("adafactor", "came") else SHAPES[::2])


@pytest.mark.parametrize("spec", ["adammini", "adammini-8bit", "adammini+split"])
def test_row_means_of_matrices_within_a_row(spec, on) -> None:
    """Stacks, whose rows hold several means that blocks straddle; a convolution; vectors; two steps of the kernels."""
    dtypes = (torch.bfloat16,) if "split" in spec else (torch.float32,)
    compare(spec, {"lr": 1e-4}, on, steps=2, shapes=[(3, 16, 100), (8, 70, 3, 3), (4500,)], dtypes=dtypes)


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
@pytest.mark.parametrize("rule", [
    "adamw-8bit", "adafactor",
    pytest.param("adamw", marks=pytest.mark.slow), pytest.param("came-8bit", marks=pytest.mark.slow),
])  # fmt: skip
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
    together, _, _ = run(rule, VARIANTS[rule][0], on, 2, shapes, plain_steps=0)
    for i, shape in enumerate(shapes):
        torch.manual_seed(0)
        params = parameters(shapes)
        opt = memopt.create([params[i]], rule, **VARIANTS[rule][0])
        for step in range(2):
            gradients(params, step)
            opt.step()
        assert_same_bits(params[i].detach(), together[i].detach(), f"{rule} {shape}")


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_with_nan_does_not_happen(capturable, on) -> None:
    on(True)
    params = parameters([(17, 300), (33,)])
    opt = memopt.create(params, "adamw-8bit", capturable=capturable)
    for step in range(2):
        gradients(params, step)
        opt.step()
    before = [p.detach().clone() for p in params], [{k: t.clone() for k, t in opt.state[p].items()} for p in params]
    gradients(params, 2)
    params[1].grad[5] = float("nan")
    opt.step()
    if capturable:
        assert opt.skipped_steps == 1
    else:
        with pytest.warns(UserWarning, match="gradient of 1: this step was skipped"):
            assert opt.skipped_steps == 1
    for p, q, old in zip(params, *before, strict=True):
        assert_same_bits(p.detach(), q)
        for key, value in opt.state[p].items():
            assert_same_bits(value, old[key], key)
    gradients(params, 3)
    opt.step()
    assert opt.skipped_steps == 1
    assert [float(opt.state[p]["step"]) for p in params] == [3, 3]
    assert opt.state_dict()["memopt"]["skipped_steps"] == 1


def test_raise_names_the_parameter_and_changes_nothing(on) -> None:
    on(True)
    params = parameters([(17, 300), (33,)])
    opt = memopt.create(params, "adamw", nonfinite="raise")
    for step in range(2):
        gradients(params, step)
        opt.step()
    before = params[0].detach().clone()
    params[0].grad[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="gradient of 0"):
        opt.step()
    assert_same_bits(params[0].detach(), before)
    assert float(opt.state[params[0]]["step"]) == 2


def test_rates_steps_and_shapes_compile_nothing_again(on) -> None:
    """What differs between steps is in device memory, not among what a kernel is compiled for."""
    from memopt.kernels.triton import elementwise

    names = elementwise.step_kernel.arg_names
    constants = {elementwise.step_kernel.params[i].name for i in elementwise.step_kernel.constexprs} if hasattr(
        elementwise.step_kernel, "params") else set()  # fmt: skip
    assert not constants & {"run", "table", "scalars"}
    assert "lr" not in names
    on(True)
    params = parameters([(17, 300)])
    opt = memopt.create(params, "adamw-8bit")
    reference = parameters([(17, 300)])
    plain = memopt.create(reference, "adamw-8bit")
    for step in range(4):
        for each, chosen, yes in ((opt, params, True), (plain, reference, False)):
            on(yes)
            gradients(chosen, step)
            each.param_groups[0]["lr"] = 10.0 ** -(step + 1)
            each.param_groups[0]["weight_decay"] = 0.1 * step
            each.step()
    assert_close(params[0].detach(), reference[0].detach(), 0.0, MAX_TIES, "scheduled")


def test_capturable_keeps_the_step_on_the_device_and_is_priced_so(on) -> None:
    on(True)
    params = parameters([(17, 300), (33,)])
    opt = memopt.create(params, "adamw-8bit", capturable=True)
    opt.init_state()
    priced = memopt.price(params, "adamw-8bit", device=str(params[0].device), capturable=True)
    assert opt.ledger() == priced
    assert opt.ledger().nbytes == live_nbytes(opt)
    for step in range(3):
        gradients(params, step)
        opt.step()
    assert opt.ledger() == priced
    assert all(opt.state[p]["step"].device == p.device and float(opt.state[p]["step"]) == 3 for p in params)
    other = parameters([(17, 300), (33,)])
    copy = memopt.create(other, "adamw-8bit", capturable=True)
    copy.load_state_dict(opt.state_dict())
    for p, q in zip(params, other, strict=True):
        q.data.copy_(p.data)
    for each, chosen in ((opt, params), (copy, other)):
        gradients(chosen, 3)
        each.step()
    for p, q in zip(params, other, strict=True):
        assert_same_bits(p.detach(), q.detach())


def test_capturable_without_kernels_says_why(on) -> None:
    on(False)
    params = parameters([(33,)])
    opt = memopt.create(params, "adamw", capturable=True)
    gradients(params, 0)
    with pytest.raises(RuntimeError, match="capturable=True needs kernels that run on the device, and for 0"):
        opt.step()
    with pytest.raises(memopt.SpecError, match="capturable='yes'"):
        memopt.create(params, "adamw", capturable="yes")


class Scaler:
    """What torch.amp.GradScaler does around a step of an optimizer that takes its scale."""

    def __init__(self, scale: float) -> None:
        self.scale = torch.tensor(scale, device=DEVICE)

    def step(self, opt: memopt.Optimizer, found: float = 0.0) -> None:
        assert opt._step_supports_amp_scaling
        opt.grad_scale = self.scale
        opt.found_inf = torch.tensor(found, device=DEVICE)
        opt.step()
        del opt.grad_scale, opt.found_inf


def test_the_scale_of_a_grad_scaler_is_taken_on_the_device(on) -> None:
    on(True)
    params, reference = parameters([(17, 300)]), parameters([(17, 300)])
    opt, plain = memopt.create(params, "adamw-8bit"), memopt.create(reference, "adamw-8bit")
    for step in range(3):
        gradients(params, step)
        gradients(reference, step)
        if step:
            params[0].grad *= 1024
            Scaler(1024.0).step(opt)
        else:
            opt.step()
        plain.step()
    assert_same_bits(params[0].detach(), reference[0].detach())
    before = params[0].detach().clone()
    gradients(params, 3)
    Scaler(1024.0).step(opt, found=1.0)
    assert opt.skipped_steps == 1
    assert_same_bits(params[0].detach(), before)
    assert float(opt.state[params[0]]["step"]) == 3


def test_a_scale_is_heeded_where_there_is_no_plan_for_it(on) -> None:
    on(True)
    params, reference = parameters([(33,)]), parameters([(33,)])
    opt, plain = memopt.create(params, "adamw"), memopt.create(reference, "adamw")
    for each, chosen in ((opt, params), (plain, reference)):
        gradients(chosen, 0)
        each.step()
    gradients(params, 1)
    gradients(reference, 1)
    params[0].data = params[0].data.clone()  # the plan was for other memory
    params[0].grad *= 8
    Scaler(8.0).step(opt)
    plain.step()
    assert_same_bits(params[0].detach(), reference[0].detach())
    params[0].data = params[0].data.clone()
    Scaler(8.0).step(opt, found=1.0)
    assert opt.skipped_steps == 1


def test_a_plan_notices_what_changes(on) -> None:
    on(True)
    a, b = parameters([(20, 256), (20, 256)])
    opt = memopt.create([a, b], "adamw-8bit", lr=0.1)

    def step(*params: torch.nn.Parameter) -> None:
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        opt.zero_grad()

    step(a, b)
    first = opt._plan
    step(a, b)
    assert opt._plan is first
    frozen = b.detach().clone()
    step(a)
    assert torch.equal(b, frozen)
    step(a, b)
    assert (float(opt.state[a]["step"]), float(opt.state[b]["step"])) == (4, 3)
    a.data = torch.zeros_like(a)
    step(a, b)
    assert (a != 0).all()
    opt.load_state_dict(opt.state_dict())
    step(a, b)
    assert float(opt.state[a]["step"]) == 6
    kept = a.detach().clone()
    opt.param_groups[0].update(lr=0.0)
    step(a, b)
    assert torch.equal(a, kept)


def test_explain_and_slow_path(on) -> None:
    on(False)
    params = parameters([(33,)])
    opt = memopt.create(params, "adamw")
    if DEVICE == "cuda":
        assert "there are no kernels for cuda" in opt.explain()
    assert triton.missing("mps") == "there are no kernels for mps"
    assert "plain torch path" in triton.status("mps")
    on(True)
    assert "Triton" in triton.status(DEVICE)
    assert "stepped by" not in memopt.create(params, "adamw").explain()
    assert kernels.make_plan(opt, []) is None


def test_division_by_multiplication() -> None:
    from memopt.kernels.triton.tables import division

    for divisor in [1, 2, 3, 5, 7, 16, 56, 57, 224, 1000, 65535, 2**20 + 1, 2**31 - 1]:
        magic, shift = division(divisor)
        assert magic < 2**32
        for n in {0, 1, divisor - 1, divisor, 2 * divisor - 1, 12345678, 2**31 - 1, 2**31 - 1 - divisor}:
            if 0 <= n < 2**31:
                assert (2 * n * magic >> 32) >> shift == n // divisor


def test_programs_cover_every_block_once() -> None:
    from memopt.kernels.triton.tables import PROGRAMS, pieces_of_programs, programs

    found = programs([3, 5, 7], [5, 0, 4], 2).tolist()
    assert found == [[3, 0], [3, 2], [3, 4], [7, 0], [7, 2]]
    blocks = 70_000_000_000 // 256
    run = pieces_of_programs(blocks, 4, 256)
    assert blocks / (run * 4) <= PROGRAMS


@pytest.mark.parametrize("spec", ["adamw-8bit", "adafactor", "adammini"])
def test_the_tables_cost_what_the_estimate_says(spec, on) -> None:
    """What a step allocates beside the state, against the closed form of ``memopt estimate``."""
    from estimators.state import kernel_tables

    on(True)
    shapes = [(300, 256), (17, 300), (33,)]
    _, _, opt = run(spec, {}, on, 2, shapes, plain_steps=0)
    launcher = opt._plan.launcher
    seen: dict[int, int] = {}

    def count(value: object) -> None:
        if isinstance(value, torch.Tensor):
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()

    for value in vars(launcher).values():
        count(value)
    count(launcher.gradients.tensor)
    count(launcher.numbers.tensor)
    for launch in [*launcher.launches, *launcher._looks]:
        for cell in launch.__closure__ or ():
            for value in cell.cell_contents if isinstance(cell.cell_contents, tuple) else (cell.cell_contents,):
                count(value)
    used = sum(seen.values()) + launcher.workspace * 4
    claimed = kernel_tables(len(shapes), sum(torch.Size(s).numel() for s in shapes), spec == "adafactor",
                            spec == "adammini")  # fmt: skip
    assert used <= claimed
