"""A conversion that memory, disk or a person stops in the middle."""

import pytest
import torch

import memopt
from tests.helpers.cases import odd_model, train


def tensors(opt):
    return {p: {k: t.clone() for k, t in s.items()} for p, s in opt.state.items() if s}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(t, other[k]) for k, t in state.items())


@pytest.mark.parametrize(
    ("before", "after", "dtype", "error"),
    [
        ("adamw", "adamw-8bit", torch.float32, MemoryError("no memory")),
        ("adamw-8bit", "adamw-4bit@paged", torch.float32, OSError(28, "No space left on device")),
        ("adamw", "adamw-4bit", torch.float32, KeyboardInterrupt()),
        ("adamw@disk", "adamw-8bit@disk", torch.float32, MemoryError("no memory")),
        ("adamw-8bit", "adamw@disk", torch.float32, OSError(28, "No space left on device")),
        ("adamw@disk", "lamb@disk", torch.float32, MemoryError("no memory")),
    ],
)
def test_a_conversion_that_stops_anywhere_leaves_an_optimizer_that_works(before, after, dtype, error, monkeypatch):
    from memopt.checkpoint.conversion import replace_state

    model = odd_model(dtype)
    opt = memopt.create(model, before, overrides={"norm.*": "32bit"})
    train(model, opt, 0, 1)
    saved, weights = opt.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    old, names = tensors(opt), [name for name, _ in model.named_parameters()]
    opt.convert_(after)
    new = tensors(opt)
    fill = replace_state.fill_state
    for stop in range(0, len(names), 5 if "@disk" in before + after else 1):
        model.load_state_dict(weights)
        opt = memopt.create(model, before, overrides={"norm.*": "32bit"})
        opt.load_state_dict(saved)
        left = [stop]

        def failing(param, *arguments, left=left):
            left[0] -= 1
            if left[0] < 0:
                param.targets(arguments[0], 1)  # in the middle of it, new state being there
                raise error
            fill(param, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(replace_state, "fill_state", failing)
            kind, words = (RuntimeError, names[stop]) if isinstance(error, Exception) else (type(error), None)
            with pytest.raises(kind, match=words):
                opt.convert_(after)
        for i, (p, state) in enumerate(opt.state.items()):
            converted = i < stop and memopt.parse(before).rule == memopt.parse(after).rule and "+" not in after
            assert same(state, new[p] if converted else old[p]), names[i]
        assert opt.ledger() == memopt.price(model, opt.spec)
        twin = memopt.create(model, opt.spec)
        twin.load_state_dict(opt.state_dict())
        begin = {k: v.clone() for k, v in model.state_dict().items()}
        train(model, opt, 1, 1)
        gone_on = tensors(opt)
        model.load_state_dict(begin)
        train(model, twin, 1, 1)
        assert all(same(state, gone_on[p]) for p, state in twin.state.items())
        opt.convert_(after, overrides={"norm.*": "32bit"})
        assert opt.ledger() == memopt.price(model, opt.spec)


@pytest.mark.parametrize(
    ("before", "after", "keywords", "error"),
    [
        ("adamw-8bit", "adamw-8bit+split", {}, RuntimeError("out of memory")),
        ("adamw", "adafactor", {}, MemoryError("no memory")),
        ("adamw", "lion-8bit", {"lr": 1e-4}, KeyboardInterrupt()),
        ("adamw", "sgd", {"momentum": 0.9, "fill": {"momentum_buffer": "exp_avg"}}, MemoryError("no memory")),
    ],
)
def test_between_two_rules_the_same_call_goes_on(before, after, keywords, error, monkeypatch):
    from memopt.checkpoint.conversion import replace_state

    model = odd_model(torch.bfloat16)
    opt = memopt.create(model, before)
    train(model, opt, 0, 1)
    saved = opt.state_dict()
    old, names = tensors(opt), [name for name, _ in model.named_parameters()]
    report = opt.convert_(after, **keywords)
    new = tensors(opt)
    fill = replace_state.fill_state

    def stop_after(count):
        left = [count]

        def failing(*arguments):
            left[0] -= 1
            fill(*arguments)
            if left[0] < 0:
                raise error

        with monkeypatch.context() as patch:
            patch.setattr(replace_state, "fill_state", failing)
            with pytest.raises((type(error), RuntimeError)):
                opt.convert_(after, **keywords)

    for stop in range(len(names)):
        opt = memopt.create(model, before)
        opt.load_state_dict(saved)
        stop_after(stop)
        assert (opt.unfinished is None) == (stop == 0)
        for i, (p, state) in enumerate(opt.state.items()):
            assert same(state, new[p] if i < stop else old[p]), names[i]
        stop_after(len(names) - stop - 1)
        again = opt.convert_(after, **keywords)
        assert all(same(state, new[p]) for p, state in opt.state.items())
        assert again.relative_error == pytest.approx(report.relative_error)
        assert (again.dropped, again.filled) == (report.dropped, report.filled)
        assert opt.ledger() == memopt.price(model, opt.spec)
        train(model, opt, 1, 1)


def test_nothing_is_done_with_half_of_a_rule(monkeypatch, tmp_path):
    from memopt.checkpoint.conversion import replace_state

    model = odd_model()
    opt = memopt.create(model, "adamw")
    train(model, opt, 0, 1)
    saved, fill, calls = opt.state_dict(), replace_state.fill_state, []

    def failing(*arguments):
        calls.append(fill(*arguments))
        if len(calls) == 3:
            raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(replace_state, "fill_state", failing)
        with pytest.raises(RuntimeError, match=r"no memory. 2 of \d+ parameters are as 'lion' keeps them"):
            opt.convert_("lion")
    for refused in (
        opt.step,
        opt.state_dict,
        opt.explain,
        lambda: opt.convert_("lamb"),
        lambda: opt.convert_("lion", lr=1.0),
        lambda: memopt.save(tmp_path, optimizer=opt),
        lambda: memopt.checkpoint.source_of(opt),
        lambda: opt.release_gradients(model),
        opt.init_state,
        lambda: opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}),
    ):
        with pytest.raises(RuntimeError, match=r"the others as 'adamw', which is no optimizer: the same call"):
            refused()
    old = memopt.create(model, "adamw")
    old.load_state_dict(saved)
    opt.load_state_dict(old.state_dict())  # gives the conversion up
    assert opt.unfinished is None
    assert all(same(state, old.state[p]) for p, state in opt.state.items())
    opt.convert_("lion")
    train(model, opt, 1, 1)


