"""Placements on a CUDA device: what the simulated one stands for, on the streams of a real one."""

import pytest
import torch
from torch import nn

import memopt
from tests.placements.test_placements import assert_same

pytestmark = pytest.mark.gpu

WIDTH = 1024


def trained(spec, between=lambda model: None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh()))).cuda()
    opt = memopt.create(model, spec, lr=1e-3, **options)
    for seed in range(6):
        x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(seed)).cuda()
        opt.zero_grad()
        model(x).square().mean().backward()
        between(model)
        opt.step()
    return model, opt


def halved(model):
    for p in model.parameters():
        p.grad.data.mul_(0.5)


@pytest.mark.parametrize("between", [lambda model: None, halved])
@pytest.mark.parametrize("workspace", ["8MiB", "256MiB"])
@pytest.mark.parametrize("spec", ["adamw@cpu", "adamw-8bit@cpu"])
def test_copies_in_backward_change_nothing(spec, workspace, between):
    reference = trained(spec, between, offload_gradients=False)
    model, opt = trained(spec, between, workspace=workspace, offload_gradients="early")
    assert_same((model, opt), reference)
    early = opt.placement_stores.of("")._prefetch
    assert early.made > 0 or between is halved
    assert early.stopped is None
    assert opt.ledger() == memopt.price(model, opt.spec, device="cuda:0")


def test_gradients_that_leave_the_card_change_nothing():
    reference = trained("adamw@cpu", offload_gradients=False)
    assert_same(trained("adamw@cpu", offload_gradients=True), reference)


@pytest.mark.parametrize("spec", ["adamw@host", "adamw-8bit@host", "adamw@disk"])
def test_streamed_state_is_that_of_the_card(spec):
    model, opt = trained(spec, workspace="8MiB")
    assert_same((model, opt), trained(str(memopt.parse(spec).replace(placement="device"))))
    assert opt.ledger() == memopt.price(model, opt.spec, device="cuda:0")
