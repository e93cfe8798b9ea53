"""What several ranks are asked to do with their rows of the odd model's state: save, load, convert."""

import torch
import torch.distributed as dist

import memopt
from tests.helpers.cases import odd_model
from tests.helpers.saved import names
from tests.helpers.sharded import drive

FORMATS = ["32bit", "bf16", "8bit", "fp8", "4bit", "factored"]
SPECS = ["adamw", "adamw-8bit", "adamw-4bit", "adamw-fp8", "adafactor", "adamw-8bit@paged", "muon-8bit"]

REGROUPED = ["adamw-8bit", "adamw-fp8", "adamw-4bit", "adammini", "adamw-8bit+split16"]


def state_of(model, opt):
    return [{k: t.clone() for k, t in opt.state[p].items()} for p in model.parameters()]


def save_each(directory):
    torch.manual_seed(dist.get_rank())
    for spec in SPECS:
        model = odd_model()
        opt = memopt.create(model, f"{spec}/zero1")
        drive(model, opt, 0, 2)
        torch.manual_seed(dist.get_rank())
        memopt.save(f"{directory}/{spec}", model=model, optimizer=opt, asynchronous=spec == "adamw-8bit").wait()
    return torch.rand(1).item()


def load_each(directory):
    """The state of every spec on this rank, and one step more."""
    found = {}
    for spec in SPECS:
        model = odd_model()
        opt = memopt.create(model, f"{spec}/zero1")
        memopt.load(f"{directory}/{spec}", model=model, optimizer=opt)
        state = state_of(model, opt)
        drive(model, opt, 2, 1)
        found[spec] = state, [p.detach().clone() for p in model.parameters()]
    return found, torch.rand(1).item()


def fail_on_rank_1(directory):
    model = odd_model()
    opt = memopt.create(model, "adamw/zero1")
    opt.init_state()
    memopt.save(directory, optimizer=opt, extra={"n": 1})
    import importlib

    module = importlib.import_module("memopt.checkpoint.saving")
    whole = module.write_file
    if dist.get_rank() == 1:

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        module.write_file = full
    try:
        memopt.save(directory, optimizer=opt, extra={"n": 2})
    except (OSError, RuntimeError) as error:
        dist.barrier()  # rank 0 has swept up
        return str(error), names(directory), memopt.load(directory).extra
    finally:
        module.write_file = whole
    return None


def convert_each():
    model = odd_model()
    found = {}
    for fmt in FORMATS:
        opt = memopt.create(model, f"adamw-{fmt}/zero1".replace("-32bit", ""))
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        opt.step()
        for after in FORMATS:
            report = opt.convert_(f"adamw-{after}/zero1".replace("-32bit", ""))
            found[fmt, after] = report.relative_error
            assert opt.ledger() == memopt.price(
                model, str(opt.spec), world_size=dist.get_world_size(), rank=dist.get_rank()
            )
    return found, [dict(opt.state[p]) for p in model.parameters()]


def change_partition():
    """From ``/zero1`` to whole state, and back."""
    found = {}
    for spec in REGROUPED:
        model = odd_model(torch.bfloat16 if "+" in spec else torch.float32)
        opt = memopt.create(model, f"{spec}/zero1")
        drive(model, opt, 0, 2)
        opt.convert_(spec)
        whole = state_of(model, opt)
        assert opt.ledger() == memopt.price(model, spec)
        opt.convert_(f"{spec}/zero1")
        found[spec] = whole, state_of(model, opt)
        drive(model, opt, 2, 1)
    return found


def stop_on_rank_1(after):
    """One rank has no memory for the third parameter: no rank converts it. Returns what was said and the optimizer."""
    from memopt.checkpoint.conversion import replace_state

    model = odd_model()
    opt = memopt.create(model, "adamw/zero1")
    drive(model, opt, 0, 1)
    fill, left = replace_state.fill_state, [2]

    def failing(*arguments):
        left[0] -= 1
        if left[0] < 0 and dist.get_rank() == 1:
            raise MemoryError("no memory")
        fill(*arguments)

    replace_state.fill_state = failing
    try:
        opt.convert_(after)
    except RuntimeError as error:
        return str(error), model, opt
    finally:
        replace_state.fill_state = fill
    return None, model, opt


def stop_between_formats():
    said, model, opt = stop_on_rank_1("adamw-8bit/zero1")
    drive(model, opt, 1, 1)
    return said, dict(opt.spec.overrides)


def stop_between_rules():
    """Of rules and partitions at once; the same call goes on."""
    said, model, opt = stop_on_rank_1("lion")
    opt.convert_("lion")
    done = state_of(model, opt)
    straight_model = odd_model()
    straight = memopt.create(straight_model, "adamw/zero1")
    drive(straight_model, straight, 0, 1)
    straight.convert_("lion")
    drive(model, opt, 1, 1)
    return said, done, state_of(straight_model, straight)


def sharded_in_place():
    """What cannot be: how a model is sharded was decided before."""
    model = odd_model()
    opt = memopt.create(model, "adamw-8bit/zero1")
    drive(model, opt, 0, 1)
    said = []
    for spec in ("adamw-8bit/zero2", "adamw/zero3"):
        try:
            opt.convert_(spec)
        except ValueError as error:
            said.append(str(error))
    drive(model, opt, 1, 1)
    return said, str(opt.spec)


def everything(directory):
    """All that two ranks are asked to do: starting them is what takes time."""
    return {
        "drawn": save_each(directory),
        "loaded": load_each(directory),
        "failed": fail_on_rank_1(f"{directory}/failing"),
        "converted": convert_each(),
        "regrouped": change_partition(),
        "stopped": stop_between_formats(),
        "sharded": sharded_in_place(),
        "stopped between rules": stop_between_rules(),
    }
