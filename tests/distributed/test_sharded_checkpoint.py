"""torch.distributed.checkpoint on sharded state: saved by some ranks, loaded by others, bit for bit."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import memopt
from tests.helpers import ranks, sharded
from tests.helpers.cases import assert_same_bits

SPECS = ["adamw/zero3", "adamw-8bit/zero3", "adamw-4bit/zero2", "adamw-fp8+kahan/zero3", "adafactor/zero3"]
STEPS = 2


def fresh(spec):
    return sharded.build(spec, sharded.uneven_model(torch.bfloat16 if "+" in spec else torch.float32))


def save_each(directory):
    for spec in SPECS:
        model, opt = fresh(spec)
        sharded.drive(model, opt, 0, STEPS)
        parameters, state = get_state_dict(model, opt)
        dcp.save({"model": parameters, "optimizer": state}, checkpoint_id=f"{directory}/{spec.replace('/', '_')}")


def load_each(directory):
    """Every spec, loaded and stepped on."""
    found = {}
    for spec in SPECS:
        model, opt = fresh(spec)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        parameters, state = get_state_dict(model, opt)
        saved = {"model": parameters, "optimizer": state}
        dcp.load(saved, checkpoint_id=f"{directory}/{spec.replace('/', '_')}")
        set_state_dict(model, opt, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        sharded.drive(model, opt, STEPS, STEPS)
        found[spec] = [sharded.whole(p) for p in model.parameters()], parts(opt, model)
    return found


def parts(opt, model):
    """Every part of the state, whole."""
    index = {id(p): i for i, p in enumerate(model.parameters())}
    state = opt.state_dict()["state"]
    return [{k: sharded.whole(x) for k, x in state[index[id(p)]].items()} for p in model.parameters()]


def other_ways():
    """A full state_dict on one rank and back; zero1's rows, which the helpers cannot describe."""
    model, opt = fresh("adamw-8bit/zero3")
    sharded.drive(model, opt, 0, STEPS)
    options = StateDictOptions(full_state_dict=True)
    full = get_optimizer_state_dict(model, opt, options=options)
    before = parts(opt, model)
    model, opt = fresh("adamw-8bit/zero3")
    set_optimizer_state_dict(model, opt, full, options=options)
    for mine, theirs in zip(parts(opt, model), before, strict=True):
        for key, value in theirs.items():
            assert_same_bits(mine[key], value, key)
    model, opt = sharded.build("adamw-8bit/zero1")
    sharded.drive(model, opt, 0, 1)
    with pytest.raises(RuntimeError, match=r"save with memopt\.save, or shard with '/zero2'") as refused:
        get_optimizer_state_dict(model, opt)
    return str(refused.value), {k: tuple(v.shape) for k, v in full["state"]["odd"].items()}


def reading_moves_nothing():
    """The helpers make state by a step with zero gradients, unless there is state."""
    model, opt = fresh("adafactor/zero3")
    for group in opt.param_groups:
        group["weight_decay"] = 0.1
    opt.init_state()
    before = [sharded.whole(p) for p in model.parameters()]
    get_optimizer_state_dict(model, opt)
    return all(torch.equal(a, sharded.whole(p)) for a, p in zip(before, model.parameters(), strict=True))


#: Saved by memopt under the first, loaded under the second.
MOVES = [
    ("adamw-8bit/zero3", "adamw-8bit/zero3"),
    ("adamw-8bit/zero3", "adamw-8bit/zero1"),
    ("adamw-8bit/zero1", "adamw-8bit/zero2"),
    ("adammini-4bit/zero3", "adammini-4bit/zero1"),
    ("adammini/zero1", "adammini/zero3"),
    ("adamw+fp32/zero3", "adamw+fp32/zero1"),
]


def memopt_saves(directory):
    for i, (before, _) in enumerate(MOVES):
        model, opt = fresh(before)
        sharded.drive(model, opt, 0, STEPS)
        memopt.save(f"{directory}/memopt{i}", model=model, optimizer=opt, asynchronous=i == 0).wait()


def memopt_loads(directory):
    found = []
    for i, (_, after) in enumerate(MOVES):
        model, opt = fresh(after)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        memopt.load(f"{directory}/memopt{i}", model=model, optimizer=opt, rng=False)
        sharded.drive(model, opt, STEPS, STEPS)
        same = opt.ledger() == memopt.price(
            sharded.uneven_model(torch.bfloat16 if "+" in after else torch.float32),
            after,
            world_size=dist.get_world_size(),
            rank=dist.get_rank(),
        )
        found.append(([sharded.whole(p) for p in model.parameters()], same))
    return found


