"""What Prodigy's state takes, by price and live."""

from itertools import pairwise

import pytest
import torch

import memopt
from memopt.checkpoint.state.saved import LivePiece, Stored
from memopt.core.rows import FLAT_ROW, Rows, row_count
from memopt.formats import ALL_FORMATS, Shard
from memopt.formats.sliced import row_of
from memopt.rules import Moment
from tests.helpers.cases import assert_same_bits, live_nbytes
from tests.rules.test_prodigy import give, of


@pytest.mark.parametrize(
    ("spec", "hyper", "most"),
    [
        ("prodigy", {}, 16.0),
        ("prodigy-8bit", {}, 4.1),
        ("prodigy-8bit", {"sliced": True}, 2.8),
        ("prodigy-8bit.factored", {"sliced": True}, 1.8),
    ],
)
def test_bytes_of_a_parameter_by_price_and_live(spec, hyper, most):
    model = torch.nn.Linear(512, 1024, bias=False)
    opt = memopt.create(model, spec, **hyper)
    for _ in range(2):
        model.weight.grad = torch.randn_like(model.weight)
        opt.step()
    assert live_nbytes(opt) == memopt.price(model, spec, **hyper).nbytes
    assert live_nbytes(opt) - 4 <= most * model.weight.numel()


def test_slices_are_cut_as_rows_are():
    """The statistics of every eleventh element: the estimate is of them alone."""
    ours = of()
    opt = memopt.create(ours, "prodigy", d0=1e-3, sliced=True)
    for t in range(3):
        give(ours, t)
        opt.step()
    kept = [opt.state[p]["grad_sum"].numel() for p in ours]
    assert kept == [24 * 4, 24 + 4, 5, 1]
    whole = memopt.create(of(), "prodigy", d0=1e-3)
    assert opt.param_groups[0]["d"] > 1e-3
    report = opt.convert_("prodigy-8bit", sliced=False)
    assert opt.state[ours[0]]["moved"].shape == (24, 40), (report, whole)


@pytest.mark.parametrize("shape", [(600,), (515, 9), (4096, 2), (24, 70), (5, 3)], ids=str)
@pytest.mark.parametrize("unit", [FLAT_ROW, 1])
def test_slices_of_any_rows_are_those_of_the_whole(shape, unit):
    """Vectors and narrow rows also where a partition cuts between any two indices."""
    sliced, moment = ALL_FORMATS["sliced"], Moment("moved")
    rows = Rows.whole(shape).in_units(unit)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def held(some):
        parts = {"": torch.zeros(sliced.layout(moment, some)[""].shape)}
        sliced.write(x[slice(*some.bounds)], parts, moment, Shard(some))
        return parts[""]

    whole = held(rows)
    count = row_count(shape, unit)
    cuts = sorted({0, count // 3, count // 2, count})
    pieces = [rows._replace(first=a, stop=b) for a, b in pairwise(cuts)]
    assert_same_bits(torch.cat([held(piece) for piece in pieces]), whole)
    stored = Stored(moment, sliced, shape, tuple(LivePiece(piece, {"": held(piece)}) for piece in pieces))
    row = row_of(shape)
    kept = torch.cat([one[::11] for one in x.view(-1).split(row)])
    assert_same_bits(whole.view(-1), kept)
    for some in (*pieces, rows, rows._replace(first=count // 2 - 1, stop=count // 2 + 1), Rows.whole(shape)):
        expected = torch.where((torch.arange(x.numel()) % row % 11 == 0).view(shape), x, 0)
        assert_same_bits(stored.decode(some), expected[slice(*some.bounds)])
