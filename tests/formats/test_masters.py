"""Masters: what they keep, that small updates add up, and that the weights always win."""

import pytest
import torch
from torch import nn

import memopt
from memopt.core.dither import key
from memopt.core.hyperparameters import SpecError
from memopt.core.rows import Rows
from memopt.formats import Shard
from memopt.kernels.loader import Missing
from memopt.masters import MASTERS
from memopt.masters.base import ORDER
from memopt.placements import PLACEMENTS
from tests.helpers.cases import MASTER_KEYS, MASTERED, assert_same_bits, live_nbytes, odd_model, train
from tests.helpers.mastered import BITS, LOW, NBYTES, drive, hyper_of


def values(rows=5, cols=700):
    """Weights of all sizes, powers of two (where a unit in the last place halves) and numbers just beside them."""
    torch.manual_seed(0)
    x = torch.randn(rows, cols) * 10 ** torch.empty(rows, cols).uniform_(-3, 1)
    x = x.abs().clamp_(min=2.0**-13).copysign_(x)  # fp16 has its full precision from 2^-14 on
    x[0, :20] = 2.0 ** torch.arange(-8, 12)
    x[0, 20:40] = -(2.0 ** torch.arange(-8, 12)) * (1 - 2.0**-20)
    x[0, 40:44] = torch.tensor([0.0, -0.0, 1 + 2.0**-8, 1 + 3 * 2.0**-9])
    return x


def beside(master, p):
    dtype = master.stored_dtype(str(p.dtype).removeprefix("torch."))
    return torch.zeros(p.shape, dtype=getattr(torch, dtype)) if dtype else None


def written(name, x, dtype, step=3):
    p = torch.zeros(x.shape, dtype=dtype)
    stored = beside(MASTERS[name], p)
    MASTERS[name].write(x, p, stored, Shard(Rows.whole(tuple(x.shape)), key(0, 1, ORDER), step))
    return p, stored


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", MASTERS)
def test_weight_and_what_is_beside_it_are_the_value_to_so_many_bits(name, dtype):
    master, x = MASTERS[name], values()
    p, stored = written(name, x, dtype)
    y = master.read(p, stored)
    assert ((y - x).abs() <= x.abs() * 2.0 ** -BITS[name][LOW.index(dtype)]).all()
    ulp = (p.float().abs() * 2.0 ** -BITS["stochastic"][LOW.index(dtype)]).clamp_(min=2.0**-24)
    assert ((p.float() - x).abs() <= ulp * (1 if name == "stochastic" else 0.5)).all()
    if name == "fp32" or name == "split16":
        assert_same_bits(y, x)
    if stored is not None:
        assert not master.foreign(p, stored).any()
        assert stored.element_size() == NBYTES[name]
        # What was read can be kept beside the same weight without a loss, which is how state is converted.
        again = torch.zeros_like(stored)
        master.keep(y, p, again)
        assert_same_bits(master.read(p, again), y)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", MASTERS)
def test_values_without_a_finite_weight_stay_what_they_are(name, dtype):
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 3.4e38, -3.4e38, 1.0]])
    p, stored = written(name, x, dtype)
    y = MASTERS[name].read(p, stored)
    assert p.isnan()[0].tolist() == y.isnan()[0].tolist() == [True] + [False] * 5
    assert p[0, 1] == y[0, 1] == float("inf")
    assert p[0, 2] == y[0, 2] == -float("inf")
    assert p[0, 5] == y[0, 5] == 1.0


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", [n for n, m in MASTERS.items() if m.key])
def test_zeros_stand_for_the_weight_and_other_weights_win(name, dtype):
    master = MASTERS[name]
    p, stored = written(name, values(), dtype)
    assert torch.equal(master.read(p, torch.zeros_like(stored)), p.float())
    # Other weights behind the master's back: at most half a unit in the last place is left of the old ones.
    other = (values().flip(1) * 3).to(dtype)
    read = master.read(other, stored)
    half = other.float().abs() * 2.0 ** -BITS["none"][LOW.index(dtype)]
    assert ((read - other.float()).abs() <= half + 2.0**-25).all()
    assert read[other == 0].abs().sum() <= 2.0**-25 * (other == 0).sum()
    if name == "fp32":
        changed = other != p
        assert_same_bits(read[changed], other.float()[changed])


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", ["stochastic", "split"])
def test_dithered_rounding_has_the_right_mean_and_does_not_depend_on_the_shard(name, dtype):
    x = torch.full((64, 300), 1.0) + torch.rand(64, 1) * 2.0**-11
    mean = torch.zeros_like(x, dtype=torch.float64)
    for step in range(256):
        p, stored = written(name, x, dtype, step)
        mean += MASTERS[name].read(p, stored) / 256
    unit = 2.0 ** -BITS[name][LOW.index(dtype)]
    assert (mean - x).abs().max() < 0.02 * unit
    part, rows = torch.zeros(10, 300, dtype=dtype), Rows((64, 300), 20, 30)
    kept_part = beside(MASTERS[name], part)
    MASTERS[name].write(x[20:30].clone(), part, kept_part, Shard(rows, key(0, 1, ORDER), 255))
    assert_same_bits(part, p[20:30])
    if stored is not None:
        assert_same_bits(kept_part, stored[20:30])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spec", [s for s in MASTERED if "/" not in s])
