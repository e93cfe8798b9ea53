"""What users of torch.optim take for granted."""

import copy
import pickle

import pytest
import torch
from torch import nn

import memopt
from tests.helpers.cases import HYPER, PLAIN_SPECS, assert_same_bits, odd_model, thinned, train


def state_of(opt):
    return [t for state in opt.state.values() for t in state.values()]


def test_it_is_a_torch_optimizer():
    opt = memopt.create(nn.Linear(3, 2), "adamw-8bit", lr=1e-2)
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.param_groups[0]["lr"] == 1e-2
    assert opt.param_groups[0]["param_names"] == ["weight", "bias"]
    assert opt.defaults["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("spec", thinned(PLAIN_SPECS, 2))
def test_the_loss_falls(spec):
    torch.manual_seed(0)
    model, target = nn.Linear(80, 64, bias=False), torch.randn(64, 80) / 9
    x = torch.randn(256, 80)
    opt = memopt.create(model, spec, lr=1e-2, **HYPER.get(spec.split("-")[0], {}))
    first = None
    for _ in range(150):
        opt.zero_grad()
        loss = (model(x) - x @ target.T).square().mean()
        first = first if first is not None else loss.item()
        loss.backward()
        opt.step()
    assert loss.item() < first / 2


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    model = nn.Linear(3, 2)
    opt = memopt.create(model, "adamw")

    def closure():
        opt.zero_grad()
        loss = model(torch.ones(1, 3)).sum()
        loss.backward()
        return loss

    expected = model(torch.ones(1, 3)).sum().item()
    assert opt.step(closure).item() == expected
    assert int(opt.state[model.weight]["step"]) == 1


@pytest.mark.parametrize("rate", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
def test_schedulers_change_the_rate_that_is_used(rate):
    a, b = nn.Linear(5, 4), nn.Linear(5, 4)
    b.load_state_dict(a.state_dict())
    ours, theirs = memopt.create(a, "adamw", lr=rate), torch.optim.AdamW(b.parameters(), lr=1e-2)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(ours, 0.1, total_steps=20, cycle_momentum=True),
        torch.optim.lr_scheduler.OneCycleLR(theirs, 0.1, total_steps=20, cycle_momentum=True),
    ]
    for t in range(20):
        for model, opt in ((a, ours), (b, theirs)):
            torch.manual_seed(t)
            opt.zero_grad()
            model(torch.randn(7, 5)).square().sum().backward()
            opt.step()
        if t < 19:
            for schedule in schedules:
                schedule.step()
    torch.testing.assert_close(a.weight, b.weight, rtol=1e-6, atol=1e-7)


def test_grad_scaler_unscales_and_skips():
    model = nn.Linear(80, 64)
    opt = memopt.create(model, "adamw-8bit")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.ones(1, 80)).sum()).backward()
    scaler.step(opt)
    scaler.update()
    weight = model.weight.detach().clone()
    assert int(opt.state[model.weight]["step"]) == 1
    model.weight.grad.fill_(float("inf"))
    scaler.step(opt)
    scaler.update()
    assert int(opt.state[model.weight]["step"]) == 1
    assert_same_bits(weight, model.weight)
    assert scaler.get_scale() == 512.0


