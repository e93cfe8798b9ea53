"""Operations that step: gradients from everywhere, closures, scalers, hooks, threads, released gradients."""

from __future__ import annotations

import threading
import warnings
from random import Random
from typing import Any

import torch

import memopt
from tests.twin.machine import Difference, Skip, Twin
from tests.twin.operations import operation
from tests.twin.sides import Side


def not_released(t: Twin) -> None:
    if t.released is not None:
        raise Skip


@operation(10)
def step(t: Twin, r: Random) -> None:
    t.step(r)


@operation(4)
def steps(t: Twin, r: Random) -> None:
    for _ in range(r.randint(2, 4)):
        t.step(r)


@operation(5)
def backward(t: Twin, r: Random) -> None:
    g = t.draw(r)

    def do(side: Side) -> None:
        side.backward(g)
        side.step()

    t.advance(do, r)


@operation()
def accumulate(t: Twin, r: Random) -> None:
    not_released(t)
    count = r.randint(2, 3)
    parts = [t.draw(r) for _ in range(count)]

    def do(side: Side) -> None:
        for g in parts:
            side.backward(g)
        side.step()

    t.advance(do, r)


@operation()
def closure(t: Twin, r: Random) -> None:
    g = t.draw(r)
    losses = []

    def do(side: Side) -> None:
        def evaluate() -> Any:
            side.opt.zero_grad()
            loss = side.model(g)
            loss.backward()
            return loss

        losses.append(float(side.step(evaluate)))

    t.advance(do, r)
    if t.case.dtype == torch.float32 and abs(losses[0] - losses[1]) > 1e-3 + 100 * sum(t.way.values()):
        raise Difference(f"the closure's loss is {losses[0]}, the twin's {losses[1]}")


@operation(1)
def closure_raises(t: Twin, r: Random) -> None:
    def evaluate() -> Any:
        raise ValueError("the closure could not evaluate")

    t.refused(lambda: t.ours.step(evaluate), "could not evaluate")


@operation()
def missing_gradients(t: Twin, r: Random) -> None:
    names = r.sample(t.names, r.randint(0, len(t.names)))
    t.step(r, gradients=t.draw(r, names))


@operation(1)
def no_gradient(t: Twin, r: Random) -> None:
    t.advance(Side.step, r)


@operation()
def zeroed_gradients(t: Twin, r: Random) -> None:
    """Gradients of zeros, as zero_grad leaves them when they are not to be None."""
    not_released(t)
    g = t.draw(r)

    def do(side: Side) -> None:
        side.gradients(g)
        side.opt.zero_grad(set_to_none=False)
        side.step()

    if t.ours.opt.placement_stores.takes_params:
        raise Skip  # gradients may be in host memory by now, where zero_grad does not see them
    t.advance(do, r)


@operation()
def not_finite(t: Twin, r: Random) -> None:
    """A NaN or an Inf in one gradient; the twin does not step at all."""
    not_released(t)
    if t.case.nonfinite == "propagate":
        raise Skip
    name = t.pick(r, lambda n: t.ours.of(n).requires_grad and t.ours.of(n).numel() > 0)
    g = t.draw(r)
    g[name].view(-1)[r.randrange(g[name].numel())] = r.choice([float("nan"), float("inf"), -float("inf")])
    before, skipped = t.fingerprint(), t.ours.opt.skipped_steps
    t.ours.gradients(g)
    if t.case.nonfinite == "raise":
        t.refused(t.ours.step, "NaN or Inf")
    else:
        t.ours.step()
        if t.ours.opt.skipped_steps != skipped + 1:
            raise Difference(f"{t.ours.opt.skipped_steps - skipped} skipped steps counted")
        before["skipped"] += 1
        t.unchanged(before, "a step was skipped")
    t.ours.opt.zero_grad()


@operation()
def clip(t: Twin, r: Random) -> None:
    not_released(t)
    g, most = t.draw(r), r.choice([0.5, 3.0, 1e6])
    ours = r.random() < 0.5

    def do(side: Side) -> None:
        side.gradients(g)
        clipping = memopt.clip_grad_norm_ if ours and side.ours else torch.nn.utils.clip_grad_norm_
        clipping([side.of(n) for n in g], most)
        side.step()

    if t.case.dtype in (torch.bfloat16, torch.float16) and most < 1e6:
        raise Skip  # a clipped gradient is rounded to 16 bits
    t.advance(do, r)


