"""Steps in which other parameters have gradients than in the last one: the same bits, and nothing planned again."""

import pytest
import torch
import torch.distributed as dist

import memopt
from memopt.layout import param
from memopt.rules import RULES
from tests.helpers import ranks
from tests.helpers.cases import HYPER, assert_same_bits

SHAPES = [(64,), (70, 80), (5, 6, 7), (66, 90), (1000,), (0, 3)]
STEPS = 7
#: Of each format at least one rule, and of each kind of pass.
SPECS = [f"{rule}-8bit" for rule in RULES if not RULES[rule].part_of] + [
    "adamw",
    "adamw-4bit",
    "adamw-bf16",
    "adamw-fp8",
    "adamw-factored",
]
SPECS += ["came-factored", "lookahead(sgd)", "adamw+kahan", "adamw@cpu", "adamw@host", "adamw-8bit@disk"]


def has_gradient(step: int, number: int) -> bool:
    return step == 0 or (step + number) % 4 != 0


def run(spec: str, *, cached: bool = True, shard=lambda model: None):
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(s).to(torch.bfloat16 if "+" in spec else torch.float32)) for s in SHAPES]
    model = torch.nn.ParameterList(made)
    shard(model)
    params = list(model)
    opt = memopt.create(params, spec, **HYPER.get(memopt.parse(spec).rule, {}))
    g = torch.Generator().manual_seed(1)
    plans = []
    for step in range(STEPS):
        for i, p in enumerate(params):
            grad = torch.randn(SHAPES[i], generator=g).to(p.dtype)
            p.grad = None
            if has_gradient(step, i):
                p.grad = grad if type(p) is torch.nn.Parameter else distributed_like(p, grad)
        if not cached:
            opt.stepper.plan = None
        opt.step()
        plans.append(opt.stepper.plan)
    return params, opt, plans


def distributed_like(p, grad):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(grad, p.device_mesh, p.placements)


def values(params, opt):
    return [(p.detach(), *(x for _, x in sorted(opt.state[p].items()))) for p in params]


@pytest.mark.parametrize("spec", SPECS)
def test_a_plan_stays_and_steps_those_that_have_gradients(spec) -> None:
    params, opt, plans = run(spec)
    # What no kernel steps has no plan: matrices that Muon puts together and multiplies, those of SCALE and APOLLO.
    assert (plans[0] is None) == spec.startswith(("muon", "scale", "apollo"))
    assert all(plan is plans[0] for plan in plans)
    others = run(spec, cached=False)
    for mine, theirs in zip(values(params, opt), values(*others[:2]), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert_same_bits(a, b)


def test_one_that_was_never_met_joins_what_is_known() -> None:
    params = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(4)]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    opt, other = memopt.create(params, "adamw"), memopt.create(twins, "adamw")
    made = set()
    for step in range(8):
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            p.grad = torch.full_like(p, step + i) if i <= step and (step + i) % 3 else None
            q.grad = None if p.grad is None else p.grad.clone()
        other.stepper.plan = None
        opt.step(), other.step()
        made.add(opt.stepper.plan)
    assert len(made) <= 4  # one for each that was new
    for p, q in zip(params, twins, strict=True):
        assert_same_bits(p.detach(), q.detach())
        assert opt.state[p]["step"] == other.state[q]["step"]


@pytest.mark.filterwarnings("ignore:NaN or Inf")
@pytest.mark.parametrize("spec", ["adamw@disk", "adafactor-8bit@disk"])
def test_state_on_a_disk_is_planned_in_buffers_that_may_be_made_anew(spec) -> None:
    """One parameter is cut into rows that go through several buffers, and one that comes later needs larger ones."""
    torch.manual_seed(0)
    values = [torch.randn(shape) for shape in ((500, 800), (7,), (70, 300), (900, 900))]
    found: list[list[torch.Tensor]] = []
    for cached in (True, False):
        found.append([])
        params = [torch.nn.Parameter(x.clone()) for x in values]
        opt = memopt.create(params[:3], spec, workspace=2**20)
        for step in range(6):
            if step == 3:
                opt.add_param_group({"params": params[3:]})
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, 1.0 + i + step) if (i + step) % 3 or not step else None
            params[2].grad = torch.full_like(params[2], float("nan")) if step == 5 else params[2].grad
            if not cached:
                opt.stepper.plan = None
            opt.step()
            assert not cached or opt.stepper.plan is not None
            # What somebody reads between steps is the state of then.
            found[-1] += [
                x.clone() for p in params for x in (p.detach(), *(x for _, x in sorted(opt.state[p].items())))
            ]
        assert opt.skipped_steps == 1
    for mine, theirs in zip(*found, strict=True):
        assert_same_bits(mine, theirs)