def everything(directory, save):
    if save:
        save_each(directory)
        memopt_saves(directory)
    return {
        "memopt": memopt_loads(directory),
        "loaded": load_each(directory),
        "other": other_ways() if dist.get_world_size() > 1 else None,
        "reading": reading_moves_nothing(),
    }


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """By number of ranks; three ranks save, two and three load."""
    path = str(tmp_path_factory.mktemp("dcp"))
    return {"path": path} | {world: ranks.run(everything, world, path, world == 3) for world in (3, 2)}


def worlds(session):
    return [(world, results) for world, results in session.items() if world != "path"]


@pytest.mark.parametrize("spec", SPECS)
def test_state_of_three_ranks_goes_on_on_two_and_three(session, spec):
    model, opt = fresh(spec) if spec == "adafactor/zero3" else sharded_reference(spec)
    sharded.drive(model, opt, 0, 2 * STEPS)
    for world, results in worlds(session):
        for rank in results:
            weights, state = rank["loaded"][spec]
            for a, p in zip(weights, model.parameters(), strict=True):
                if spec == "adafactor/zero3":  # sums over ranks are taken in another order
                    torch.testing.assert_close(a, p.detach(), rtol=1e-6, atol=1e-6)
                else:
                    assert_same_bits(a, p, f"{spec} on {world}")
            for mine, p in zip(state, model.parameters(), strict=True):
                for key, value in opt.state[p].items() if spec != "adafactor/zero3" else ():
                    assert_same_bits(mine[key], value, f"{spec} {key} on {world}")


def sharded_reference(spec):
    parsed = memopt.parse(spec)
    model = sharded.uneven_model(torch.bfloat16 if "+" in spec else torch.float32)
    alone = str(parsed.replace(partition="none"))
    return model, memopt.create(model, alone, overrides={} if parsed.format == "32bit" else sharded.CUT_WITHIN)


@pytest.mark.parametrize("i", range(len(MOVES)), ids=[f"{a} to {b}" for a, b in MOVES])
def test_memopt_saves_and_loads_sharded_models(session, i):
    """Three ranks save, two and three load, and so does one process; the long vector is encoded anew between zero1,
    which cuts it between blocks, and zero3, which keeps it in 32 bits."""
    before, after = MOVES[i]
    model, opt = sharded_reference(before)
    sharded.drive(model, opt, 0, 2 * STEPS)  # the long vector in 32 bits
    for _, results in worlds(session):
        for rank in results:
            weights, same_ledger = rank["memopt"][i]
            assert same_ledger
            for (name, p), a in zip(model.named_parameters(), weights, strict=True):
                if name in sharded.CUT_WITHIN and "bit" in after and "zero1" in before + after:
                    assert (a - p).abs().max() < 1e-3  # one step
                elif "adammini" in after and p.dim() < 2:  # means of vectors: torch's on several ranks, kernels' here
                    torch.testing.assert_close(a, p.detach(), rtol=1e-6, atol=1e-6)
                else:
                    assert_same_bits(a, p, name)


def test_one_process_reads_what_three_ranks_wrote(session):
    model, opt = sharded_reference("adamw-8bit/zero3")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    loaded = memopt.load(f"{session['path']}/memopt0", model=model, optimizer=opt, rng=False)
    assert not any(loss.encoded for loss in loaded.conversion.losses.values())
    sharded.drive(model, opt, STEPS, STEPS)
    for p, a in zip(model.parameters(), session[3][0]["memopt"][0][0], strict=True):
        assert_same_bits(a, p)


def test_consolidation_writes_the_model_whole(session, tmp_path):
    from memopt.cli import main

    assert main(["convert", f"{session['path']}/memopt0", str(tmp_path / "one"), "--to", "adamw-8bit"]) == 0
    model, opt = sharded.build("adamw-8bit")
    memopt.load(tmp_path / "one", model=model, optimizer=opt, rng=False)
    reference, _ = sharded_reference("adamw-8bit/zero3")
    sharded.drive(reference, _, 0, STEPS)
    for p, a in zip(model.parameters(), reference.parameters(), strict=True):
        assert_same_bits(a, p)


def test_a_full_state_dict_and_back(session):
    for world in (2, 3):
        for message, _ in (rank["other"] for rank in session[world]):
            assert "'adamw-8bit/zero1' keeps rows of replicated parameters" in message
        assert session[world][0]["other"][1] == {
            "step": (),
            "exp_avg.codes": (255, 67),
            "exp_avg.scales": (255, 1),
            "exp_avg_sq.codes": (255, 67),
            "exp_avg_sq.scales": (255, 1),
        }


def test_reading_the_state_moves_nothing(session):
    assert all(rank["reading"] for _, results in worlds(session) for rank in results)