@operation()
def scaler(t: Twin, r: Random) -> None:
    """torch.amp.GradScaler, with and without unscale_, now and then with an overflow."""
    not_released(t)
    g, overflow, unscale = t.draw(r), r.random() < 0.25, r.random() < 0.5
    if t.case.dtype == torch.float16:
        raise Skip  # GradScaler refuses gradients in fp16
    if not any(t.ours.of(n).requires_grad for n in t.names):
        raise Skip
    if overflow and not any(p.requires_grad and p.numel() for p in (t.ours.of(n) for n in t.names)):
        raise Skip

    def do(side: Side) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        if overflow:
            name = next(n for n in t.names if t.ours.of(n).requires_grad and t.ours.of(n).numel())
            g[name].view(-1)[0] = float("inf")
        scaler.scale(side.model(g)).backward()
        if unscale:
            scaler.unscale_(side.opt)
        before = scaler.get_scale()
        scaler.step(side.opt)
        scaler.update()
        if (scaler.get_scale() < before) != overflow:
            raise Difference(f"the scale went from {before} to {scaler.get_scale()}")

    t.advance(do, r)


@operation(1)
def in_a_thread(t: Twin, r: Random) -> None:
    g = t.draw(r)

    def do(side: Side) -> None:
        failed: list[BaseException] = []

        def work() -> None:
            try:
                with warnings.catch_warnings():
                    side.backward(g)
                    side.step()
            except BaseException as error:
                failed.append(error)

        if side.ours:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        else:
            work()
        if failed:
            raise failed[0]

    t.advance(do, r)


@operation()
def hooks(t: Twin, r: Random) -> None:
    """Step hooks are called once a step, before and after; one that changes the gradient is seen."""
    not_released(t)
    g, factor = t.draw(r), r.choice([1.0, 0.5])
    called: list[list[str]] = []

    def do(side: Side) -> None:
        calls: list[str] = []

        def pre(opt: Any, args: Any, kwargs: Any) -> None:
            calls.append("pre")
            for group in opt.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(factor)

        handles = [
            side.opt.register_step_pre_hook(pre),
            side.opt.register_step_post_hook(lambda opt, args, kwargs: calls.append("post")),
        ]
        side.gradients(g)
        side.step()
        for handle in handles:
            handle.remove()
        called.append(calls)

    t.advance(do, r)
    if called[0] != called[-1] or called[0] != ["pre", "post"]:
        raise Difference(f"hooks were called {called[0]}")


@operation(1)
def hook_raises(t: Twin, r: Random) -> None:
    def pre(opt: Any, args: Any, kwargs: Any) -> None:
        raise RuntimeError("a hook of the user's failed")

    handle = t.ours.opt.register_step_pre_hook(pre)
    t.ours.gradients(t.draw(r))
    t.refused(t.ours.step, "of the user's failed")
    handle.remove()
    t.ours.opt.zero_grad()
    t.ours.model.zero_grad()


@operation(3)
def release(t: Twin, r: Random) -> None:
    """Gradients released from now on, or no longer."""
    if t.released is not None:
        t.released.remove()
        t.released = None
        return
    in_model = {id(p) for p in t.ours.model.parameters()}
    if not all(id(p) in in_model for g in t.ours.opt.param_groups for p in g["params"]):
        raise Skip
    t.released = t.ours.opt.release_gradients(t.ours.model)


@operation(1)
def watch(t: Twin, r: Random) -> None:
    if t.watch is None:
        t.watch = memopt.watch(t.ours.opt, every=r.choice([1, 2, 5]), out=None)
        return
    t.watch.report()
    t.watch.close()
    t.watch = None


@operation(1)
def look(t: Twin, r: Random) -> None:
    """What shows the optimizer changes nothing."""
    before = t.fingerprint()
    opt = t.ours.opt
    for shown in (repr(opt), opt.explain(), str(opt.ledger())):
        if not shown:
            raise Difference("nothing is shown")
    t.unchanged(before, "it was looked at")
    live = sum(x.nbytes for p in opt.state for k, x in opt.state[p].items() if torch.is_tensor(x))
    priced = sum(line.nbytes for line in opt.ledger() if line.lifetime == "persistent")
    if live != priced and not t.edited and t.plain_groups():
        raise Difference(f"the ledger says {priced} bytes, there are {live}")


@operation(1)
def sparse_gradient(t: Twin, r: Random) -> None:
    not_released(t)
    name = t.pick(r, lambda n: t.ours.of(n).requires_grad and t.ours.of(n).dim() == 2 and t.ours.of(n).numel() > 0)
    t.ours.gradients(t.draw(r, [n for n in t.names if n != name]))
    p = t.ours.of(name)
    p.grad = torch.ones_like(p).to_sparse()
    t.refused(t.ours.step, "sparse")
    t.ours.opt.zero_grad()
    t.ours.model.zero_grad()
