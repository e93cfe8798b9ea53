"""Formats: error bounds, no bias, zero bytes are zero, shards are rows of the whole."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.core import dither
from memopt.core.ledger import ITEMSIZE
from memopt.core.rows import FLAT_ROW, Rows, row_count
from memopt.formats import FORMATS, Shard, int4, int8
from memopt.formats.blockwise import truncate
from memopt.rules import Moment
from tests.helpers.cases import assert_same_bits

SIGNED = Moment("m")
POSITIVE = Moment("v", signed=False, factorable=True)
ENCODED = [(name, m) for name in ("bf16", "8bit", "fp8", "4bit") for m in (SIGNED, POSITIVE)]
IDS = [f"{name}-{'signed' if m.signed else 'positive'}" for name, m in ENCODED]
SHAPES = [(64, 64), (70, 201), (5, 1000), (4097,), (9000,), (3, 40, 50), (33, 129)]

#: Largest error of one element, relative to itself at or above ``floor`` of its block's maximum, and relative to the
#: block's maximum below it.
BOUNDS = {
    ("bf16", True): (2**-7, 0.0),
    ("bf16", False): (2**-7, 0.0),
    ("8bit", True): (0.25, 2**-7),
    ("8bit", False): (0.25, 1.625 * 2**-17),
    ("fp8", True): (2**-3, 2**-14),
    ("fp8", False): (2**-3, 2**-14),
    ("4bit", True): (1.0, 0.34),
    ("4bit", False): (1.0, 2**-14),
}


def empty_parts(fmt, moment, rows):
    return {k: torch.zeros(t.shape, dtype=getattr(torch, t.dtype)) for k, t in fmt.layout(moment, rows).items()}


def encode(name, moment, x, shard):
    parts = empty_parts(FORMATS[name], moment, shard.rows)
    FORMATS[name].write(x, parts, moment, shard)
    return parts


def values(shape, moment, seed=0):
    """Ten decades of magnitudes in one tensor, with zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * 10 ** torch.empty(shape).uniform_(-5, 5, generator=g)
    x[torch.rand(shape, generator=g) < 0.05] = 0.0
    return x if moment.signed else x.abs()


def block_maximum(x, rows, name):
    from memopt.formats.base import as_blocks, from_blocks

    block = 128 if name == "4bit" else 256
    blocks = as_blocks(x.abs(), rows, block)
    return from_blocks(blocks.amax(-1, keepdim=True).expand_as(blocks).contiguous(), rows)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "moment"), ENCODED, ids=IDS)
def test_error_of_one_element(name, moment, shape):
    rows = Rows.whole(shape)
    x = values(shape, moment)
    back = FORMATS[name].read(encode(name, moment, x, Shard(rows, 7, 3)), moment, Shard(rows))
    relative, floor = BOUNDS[name, moment.signed]
    largest = block_maximum(x, rows, name)
    error = (back - x).abs()
    assert (error <= (relative * x.abs()).maximum(floor * largest) * 1.0001).all()
    assert ((back == 0) | (back.sign() == x.sign())).all()
    assert back.shape == x.shape
    assert back.dtype == torch.float32


@pytest.mark.parametrize(("name", "moment"), ENCODED, ids=IDS)
def test_zero_bytes_decode_to_zero_and_zero_encodes_to_zero(name, moment):
    for shape in SHAPES:
        rows = Rows.whole(shape)
        shard = Shard(rows, 1, 1)
        parts = empty_parts(FORMATS[name], moment, rows)
        assert FORMATS[name].read(parts, moment, shard).abs().sum() == 0
        for tensor in encode(name, moment, torch.zeros(shape), shard).values():
            assert (tensor.contiguous().view(torch.uint8) == 0).all()


@pytest.mark.parametrize("name", ["8bit", "fp8", "4bit", "bf16"])
def test_no_positive_value_is_stored_as_zero(name):
    rows = Rows.whole((16, 256))
    x = torch.full((16, 256), 1e-20)
    x[:, 0] = 1.0
    back = FORMATS[name].read(encode(name, POSITIVE, x, Shard(rows, 1, 1)), POSITIVE, Shard(rows))
    assert (back > 0).all()


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-7, 1e20, 1e37])
@pytest.mark.parametrize(("name", "moment"), ENCODED, ids=IDS)
def test_extreme_scales_stay_finite_and_close(name, moment, scale):
    rows = Rows.whole((16, 256))
    x = torch.rand(16, 256) * 0.9 + 0.1
    x[:, ::7] = 1.0
    back = FORMATS[name].read(encode(name, moment, x * scale, Shard(rows, 1, 1)), moment, Shard(rows)) / scale
    assert torch.isfinite(back).all()
    if scale > 1e-35:  # below, 1 / scale is clamped and codes lose range
        assert ((back - x).abs() <= x * max(BOUNDS[name, moment.signed])).all()