def test_clip_grad_norm_and_accumulation():
    a, b = odd_model(), odd_model()
    ours, theirs = memopt.create(a, "adamw", lr=1e-3), torch.optim.AdamW(b.parameters(), lr=1e-3)
    for step in range(5):
        for model, opt in ((a, ours), (b, theirs)):
            opt.zero_grad()
            for micro in range(2):
                model(10 * step + micro).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        # A hundredth of the rate: the model turns the last bit of a parameter into other gradients.
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_param_groups_have_their_own_hyperparameters():
    a, b = nn.Linear(5, 4), nn.Linear(5, 4)
    b.load_state_dict(a.state_dict())

    def groups(model):
        return [
            {"params": [model.weight], "weight_decay": 0.3},
            {"params": [model.bias], "lr": 0.1, "betas": (0.5, 0.9)},
        ]

    ours, theirs = memopt.create(groups(a), "adamw", lr=1e-2), torch.optim.AdamW(groups(b), lr=1e-2)
    for t in range(10):
        for model, opt in ((a, ours), (b, theirs)):
            torch.manual_seed(t)
            opt.zero_grad()
            model(torch.randn(7, 5)).square().sum().backward()
            opt.step()
    torch.testing.assert_close(a.weight, b.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(a.bias, b.bias, rtol=1e-6, atol=1e-7)


def test_add_param_group_mid_run():
    model, head = nn.Linear(80, 64), nn.Linear(64, 70)
    opt = memopt.create(model.parameters(), "adamw-8bit")
    for _ in range(2):
        opt.zero_grad()
        head(model(torch.ones(1, 80))).sum().backward()
        opt.step()
    before = head.weight.detach().clone()
    opt.add_param_group({"params": head.parameters(), "lr": 0.5})
    opt.step()
    assert not torch.equal(before, head.weight)
    assert opt.param_groups[1]["lr"] == 0.5
    assert opt.param_groups[1]["weight_decay"] == opt.defaults["weight_decay"]


def test_zero_grad():
    model = nn.Linear(3, 2)
    opt = memopt.create(model, "adamw")
    model(torch.ones(1, 3)).sum().backward()
    opt.zero_grad(set_to_none=False)
    assert model.weight.grad.abs().sum() == 0
    opt.zero_grad()
    assert model.weight.grad is None
    opt.step()  # nothing has a gradient
    assert not opt.state


def test_parameters_without_a_gradient_are_left_alone():
    model = nn.Linear(80, 64)
    opt = memopt.create(model, "adamw-8bit")
    model.bias.requires_grad_(False)
    before = model.bias.detach().clone()
    model(torch.ones(1, 80)).sum().backward()
    opt.step()
    assert_same_bits(before, model.bias)
    assert list(opt.state) == [model.weight]


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("spec", ["adamw", "adamw-8bit@paged", "adafactor", "sgd-4bit", "adamw-fp8/zero1"])
def test_a_copy_continues_as_the_original_and_shares_nothing(spec, copier):
    model = odd_model()
    opt = memopt.create(model, spec, **HYPER.get(spec.split("-")[0], {}))
    train(model, opt, 0, 3)
    twin, twin_opt = copier((model, opt))
    assert str(twin_opt.spec) == spec
    assert twin_opt.ledger() == opt.ledger()
    train(model, opt, 3, 3)
    train(twin, twin_opt, 3, 3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits(p, q)
    for a, b in zip(state_of(opt), state_of(twin_opt), strict=True):
        assert_same_bits(a, b)
        assert a.numel() == 0 or a.data_ptr() != b.data_ptr()


def test_hooks_run():
    model = nn.Linear(3, 2)
    opt = memopt.create(model, "adamw")
    seen = []
    opt.register_step_pre_hook(lambda *a: seen.append("pre"))
    opt.register_step_post_hook(lambda *a: seen.append("post"))
    opt.register_state_dict_post_hook(lambda *a: seen.append("saved"))
    opt.register_load_state_dict_pre_hook(lambda *a: seen.append("load"))
    opt.register_load_state_dict_post_hook(lambda *a: seen.append("loaded"))
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert seen == ["pre", "post", "saved", "load", "loaded"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", thinned(PLAIN_SPECS, 2))
def test_low_precision_parameters(spec, dtype):
    model = odd_model(dtype)
    before = model.wide.weight.detach().clone()
    opt = memopt.create(model, spec, lr=1e-2, **HYPER.get(spec.split("-")[0], {}))
    train(model, opt, 0, 3)
    for p in model.parameters():
        assert p.dtype == dtype
        assert torch.isfinite(p).all()
    assert not torch.equal(before, model.wide.weight)


@pytest.mark.parametrize("spec", ["adamw-8bit", "adafactor", "adamw-4bit", "adamw-bf16"])
def test_non_contiguous_parameters_step_as_contiguous_ones(spec):
    torch.manual_seed(0)
    values, grad = torch.randn(70, 96), torch.randn(70, 96)
    flat = values.clone().requires_grad_()
    turned = values.t().contiguous().t().requires_grad_()
    assert not turned.is_contiguous()
    for p in (flat, turned):
        opt = memopt.create([p], spec, lr=0.1)
        for t in range(3):
            p.grad = (grad * (t + 1)).clone()
            opt.step()
    torch.testing.assert_close(flat, turned, rtol=1e-6, atol=1e-7)


def test_init_state_moves_nothing_and_allocates_everything():
    model = odd_model()
    before = copy.deepcopy(model.state_dict())
    opt = memopt.create(model, "adamw-8bit")
    opt.init_state()
    assert opt.ledger() == memopt.price(model, "adamw-8bit")
    assert all(t.abs().sum() == 0 for t in state_of(opt) if t.numel() and t.dtype != torch.float8_e4m3fn)
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name])


def test_overrides_choose_the_format_by_name():
    model = odd_model()
    overrides = {"embedding.*": "32bit", "*.weight": "4bit@paged"}
    opt = memopt.create(model, "adamw-8bit", overrides=overrides)
    opt.init_state()
    dtypes = {(line.parameter, line.key): (line.dtype, line.location) for line in opt.ledger()}
    assert dtypes["embedding.weight", "exp_avg"] == ("float32", "cpu")
    assert dtypes["conv.weight", "exp_avg.codes"] == ("uint8", "paged:cpu")
    assert dtypes["vector", "exp_avg.codes"] == ("int8", "cpu")
    assert opt.ledger() == memopt.price(model, "adamw-8bit", overrides=overrides)
    train(model, opt, 0, 2)


def test_explain_names_what_was_not_done_as_asked():
    opt = memopt.create(odd_model(), "adamw-8bit", overrides={"wide.*": "4bit"})
    text = opt.explain()
    assert "adamw-8bit" in text
    assert "fewer than 4096 elements" in text
    assert "empty.exp_avg, empty.exp_avg_sq" in text
    assert "'wide.*' -> 4bit" in text
    assert "skip; 0 steps skipped" in text
    assert "adamw-8bit" in repr(opt)


def test_explain_names_parameters_that_the_kernels_do_not_step():
    from memopt import kernels

    if kernels.library() is None:
        assert "the plain torch path" in memopt.create(nn.Linear(3, 2), "adamw").explain()
        return
    mixed = memopt.create([("a", nn.Parameter(torch.ones(3))), ("b", nn.Parameter(torch.ones(3).double()))], "adamw")
    assert "fused C++ kernels" in mixed.explain()
    assert (
        "stepped by  the plain torch path: the kernels take fp32, bf16 and fp16, and it is float64: b"
        in mixed.explain()
    )


def test_a_parameter_that_went_to_the_group_beside_it():
    """All parameters are in the order in which they were, and one has another rate."""
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    opt = memopt.create([{"params": [p], "lr": lr} for p, lr in zip(params, (0.1, 0.2), strict=True)], "sgd")
    for expected in (0.2, 0.3):
        for p in params:
            p.grad = torch.ones(4)
        opt.step()
        assert torch.allclose(params[1], torch.full((4,), -expected))
        opt.param_groups[0]["params"], opt.param_groups[1]["params"] = params, []


def test_explain_counts_what_trains():
    model = nn.Sequential(nn.Linear(80, 64), nn.Linear(64, 64), nn.Linear(64, 2)).bfloat16()
    model[0].requires_grad_(False)
    opt = memopt.create(model, "adamw-8bit+split")
    assert "(4 parameters)" in opt.explain()
    assert "for 4 of 4 parameters" in opt.explain()
    assert "frozen      requires_grad is False, without gradients and steps: 0.weight, 0.bias" in opt.explain()
    model[0].requires_grad_(True)
    assert "(6 parameters)" in opt.explain()
