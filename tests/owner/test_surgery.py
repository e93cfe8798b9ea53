"""Rows of state selected, appended, reset: codes of rows that stay are what they were, and the rest is torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import memopt
from tests.helpers.cases import HYPER, SPECS, assert_same_bits
from tests.helpers.surgery import made, step

#: Every format and master, rules with every kind of moment, every placement and /zero1.
SAMPLE = [
    *(f"adamw-{fmt}" for fmt in ("32bit", "bf16", "8bit", "fp8", "4bit", "factored")),
    *("adafactor", "came-8bit", "adammini-4bit", "lookahead(adamw)-8bit", "sgd-8bit", "lion-4bit", "ademamix-8bit"),
    *(f"adamw-8bit@{place}" for place in ("host", "cpu", "paged", "disk")),
    *("adamw-4bit/zero1", "adafactor/zero1"),
    *(f"adamw-8bit+{master}" for master in ("fp32", "kahan", "split", "split16", "stochastic")),
]


def rowwise(key: str, x: Tensor, p: nn.Parameter) -> bool:
    """Whether a part lies along the rows of its parameter."""
    return key != "step" and not key.endswith(".col") and x.dim() > 0 and len(x) == len(p)


@pytest.mark.parametrize("spec", SAMPLE)
def test_rows_that_stay_keep_their_bits(spec):
    """Weights and every part of the state, for matrices and stacks in any format."""
    params, opt = made(spec)
    index = {id(p): torch.randperm(len(p))[: len(p) - 2].sort().values for p in params}
    before = {id(p): (p.detach().clone(), {k: v.clone() for k, v in opt.state[p].items()}) for p in params}
    for p in params:
        opt.select_rows(p, index[id(p)])
    for p in params:
        weights, state = before[id(p)]
        assert_same_bits(p, weights[index[id(p)]])
        assert opt.state[p].keys() == state.keys()
        for key, x in state.items():
            if rowwise(key, x, weights) and (p.dim() > 1 or "." not in key):
                assert_same_bits(opt.state[p][key], _rows(x, index[id(p)]), f"{spec} {tuple(p.shape)} {key}")
    assert {line[:6] for line in opt.ledger() if line.lifetime == "persistent"} == {
        line[:6] for line in priced(spec, params) if line.lifetime == "persistent"
    }
    step(params, opt, 2, first=7)
    assert all(bool(p.isfinite().all()) for p in params)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    bits = x.view(torch.uint8) if x.itemsize == 1 else x
    return bits[index].view(x.dtype)


def priced(spec, params):
    return memopt.price(list(params), spec, **HYPER.get(memopt.parse(spec).rule, {}))


@pytest.mark.parametrize("spec", SAMPLE)
def test_appended_rows_begin_at_zero(spec):
    params, opt = made(spec)
    before = {id(p): {k: v.clone() for k, v in opt.state[p].items()} for p in params}
    count = {id(p): len(p) for p in params}
    for p in params:
        opt.append_rows(p, torch.ones(3, *p.shape[1:]))
    for p in params:
        n = count[id(p)]
        assert torch.equal(p[n:], torch.ones_like(p[n:]))
        for key, x in before[id(p)].items():
            now = opt.state[p][key]
            if key != "step" and not key.endswith(".col") and len(x) == n and (p.dim() > 1 or "." not in key):
                assert_same_bits(now[:n], x, f"{spec} {tuple(p.shape)} {key}")
                begins = key == "slow"
                assert torch.equal(now[n:].float(), torch.full_like(now[n:], float(begins), dtype=torch.float32)), key
    step(params, opt, 2, first=7)
    assert all(bool(p.isfinite().all()) for p in params)


def by_hand(state: dict[str, Tensor], index: Tensor, dim: int) -> None:
    """The rows ``index``, two more and the first and the fourth of zeros, in torch.optim's state. The column means of a
    matrix become those of the rows that are left, of the matrix for which the factors stand."""
    mean = state["row_var"].mean() if "row_var" in state else None
    for key, x in state.items():
        if key != "step" and not (key == "col_var" and dim == 2):
            state[key] = torch.cat([x[index], torch.zeros(2, *x.shape[1:])])
            state[key][[0, 3]] = 0
    if mean is not None and dim == 2:
        state["col_var"] = state["col_var"] * (state["row_var"].mean() / mean)


@pytest.mark.parametrize("rule", ["adamw", "adam", "rmsprop", "sgd", "adafactor"])
def test_as_torch_by_hand(rule):
    """Rows cloned, split and pruned, and moments reset, as scripts do it to torch.optim: the same run."""
    ours, opt = made(rule, **({"convention": "torch"} if rule == "adafactor" else {}))
    theirs, _ = made(rule, 0)
    cls = {"adamw": "AdamW", "adam": "Adam", "rmsprop": "RMSprop", "sgd": "SGD", "adafactor": "Adafactor"}[rule]
    other = getattr(torch.optim, cls)(theirs, lr=1e-2, **HYPER.get(rule, {}))
    step(theirs, other, 3)
    g = torch.Generator().manual_seed(5)
    for p, q in zip(ours, theirs, strict=True):
        index = torch.randint(0, len(p), (len(p) + 4,), generator=g)
        new = torch.randn(2, *p.shape[1:], generator=g)
        opt.select_rows(p, index)
        opt.append_rows(p, new)
        opt.reset_state(p, rows=[0, 3])
        by_hand(other.state[q], index, q.dim())
        q.data = torch.cat([q.data[index], new])
    step(ours, opt, 4, first=20)
    step(theirs, other, 4, first=20)
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).abs().max() <= 2e-6 * q.abs().max()


@pytest.mark.parametrize("spec", SPECS[:: len(SPECS) // 60])
def test_every_kind_of_spec(spec):
    """All rows of a reset, and a reset with the count, is an optimizer that begins; a weight swapped for another goes
    on with its state."""
    params, opt = made(spec, 2)
    opt.reset_state(step=0)
    for p in params:
        for key, x in opt.state[p].items():
            expected = p if key == "slow" else torch.zeros_like(x)
            assert torch.equal(x.float(), expected.float()), key
    new = [nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(params, new, strict=True):
        opt.select_rows(p, range(len(p)), into=q)
    step(new, opt, 3)
    other, fresh = made(spec, 0)
    for p, q in zip(other, made(spec, 2)[0], strict=True):
        p.data.copy_(q.detach())
    step(other, fresh, 3)
    for p, q in zip(new, other, strict=True):
        assert_same_bits(p, q)
    opt.close()


def test_a_weight_that_has_grown_already():
    """``resize_token_embeddings`` leaves the Parameter and changes its data; the state follows."""
    model = nn.Embedding(500, 64)
    opt = memopt.create(model, "adamw-8bit")
    model(torch.arange(500)).square().sum().backward()
    opt.step()
    opt.zero_grad()
    codes = opt.state[model.weight]["exp_avg.codes"].clone()
    model.weight.data = torch.cat([model.weight.data, torch.zeros(12, 64)])
    opt.append_rows(model.weight)
    assert torch.equal(opt.state[model.weight]["exp_avg.codes"][:500], codes)
    model(torch.arange(512)).square().sum().backward()
    opt.step()
    assert opt.ledger() == memopt.price(model, "adamw-8bit")
    model.weight.data = model.weight.data[:100]
    opt.select_rows(model.weight, range(100))
    assert opt.state[model.weight]["exp_avg.codes"].shape == (100, 64)


def test_a_loss_that_is_still_in_a_variable():
    """Its graph holds the node that adds up gradients of the old size."""
    embedding = nn.Embedding(50, 64)
    opt = memopt.create(embedding, "adamw")
    loss = embedding(torch.arange(50)).square().sum()
    loss.backward()
    opt.step()
    opt.append_rows(embedding.weight, torch.zeros(3, 64))
    again = embedding(torch.arange(53)).square().sum()
    again.backward()
    opt.step()
    opt.select_rows(embedding.weight, range(20))
    embedding(torch.arange(20)).square().sum().backward()
    opt.step()
    assert embedding.weight.shape == (20, 64)


def test_a_weight_that_becomes_large_enough_to_be_coded():
    p = nn.Parameter(torch.randn(40, 64))
    opt = memopt.create([p], "adamw-8bit")
    step([p], opt, 2)
    exp_avg = opt.state[p]["exp_avg"].clone()
    opt.append_rows(p, torch.randn(60, 64))
    scales = opt.state[p]["exp_avg.scales"]
    assert torch.equal(scales[:40].view(-1), exp_avg.abs().amax(1))
    assert not scales[40:].any()
    opt.select_rows(p, range(40))
    assert (opt.state[p]["exp_avg"] - exp_avg).abs().max() <= 0.02 * exp_avg.abs().max()


def test_a_row_in_a_directory_survives(tmp_path):
    """What was committed is the state of before or of after, and a process that begins anew goes on with it."""
    params, opt = made("adamw-8bit@disk", directory=tmp_path / "state")
    opt.append_rows(params[0], torch.randn(2, 67))
    step(params, opt, 1, first=9)
    saved = {k: v.clone() for k, v in opt.state[params[0]].items()}
    opt.close()
    again = memopt.create(params, "adamw-8bit@disk", lr=1e-2, directory=tmp_path / "state")
    with pytest.warns(UserWarning, match="gone on with"):
        again.init_state()
    for key, x in saved.items():
        assert_same_bits(again.state[params[0]][key], x, key)
    again.close()


def test_what_is_refused_changes_nothing():
    params, opt = made("adamw-8bit")
    p = params[0]
    bad = [
        (IndexError, "rows 0 to 69", lambda: opt.select_rows(p, [0, 70])),
        (IndexError, "-1", lambda: opt.select_rows(p, [-1])),
        (ValueError, "vector of integers or a mask", lambda: opt.select_rows(p, torch.ones(69, dtype=torch.bool))),
        (ValueError, "not one of this optimizer", lambda: opt.select_rows(torch.zeros(3), [0])),
        (ValueError, "in the place of", lambda: opt.select_rows(p, [0], into=nn.Parameter(torch.zeros(1, 66)))),
        (ValueError, "already", lambda: opt.select_rows(p, range(70), into=p)),
        (ValueError, "3 are selected", lambda: opt.select_rows(p, [1, 2, 3], into=nn.Parameter(torch.zeros(2, 67)))),
        (ValueError, "rows are of shape", lambda: opt.append_rows(p, torch.zeros(2, 66))),
        (ValueError, "none to append", lambda: opt.append_rows(p)),
        (memopt.SpecError, "no moment 'momentum_buffer'", lambda: opt.reset_state(p, "momentum_buffer")),
        (memopt.SpecError, "step=-1", lambda: opt.reset_state(p, step=-1)),
        (IndexError, "rows 0 to 4", lambda: opt.reset_state(rows=[69])),
    ]
    before = [(q.detach().clone(), {k: v.clone() for k, v in opt.state[q].items()}) for q in params]
    for error, words, call in bad:
        with pytest.raises(error, match=words):
            call()
    for q, (weights, state) in zip(params, before, strict=True):
        assert_same_bits(q, weights)
        for key, x in state.items():
            assert_same_bits(opt.state[q][key], x, key)
    model = nn.Linear(64, 70)
    opt = memopt.create(model, "adamw-8bit")
    opt.release_gradients(model)
    with pytest.raises(RuntimeError, match=r"release\.remove"):
        opt.append_rows(model.weight, torch.zeros(1, 64))