@pytest.mark.parametrize(("name", "moment"), [(n, m) for n, m in ENCODED if m.signed], ids=lambda v: str(v)[:6])
def test_signed_codes_are_unbiased(name, moment):
    """Over many steps the average of what is stored is what was written, to a hundredth of the code's step."""
    x = torch.randn(16, 256)
    rows = Rows.whole((16, 256))
    steps = 2000
    total = torch.zeros_like(x)
    for t in range(steps):
        total += FORMATS[name].read(encode(name, moment, x, Shard(rows, 5, t)), moment, Shard(rows))
    step = BOUNDS[name, True][0] * x.abs().maximum(BOUNDS[name, True][1] * x.abs().amax(1, keepdim=True))
    assert ((total / steps - x).abs() <= 0.01 * step + 1e-6).all()


@pytest.mark.parametrize(("name", "moment"), ENCODED, ids=IDS)
def test_the_dither_is_unbiased_over_elements(name, moment):
    """One step, many equal elements: the average is the value written; in 4 bits and fp8 that of fourth roots is."""
    x = torch.full((64, 256), 0.3)
    x[:, 0] = 1.0
    rows = Rows.whole((64, 256))
    back = FORMATS[name].read(encode(name, moment, x, Shard(rows, 3, 9)), moment, Shard(rows))[:, 1:]
    power = 0.25 if name in ("4bit", "fp8") and not moment.signed else 1.0
    back = back.abs() ** power
    step = float(back.max() - back.min())
    assert abs(float(back.mean()) - 0.3**power) <= step * 4 * 0.5 / (64 * 255) ** 0.5 + 1e-6


def test_an_octave_of_4_bits_takes_its_time():
    """Down from 2^k to 2^(k-1) at a fraction d per step takes ln 2 / d steps: the chance of the lower code is what is
    gone of the octave in log x, to 2 % of it. And what is a code stays it."""
    words = torch.linspace(-(2.0**31), 2.0**31 - 256, 100_001, dtype=torch.float64).to(torch.int32)
    for f in (0.0, 0.1, 0.5, 0.9):
        y = torch.full_like(words, 1 + f, dtype=torch.float32)
        up = truncate(y, int4.SHIFT, int4.added_in_roots(words)).view(torch.float32) == 2
        assert float(up.double().mean()) == pytest.approx(math.log2(1 + f), abs=0.025 if f else 0)


def test_codes_of_8_bits_are_close_near_the_largest_and_stay_what_they_are():
    """Codes for each octave from the block's maximum down, their relative distance, and every code coded again."""
    rows = Rows.whole((16, 256))
    parts = empty_parts(FORMATS["8bit"], POSITIVE, rows)
    parts["codes"].copy_(torch.arange(256, dtype=torch.uint8).expand(16, 256))
    parts["scales"].fill_(3.0)
    x = FORMATS["8bit"].read(parts, POSITIVE, Shard(rows))
    values = x[0] / 3
    assert (values[0], values[1], values[255]) == (0, 1.625 * 2**-17, 1)
    octaves = [int(((values < 2.0**-k) & (values >= 2.0 ** -(k + 1))).sum()) for k in range(16)]
    assert octaves == [60, 32, 30, 16, 16, 16, 15, 8, 8, 8, 8, 8, 8, 8, 7, 4]
    apart = values[2:] / values[1:-1] - 1
    assert (apart > 0).all()
    for above, most in ((0.5625, 1 / 64), (0.5, 1 / 32), (2**-6, 1 / 16), (2**-14, 1 / 8), (2**-17, 0.25)):
        assert apart[values[1:-1] >= above].max() <= most
    for step in range(8):
        again = encode("8bit", POSITIVE, x, Shard(rows, 7, step))
        assert torch.equal(again["codes"], parts["codes"])


