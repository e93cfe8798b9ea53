"""The plain path in pieces: the bits of the whole, and memory that does not grow with the parameter."""

from __future__ import annotations

import pytest
import torch

import memopt
from memopt import kernels
from memopt.engines import row_chunks
from memopt.kernels import loader
from tests.helpers.cases import HYPER, PLAIN_SPECS, assert_same_bits


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader, "_loaded", loader.Missing("a test of the plain path"))
    assert kernels.library() is None


def run(spec: str, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in [(41, 129), (9, 3, 70), (5000,), (3,)]]
    opt = memopt.create(params, spec, **HYPER.get(memopt.parse(spec).rule, {}))
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(p.shape).to(dtype)
        opt.step()
    return [p.detach() for p in params] + [t for p in params for t in opt.state[p].values()]


@pytest.mark.parametrize("spec", [*PLAIN_SPECS, "adamw-8bit+split", "adamw+kahan", "lion-4bit+stochastic"])
def test_pieces_are_the_whole(spec, monkeypatch) -> None:
    dtype = torch.bfloat16 if "+" in spec else torch.float32
    whole = run(spec, dtype)
    monkeypatch.setattr(row_chunks, "PIECE", 700)
    for a, b in zip(whole, run(spec, dtype), strict=True):
        if a.numel():
            assert_same_bits(a, b, spec)


def test_the_memory_of_a_large_parameter_is_that_of_a_piece() -> None:
    pytest.importorskip("estimators")
    from estimators.measure import traced

    peaks = []
    for rows in (2048, 8192):
        p = torch.nn.Parameter(torch.zeros(rows, 1024, dtype=torch.bfloat16))
        opt = memopt.create([p], "adamw-8bit", nonfinite="propagate")
        p.grad = torch.ones_like(p)
        opt.step()
        peaks.append(traced(("step", opt.step)).peak)
    assert peaks[0] == peaks[1] < 64 * 2**20