def test_state_and_memory_replaced_behind_an_idle_parameter_are_seen() -> None:
    a, b = (torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(2))
    opt = memopt.create([a, b], "adamw", lr=1.0)
    for grads in ((1, 1), (1, None)):
        a.grad, b.grad = (None if g is None else torch.full((8, 8), float(g)) for g in grads)
        opt.step()
    b.data = torch.full((8, 8), 5.0)
    opt.state[b]["exp_avg"] = torch.full((8, 8), -1.0)
    a.grad, b.grad = None, torch.zeros(8, 8)
    opt.step()
    assert (b > 5).all()  # the new weights, moved by the new moment


def test_nan_in_a_gradient_is_seen_and_one_that_is_not_there_is_not_looked_at() -> None:
    a, b = (torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(2))
    opt = memopt.create([a, b], "adamw")
    for p in (a, b):
        p.grad = torch.ones(8, 8)
    opt.step()
    b.grad.fill_(float("nan"))
    old, b.grad = b.grad, None
    opt.step()
    assert opt.skipped_steps == 0
    b.grad = old
    with pytest.warns(UserWarning, match="gradient of 1"):
        opt.step()
    assert (float(opt.state[a]["step"]), float(opt.state[b]["step"]), opt.skipped_steps) == (2, 1, 1)


def test_layouts_are_resolved_once_whatever_has_gradients(monkeypatch) -> None:
    made: list[str] = []
    original = param.resolve_layout

    def counted(spec, h, name, *rest):
        made.append(name)
        return original(spec, h, name, *rest)

    monkeypatch.setattr(param, "resolve_layout", counted)
    for spec in ("adamw", "adafactor-8bit", "adamw@disk"):
        made.clear()
        params = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(5)]
        opt = memopt.create(params, spec)
        for step in range(4):
            for i, p in enumerate(params):
                p.grad = torch.ones_like(p) if (step + i) % 4 or not step else None
            opt.step()
        assert sorted(made) == sorted(set(made)), spec


# Ranks -----------------------------------------------------------------------------------------------------------


def shards(model):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def in_ranks(spec):
    found = {}
    for cached in (True, False):
        params, opt, plans = run(spec, cached=cached, shard=shards if spec.endswith("zero3") else lambda model: None)
        kept = plans[0] is not None and all(plan is plans[0] for plan in plans)
        bad = params[1].grad
        local = bad.to_local() if hasattr(bad, "to_local") else bad
        if dist.get_rank() == 0 or spec.endswith("zero1"):
            local[0, 0] = float("inf")
        opt.step()
        found[cached] = {
            "params": [whole(p.detach()) for p in params],
            "state": [{k: whole(x) for k, x in opt.state[p].items()} for p in params],
            "kept": kept,
            "skipped": opt.skipped_steps,
        }
    return found


def each_in_ranks(specs):
    return {spec: in_ranks(spec) for spec in specs}


@pytest.mark.filterwarnings("ignore:NaN or Inf")
@pytest.mark.parametrize(
    "specs",
    [
        ("adamw-8bit/zero1", "adafactor/zero1"),
        pytest.param(("adamw-8bit/zero3", "adafactor/zero3", "came/zero1", "lamb-8bit/zero3"), marks=pytest.mark.slow),
    ],
    ids=["zero1", "others"],
)
def test_ranks_step_from_a_plan_too(specs) -> None:
    found = ranks.run(each_in_ranks, 2, specs)
    for spec in specs:
        alone, _, _ = run(spec.partition("/")[0])
        for rank in (every[spec] for every in found):
            assert rank[True]["kept"], spec
            assert rank[True]["skipped"] == rank[False]["skipped"] == 1
            for p, q, r in zip(rank[True]["params"], rank[False]["params"], alone, strict=True):
                assert_same_bits(p, q)
                # Sums over a tensor are added in another order where it is on one rank.
                assert_same_bits(p, r.detach()) if "adamw" in spec else torch.testing.assert_close(p, r.detach())
            for mine, theirs in zip(rank[True]["state"], rank[False]["state"], strict=True):
                for key, x in mine.items():
                    assert_same_bits(x, theirs[key], key)