@pytest.mark.parametrize("name", ["8bit", "fp8", "4bit"])
def test_blocks_that_are_not_finite_stay_so(name):
    """A NaN spreads over its block, beside an Inf all that is not zero is infinite."""
    rows = Rows.whole((16, 256))
    x = torch.rand(16, 256) + 0.1
    x[0, 3], x[1, 3], x[1, 4] = math.nan, math.inf, 0.0
    back = FORMATS[name].read(encode(name, POSITIVE, x, Shard(rows, 7, 3)), POSITIVE, Shard(rows))
    assert back[0, :128].isnan().all()
    if name != "fp8":
        assert back[1, 3].isinf()
        assert back[1, 4] == 0
    assert back[2:].isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 40), st.integers(64, 300))
    | st.tuples(st.integers(0, 6000))
    | st.tuples(st.integers(65, 700), st.integers(7, 63)),
    world=st.integers(1, 5),
    case=st.sampled_from(ENCODED),
    seed=st.integers(0, 2**32 - 1),
)
def test_shards_are_rows_of_the_whole_bit_for_bit(shape, world, case, seed):
    from memopt.partitions import PARTITIONS
    from memopt.partitions.base import owned

    name, moment = case
    x = values(shape, moment, seed)
    rows = Rows.whole(shape)
    whole = encode(name, moment, x, Shard(rows, seed, 11))
    pieces = []
    for rank in range(world):
        mine = PARTITIONS["zero1"].rows(shape, rank, world)
        pieces.append(encode(name, moment, owned(x, mine).contiguous(), Shard(mine, seed, 11)))
        assert pieces[-1]["codes" if "codes" in whole else ""].numel() * 2 >= mine.numel
    for part, tensor in whole.items():
        assert_same_bits(torch.cat([piece[part] for piece in pieces]), tensor)


@given(
    st.lists(st.integers(0, 9), max_size=4).map(tuple) | st.tuples(st.integers(65, 900), st.integers(1, 63)),
    st.integers(1, 9),
)
def test_rows_cover_a_parameter_once(shape, world):
    from memopt.partitions import PARTITIONS

    ranks = [PARTITIONS["zero1"].rows(shape, r, world) for r in range(world)]
    assert ranks[0].first == 0
    assert ranks[-1].stop == row_count(shape)
    assert all(a.stop == b.first for a, b in pairwise(ranks))
    assert sum(r.numel for r in ranks) == Rows.whole(shape).numel
    for mine in (PARTITIONS["zero3"].rows(shape, r, world) for r in range(world)):
        again = mine.in_units(1).in_units(FLAT_ROW)
        assert mine.bounds == mine.in_units(1).bounds
        if mine.count:
            assert again.bounds[0] <= mine.bounds[0]
            assert again.bounds[1] >= mine.bounds[1]
    assert max(r.count for r in ranks) <= -(-row_count(shape) // world)


def test_words_are_a_function_of_row_column_and_step_only():
    whole = dither.bits(123, 7, 0, 10, 300, "cpu")
    assert torch.equal(dither.bits(123, 7, 4, 3, 200, "cpu"), whole[4:7, :200])
    k = dither.mix(123 ^ 5) + 17 * dither.ALONG + 7 * dither.GOLDEN
    assert int(whole[5, 17]) & dither.MASK == k & dither.MASK
    assert not torch.equal(dither.bits(124, 7, 0, 10, 300, "cpu"), whole)


@pytest.mark.parametrize("axis", ["rows", "columns", "steps"])
def test_words_are_evenly_spread(axis):
    """4096 words along rows are as even as chance makes them; along columns and over steps they are more even."""
    if axis == "steps":
        words = torch.cat([dither.bits(99, t, 0, 1, 1, "cpu").flatten() for t in range(4096)])
    else:
        rows, cols = (4096, 1) if axis == "rows" else (1, 4096)
        words = dither.bits(99, 1, 0, rows, cols, "cpu").flatten()
    for shift in (24, 28):  # the upper bits are the ones that round
        bins = 1 << (32 - shift)
        counts = torch.bincount((words >> shift) & (bins - 1), minlength=bins).double()
        expected = 4096 / bins
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        five_sigma = (bins - 1) + 5 * (2 * (bins - 1)) ** 0.5
        assert chi2 < (five_sigma if axis == "rows" else bins / 4)


def test_factored_means_survive_and_rank_one_is_exact():
    row, col = torch.rand(70, 1) + 0.1, torch.rand(1, 90) + 0.1
    rows = Rows.whole((70, 90))
    parts = empty_parts(FORMATS["factored"], POSITIVE, rows)
    seen = FORMATS["factored"].write(row * col, parts, POSITIVE, Shard(rows))
    torch.testing.assert_close(seen, row * col, rtol=1e-5, atol=0)
    x = torch.rand(70, 90)
    seen = FORMATS["factored"].write(x, parts, POSITIVE, Shard(rows))
    torch.testing.assert_close(seen.mean(1), x.mean(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(seen.mean(0), x.mean(0), rtol=1e-5, atol=0)


def test_flat_rows_are_a_multiple_of_every_block():
    from memopt.formats import fp8, int4

    assert all(FLAT_ROW % block == 0 for block in (int8.CODE.block, int4.CODE.block, fp8.BLOCK))
    assert set(ITEMSIZE) >= {"float32", "bfloat16", "int8", "uint8", "float8_e4m3fn"}