def test_predicted_bytes_are_live_bytes(spec, dtype):
    model = odd_model(dtype)
    predicted = memopt.price(model, spec, **hyper_of(spec))
    opt = memopt.create(model, spec, **hyper_of(spec))
    train(model, opt, 0, 1)
    assert opt.ledger() == predicted
    assert live_nbytes(opt) == predicted.nbytes
    numel = sum(p.numel() for p in model.parameters())
    nbytes = sum(line.nbytes for line in predicted if line.moment in MASTER_KEYS)
    assert nbytes == (0 if dtype == torch.float32 else NBYTES[opt.spec.master] * numel)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    name = str(dtype).removeprefix("torch.")
    assert memopt.price(shapes, spec, dtype=name, **hyper_of(spec)) == predicted


@pytest.mark.parametrize("rule", ["adamw", "adafactor", "lion-8bit"])
@pytest.mark.parametrize("master", ["fp32", "split16"])
def test_masters_of_all_bits_take_the_steps_of_fp32_weights(rule, master, monkeypatch):
    monkeypatch.setattr("memopt.kernels.loader._loaded", Missing("the plain path is the definition"))
    low, wide = odd_model(torch.bfloat16), odd_model()
    wide.load_state_dict(low.state_dict())
    ours, reference = memopt.create(low, f"{rule}+{master}", lr=1e-4), memopt.create(wide, rule, lr=1e-4)
    drive(low, ours, 0, 8)
    drive(wide, reference, 0, 8)
    for p, q in zip(low.parameters(), wide.parameters(), strict=True):
        exact = MASTERS[master].read(p.detach(), ours.state[p][MASTERS[master].key])
        assert_same_bits(exact, q.detach())


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", MASTERS)
def test_updates_of_a_thousandth_of_a_unit_add_up(name, dtype):
    """1000 steps of a hundredth of a unit in the last place: ten units. Rounded to nearest, weights never move."""
    unit = 2.0 ** -BITS["stochastic"][LOW.index(dtype)]
    p = nn.Parameter(torch.full((16, 512), 1.0, dtype=dtype))
    opt = memopt.create([p], f"sgd+{name}" if name != "none" else "sgd", lr=0.01 * unit)
    for _ in range(1000):
        p.grad = torch.full_like(p, -1.0)
        opt.step()
    moved = (p.detach().double() - 1) / unit
    if name == "none":
        assert (moved == 0).all()
    else:
        assert abs(float(moved.mean()) - 10) < 0.1
        assert float((moved - 10).abs().max()) <= 1


