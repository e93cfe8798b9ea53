"""Operations that take state elsewhere and back: dictionaries, copies, checkpoints, other specs."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

import memopt
from memopt.spec.placement_options import OPTIONS
from tests.twin.machine import Difference, Skip, Twin
from tests.twin.mixed import Together, creatable, given
from tests.twin.operations import operation
from tests.twin.sides import Bag


def blueprint(t: Twin) -> Callable[[], tuple[Bag, Any]]:
    """What makes a model and an optimizer as ours are now, with other weights and without state."""
    opt = t.ours.opt
    if not creatable(t):
        raise Skip
    shapes = {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in t.ours.model.named_parameters()}
    groups = [
        {"params": names, **given(t.ours.opt.spec, group)}
        for names, group in zip(t.ours.names(), opt.param_groups, strict=True)
    ]
    spec, overrides = opt.spec, {n: text for n, text in opt.spec.overrides.items() if n in t.names}
    options = {k: v for k, v in opt.spec.options.items() if k in OPTIONS}

    def make() -> tuple[Bag, Any]:
        model = Bag({name: torch.full(shape, 0.5, dtype=dtype) for name, (shape, dtype, _) in shapes.items()})
        for name, (_, _, trained) in shapes.items():
            getattr(model, name).requires_grad_(trained)
        return model, t.create(model, copy.deepcopy(groups), spec, {}, overrides, options)

    return make


def _names(opt: Any) -> list[str]:
    return [name for name, _, _ in opt.params.entries()]


def _same(t: Twin, model: Bag, opt: Any, what: str, weights: bool = True) -> None:
    """This pair is ours, bit for bit."""
    for name in t.names:
        p, q = t.ours.of(name), getattr(model, name)
        if weights and not torch.equal(p.detach().nan_to_num(), q.detach().nan_to_num()):
            raise Difference(f"{what}: the weight {name} is another")
        mine, other = t.ours.opt.state.get(p, {}), opt.state.get(q, {})
        if mine.keys() != other.keys():
            raise Difference(f"{what}: {name} has state {sorted(other)}, it was {sorted(mine)}")
        for key, x in mine.items():
            same = _bytes(x) == _bytes(other[key]) if isinstance(x, Tensor) else x == other[key]
            if not same:
                raise Difference(f"{what}: {name}.{key} is another")
    if opt.skipped_steps != t.ours.opt.skipped_steps:
        raise Difference(f"{what}: {opt.skipped_steps} skipped steps, there were {t.ours.opt.skipped_steps}")


def _bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""


def _go_on(t: Twin, model: Bag, opt: Any) -> None:
    t.replaced(model, opt)


@operation()
def state_dict(t: Twin, r: Random) -> None:
    """Through a dictionary, and a file, into the same optimizer or into a fresh one."""
    opt = t.ours.opt
    saved = opt.state_dict()
    if r.random() < 0.5:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=r.random() < 0.5)
    else:
        saved = copy.deepcopy(saved)
    if r.random() < 0.5:
        before = t.fingerprint()
        opt.load_state_dict(saved)
        t.unchanged(before, "its own state_dict was loaded")
        return
    model, fresh = blueprint(t)()
    model.load_state_dict(t.ours.model.state_dict())
    fresh.load_state_dict(saved)
    _same(t, model, fresh, "state_dict")
    _go_on(t, model, fresh)


@operation(1)
def state_dict_back(t: Twin, r: Random) -> None:
    """A rollback: steps, then the weights and the state of before, on both sides."""
    if not t.plain_groups():
        raise Skip  # torch's state_dict fails on the state of a parameter that is in no group
    saved = [(copy.deepcopy(s.model.state_dict()), copy.deepcopy(s.opt.state_dict())) for s in t.sides]
    way, rounded = dict(t.way), dict(t.rounded)
    for _ in range(r.randint(1, 2)):
        t.step(r)
    for side, (weights, state) in zip(t.sides, saved, strict=True):
        side.model.load_state_dict(weights)
        side.opt.load_state_dict(state)
    t.way, t.rounded = way, rounded


@operation(1)
def state_dict_hooks(t: Twin, r: Random) -> None:
    """Hooks around state_dict and load_state_dict see all of it, and what they put in arrives."""
    opt, seen = t.ours.opt, []
    handles = [
        opt.register_state_dict_post_hook(lambda o, d: {**d, "note": 3}),
        opt.register_load_state_dict_pre_hook(lambda o, d: seen.append(d.get("note"))),
    ]
    before = t.fingerprint()
    opt.load_state_dict(opt.state_dict())
    for handle in handles:
        handle.remove()
    t.unchanged(before, "its own state_dict was loaded")
    if seen != [3]:
        raise Difference(f"the hook saw {seen}")


@operation()
def copied(t: Twin, r: Random) -> None:
    """A deepcopy or a pickle of model and optimizer together goes on."""
    pair = (t.ours.model, t.ours.opt)
    if not t.ours.opt.placement_stores.copyable:
        t.refused(lambda: copy.deepcopy(pair), "directory")
        return
    if t.released is not None or t.watch is not None or t.ours.scheduler is not None:
        raise Skip
    model, opt = copy.deepcopy(pair) if r.random() < 0.5 else pickle.loads(pickle.dumps(pair))
    _same(t, model, opt, "a copy")
    before = t.fingerprint()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    t.unchanged(before, "a copy was stepped")
    if r.random() < 0.5:
        model, opt2 = copy.deepcopy(pair)
        opt.close()
        t.replaced(model, opt2, copied=True)
    else:
        opt.close()


@operation(3)
def save(t: Twin, r: Random) -> None:
    """A checkpoint; it loads into a fresh pair, which is ours bit for bit and goes on, perhaps."""
    t.current_moments()
    make = blueprint(t)
    path = t.folder.name + "/checkpoints"
    saving = memopt.save(
        path, model=t.ours.model, optimizer=t.ours.opt, rng=False, asynchronous=r.random() < 0.3, keep=2
    )
    saved = saving.wait()
    model, opt = make()
    try:
        memopt.load(saved, model=model, optimizer=opt, rng=False)
    except ValueError as error:
        # Without names a parameter's is its place, which it keeps when it is moved.
        if t.case.named or "param groups differ" not in str(error) or _names(opt) == _names(t.ours.opt):
            raise
        opt.close()
        return
    _same(t, model, opt, "a checkpoint")
    if r.random() < 0.5:
        _go_on(t, model, opt)
    else:
        opt.close()
    t.checkpoints = [(str(saved), make), *t.checkpoints[:1]]


@operation(1)
def load_back(t: Twin, r: Random) -> None:
    """A checkpoint into the running optimizer."""
    t.current_moments()
    before = t.fingerprint()
    path = tempfile.mkdtemp(dir=t.folder.name)
    memopt.save(path, model=t.ours.model, optimizer=t.ours.opt, rng=False)
    memopt.load(path, model=t.ours.model, optimizer=t.ours.opt, rng=False)
    t.unchanged(before, "its own checkpoint was loaded")


@operation(1)
def load_theirs(t: Twin, r: Random) -> None:
    """The state of torch.optim, read by memopt.load."""
    from tests.twin.machine import LOW

    spec = t.ours.opt.spec
    if isinstance(t.theirs.opt, (memopt.Optimizer, Together)) or spec.format != "32bit" or t.case.overrides:
        raise Skip
    if t.case.dtype in LOW or not all(t.stepped(n) for n in t.names):
        raise Skip
    kinds = [
        (bool(g.get("amsgrad")), bool(g.get("centered")), bool(g.get("momentum"))) for g in t.ours.opt.param_groups
    ]
    if len(set(kinds)) > 1 or t.released is not None:
        raise Skip
    inside = {id(p) for group in t.theirs.opt.param_groups for p in group["params"]}
    for p in [p for p in t.theirs.opt.state if id(p) not in inside]:
        del t.theirs.opt.state[p]  # torch's own state_dict() does not know what to call it
    memopt.load(t.theirs.opt.state_dict(), optimizer=t.ours.opt, rule=spec.rule)


#: Places that hold the same bits.
PLACES = ["device", "host", "cpu", "paged", "disk"]


@operation(3)
def convert_place(t: Twin, r: Random) -> None:
    """Another placement or partition, and back: the state stays what it was, bit for bit."""
    if t.released is not None:
        raise Skip
    opt = t.ours.opt
    t.current_moments()
    before = {(n, k): _bytes(x) for n in t.names for k, x in t.ours.state_of(n).items() if isinstance(x, Tensor)}
    old = opt.spec
    if old.options.get("directory"):
        raise Skip  # where it was, nothing is left
    options: dict[str, Any] = {}
    new = old.replace(
        placement=r.choice(PLACES), partition=r.choice(["none", "zero1"]), options=options, overrides=old.overrides
    )
    if not set(old.overrides) <= set(t.names):
        raise Skip  # an override that matches nothing any more is refused
    opt.convert_(new)
    if r.random() < 0.5:
        t.step(r)
        before = {}
    opt.convert_(old)
    after = {(n, k): _bytes(x) for n in t.names for k, x in t.ours.state_of(n).items() if isinstance(x, Tensor)}
    if before and before != after:
        raise Difference("the state is another after a conversion there and back")


@operation()
def convert_format(t: Twin, r: Random) -> None:
    """Another format or master; the twin is further away from now on."""
    if t.released is not None or not t.plain_groups():
        raise Skip  # the state of a parameter in no group stays in the format that it has, and is refused later
    opt, old = t.ours.opt, t.ours.opt.spec
    fmt = r.choice(["32bit", "bf16", "8bit", "4bit", old.format])
    master = r.choice(["none", "fp32", "split16", old.master])
    words = "keeps no state|centered|amsgrad|factored|momentum|first match of no parameter"
    done = t.both(lambda side: opt.convert_(old.replace(format=fmt, master=master)) if side.ours else None, words)
    if done:
        t.formats.add(fmt)
        t.masters.add(master)
        t.lost_master()


@operation(1)
def convert_refused(t: Twin, r: Random) -> None:
    """A conversion that means nothing changes nothing."""
    opt = t.ours.opt
    bad = r.choice(["adamw-3bit", "nosuchrule", "lion-factored", "adamw-8bit@moon"])
    t.refused(lambda: opt.convert_(bad))


@operation(1)
def load_refused(t: Twin, r: Random) -> None:
    """Dictionaries that do not fit, or are damaged, change nothing."""
    opt = t.ours.opt
    saved = copy.deepcopy(opt.state_dict())
    kind = r.randrange(4)
    if kind == 0:
        del saved["param_groups"]
    elif kind == 1:
        saved["param_groups"] = saved["param_groups"][1:]
    elif kind == 2:
        saved["param_groups"][0]["lr"] = -3.0
    else:
        found = [(i, k) for i, s in saved["state"].items() for k, x in s.items() if k != "step" and x.numel() > 1]
        if not found:
            raise Skip
        i, key = r.choice(found)
        saved["state"][i][key] = torch.zeros(1)
    t.refused(lambda: opt.load_state_dict(saved))
