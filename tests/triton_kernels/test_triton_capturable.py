"""capturable=True: a step that a CUDA graph may record, which counts on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import memopt
from memopt import kernels
from memopt.kernels.triton import upload
from memopt.kernels.triton.upload import write_by_value
from tests.helpers.cases import assert_same_bits, live_nbytes
from tests.helpers.interpreting import DEVICE, gradients, parameters


def test_a_graph_and_steps_between_its_runs_have_each_their_own_numbers(monkeypatch) -> None:
    """``graph`` is what a capture records: the writes of numbers that travel as arguments."""
    graph: list[Callable[[], None]] = []
    capturing = False

    def write(tensor: torch.Tensor, values: list[float]) -> None:
        assert capturing
        graph.append(lambda: write_by_value(tensor, values))

    monkeypatch.setattr(upload, "capturing", lambda device: capturing)
    monkeypatch.setattr(upload, "write_by_value", write)
    numbers = upload.Uploaded(torch.float64, 3, torch.device(DEVICE))
    numbers.set([1.0, 2.0, 3.0])
    capturing = True
    numbers.set([1.0, 2.0, 3.0])  # which are there, and yet the graph's
    capturing = False
    for _ in range(2):
        numbers.set([4.0, 5.0, 6.0])
        assert numbers.tensor.tolist() == [4.0, 5.0, 6.0]
        for replayed in graph:
            replayed()
        assert numbers.tensor.tolist() == [1.0, 2.0, 3.0]


def test_parameters_on_two_devices_cannot_be_captured() -> None:
    ready: list[Any] = [(None, torch.zeros(3, device=device)) for device in ("cpu", "meta")]
    with pytest.raises(RuntimeError, match="for parameters on one device, and these are on cpu, meta"):
        kernels.check_capturable(ready, 1)


def test_capturable_keeps_the_step_on_the_device_and_is_priced_so(on) -> None:
    pytest.importorskip("triton", minversion="3.3")
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