@pytest.mark.parametrize("spec", [s for s in MASTERED if "adamw-8bit" in s and "/" not in s])
def test_resuming_is_bit_exact(spec):
    model = odd_model(torch.bfloat16)
    opt = memopt.create(model, spec, lr=1e-4)
    train(model, opt, 0, 3)
    twin = odd_model(torch.bfloat16)
    twin.load_state_dict(model.state_dict())
    other = memopt.create(twin, spec)
    other.load_state_dict(opt.state_dict())
    for m, o in ((model, opt), (twin, other)):
        train(m, o, 3, 3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits(p, q)


@pytest.mark.parametrize("place", [place for place in PLACEMENTS if place != "device"])
@pytest.mark.parametrize("master", ["kahan", "split"])
def test_every_placement_takes_the_same_steps_with_released_gradients_too(master, place):
    found = []
    for where in ("device", place):
        model = odd_model(torch.bfloat16)
        opt = memopt.create(model, f"adamw-8bit+{master}@{where}", lr=1e-3)
        if where == place:
            opt.release_gradients(model)
        train(model, opt, 0, 3)
        found.append([p.detach() for p in model.parameters()])
    assert opt.ledger() == memopt.price(model, str(opt.spec))
    for p, q in zip(*found, strict=True):
        assert_same_bits(p, q)


def test_weights_loaded_after_the_optimizer_are_kept():
    model, fresh = odd_model(torch.bfloat16), odd_model(torch.bfloat16)
    opt = memopt.create(model, "sgd+fp32", lr=1e-4)
    opt.init_state()
    with torch.no_grad():
        for p in fresh.parameters():
            p.mul_(3)
    model.load_state_dict(fresh.state_dict())  # before the first step: usual
    drive(model, opt, 0, 5)
    drift = max(
        (p - q).detach().abs().max().item()
        for p, q in zip(model.parameters(), fresh.parameters(), strict=True)
        if p.numel()
    )
    assert drift < 0.02
    assert "changed" not in opt.explain()
    with torch.no_grad():
        for p in fresh.parameters():
            p.mul_(2)
    model.load_state_dict(fresh.state_dict())  # and in the middle
    assert "the next step begins from the weights" in opt.explain()
    drive(model, opt, 5, 1, scale=0.0)
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert_same_bits(p, q)
    assert "changed" not in opt.explain()


def test_explain_says_what_is_kept_and_for_whom():
    mixed = odd_model(torch.bfloat16)
    mixed.norm.float()
    count = len(list(mixed.parameters()))
    text = memopt.create(mixed, "adamw-8bit+split").explain()
    assert f"split: 8 more bits of each weight, 1 byte per parameter; for {count - 2} of {count} parameters" in text
    assert "32 bits or more, which hold every update themselves: norm.weight, norm.bias" in text
    assert "updates under half a unit in the last place are lost" in memopt.create(mixed, "adamw-8bit").explain()
    assert "master" not in memopt.create(odd_model(), "adamw-8bit").explain()


@pytest.mark.parametrize("spec", ["adamw+kahan", "adamw-8bit+split"])
def test_an_engine_without_masters_refuses_them(spec):
    with pytest.raises(SpecError, match="keeps nothing beside the weights; the engine for"):
        memopt.parse(spec, engine="bitsandbytes")


def test_a_dtype_that_does_not_exist_is_refused():
    with pytest.raises(SpecError, match="dtype='half' is not allowed; it is one of float64, float32, bfloat16"):
        memopt.price({"w": (4, 4)}, "adamw+fp32", dtype="half")


@pytest.mark.parametrize("name", ["stochastic", "split"])
def test_rounding_does_not_walk_away_at_any_period(name):
    """Gradients that sum to zero over so many steps, among them Fibonacci and Lucas numbers, where the rotation by the
    golden ratio comes back: weights are no further off than with fresh draws."""
    periods, cols, steps = (8, 13, 16, 21, 48, 55, 89, 144, 233), 256, 2000
    unit = 2.0 ** -BITS[name][0]
    g = torch.Generator().manual_seed(3)
    tables = [torch.randn(n, cols, generator=g) for n in periods]
    tables = [((x - x.mean(0)) * 0.3 * unit).bfloat16() for x in tables]
    p = nn.Parameter(torch.full((len(periods), cols), 1.5, dtype=torch.bfloat16))
    opt = memopt.create([p], f"sgd+{name}", lr=1.0)
    stacked, length = torch.cat(tables), torch.tensor(periods)
    begin = length.cumsum(0) - length
    exact = p.detach().double()
    fresh = torch.zeros(len(periods), cols, dtype=torch.float64)  # the variance, in units
    for step in range(steps):
        p.grad = stacked[begin + step % length]
        opt.step()
        exact -= p.grad.double()
        up = (p.grad.double() / unit) % 1
        fresh += up * (1 - up)
    value = MASTERS[name].read(p.detach(), opt.state[p].get("correction")).double()
    walked = ((value - exact) / unit).square().mean(1) / fresh.mean(1)
    assert (walked < 1).all(), dict(zip(periods, walked.sqrt().tolist(), strict=True))
    assert (walked > 0.1).all()  # it is stochastic