def test_changing_the_rule_needs_one_parameters_state():
    """Lion's mean is another number than AdamW's: no tensor is shared."""
    model = torch.nn.ModuleList(torch.nn.Linear(256, 256, bias=False) for _ in range(6))
    opt = memopt.create(model, "adamw")
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    from memopt.checkpoint.conversion import param_state

    allocate, most, before = param_state.ParamState.allocate, [0], opt.ledger().nbytes

    def watched(param):
        state = allocate(param)
        most[0] = max(most[0], opt.ledger().nbytes + sum(t.nbytes for t in state.values()))
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(param_state.ParamState, "allocate", watched)
        opt.convert_("lion")
    assert most[0] <= before + 4 * 256 * 256 + 4
    assert opt.ledger().nbytes == before - 6 * 4 * 256 * 256


def test_changing_the_rule_keeps_little_twice():
    """What comes out as it went in is the old tensor."""
    model = torch.nn.ModuleList(torch.nn.Linear(256, 256, bias=False) for _ in range(6)).bfloat16()
    opt = memopt.create(model, "adamw")
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    before = {p: dict(s) for p, s in opt.state.items()}
    opt.convert_("adamw+split")
    for p, state in before.items():
        assert all(opt.state[p][key] is tensor for key, tensor in state.items())
    opt.convert_("lamb-8bit", overrides={"0.*": "32bit"})
    for i, (p, state) in enumerate(before.items()):
        assert (opt.state[p].get("exp_avg") is state["exp_avg"]) == (i == 0)
