"""Kill a process while it saves, fill the disk, damage files: is there always one whole checkpoint or a sentence?

    python benchmarks/checkpoint_sweep.py --out benchmarks/results/checkpoint_sweep.json

A writer saves for ever, its step in every weight. It is killed (SIGKILL) at a random moment; what is in the folder must
be a whole checkpoint of a step that the writer had begun, and none older than one it had reported as saved. Then bits
of a checkpoint's files are flipped and files cut short at random places: loading must refuse with one sentence that
names the file, and leave the model as it was. Then saves run into a limit on the size of files at random places. Last,
a writer exports for torch and for DeepSpeed for ever, and is killed: what has the name of an export is a whole one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from provenance import write_result

import memopt
from memopt.checkpoint import source_of
from memopt.checkpoint.exporting import exported, write

WIDTH = 384
SPEC = "adamw-8bit"
#: What is cut off is the tail of a save or any moment of several.
LONGEST_S = 0.06
#: Of an export, which is many files.
LONGEST_EXPORT_S = 0.4

#: ``write(folder, first step, said)``
Writer = Callable[[str, int, Connection], None]


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise AssertionError(sentence)


def build(step: float = 0.0, spec: str = SPEC) -> tuple[torch.nn.Linear, memopt.Optimizer]:
    torch.set_num_threads(1)
    model = torch.nn.Linear(WIDTH, WIDTH)
    opt = memopt.create(model, spec)
    opt.init_state()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(step)
    return model, opt


def write_for_ever(path: str, first: int, said: Connection) -> None:
    """Save step after step; tell of each that it is on the disk."""
    step = first
    while True:
        model, opt = build(step)
        memopt.save(path, model=model, optimizer=opt, extra={"step": step}, keep=1)
        said.send(step)
        step += 1


def read_step(path: Path) -> int:
    """The step of the checkpoint there. Raises AssertionError if it is not whole."""
    model, opt = build(-1.0)
    step: int = memopt.load(path, model=model, optimizer=opt, rng=False).extra["step"]
    assert all(bool((p == step).all()) for p in model.parameters()), f"step {step} holds numbers of another"
    return step


def export_for_ever(path: str, first: int, said: Connection) -> None:
    """Export step after step, a file that is replaced and a folder that is new; tell of each that both are there."""
    folder, step = Path(path), first
    folder.mkdir(exist_ok=True)
    while True:
        _, opt = build(step, "adamw")
        for state in opt.state.values():
            state["exp_avg"].fill_(step)
        for tool, out in (("torch", folder / "state.pt"), ("deepspeed", folder / f"universal{step}")):
            write(exported(source_of(opt), tool), out)
        said.send(step)
        shutil.rmtree(folder / f"universal{step - 1}", ignore_errors=True)
        step += 1


def read_export(folder: Path) -> int:
    """The step of the newest folder. Raises AssertionError if it, or the file beside it, is not whole."""
    newest = max(folder.glob("universal*"), key=lambda path: int(path.name.removeprefix("universal")))
    steps = []
    for path in (newest, folder / "state.pt"):
        _, opt = build(-1.0, "adamw")
        memopt.load(path, optimizer=opt, hyper=False)
        (step,) = {float(x) for state in opt.state.values() for x in state["exp_avg"].unique()}
        steps.append(int(step))
    require(steps[0] == int(newest.name.removeprefix("universal")), f"{newest} holds numbers of step {steps[0]}")
    require(steps[1] in (steps[0], steps[0] + 1), f"step {steps[1]} in the file, {steps[0]} in the folder")
    return steps[0]


def kill_sweep(
    folder: Path,
    kills: int,
    seed: int = 0,
    writer_of: Writer = write_for_ever,
    read: Callable[[Path], int] = read_step,
    longest_s: float = LONGEST_S,
) -> dict[str, Any]:
    """``outcomes``: how often the checkpoint was that of the last step reported (old) or of the next (new)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "memopt.checkpoint", "checkpoint_sweep"])
    draw, outcomes, left = random.Random(seed), Counter[str](), 0
    last = -1
    for _ in range(kills):
        ours, theirs = context.Pipe(duplex=False)
        writer = context.Process(target=writer_of, args=(str(folder), last + 1, theirs))
        writer.start()
        theirs.close()
        if last < 0:  # from now on there is always one
            last = ours.recv()
        else:
            ours.poll(30 if draw.random() < 0.5 else longest_s)
        time.sleep(draw.random() * longest_s)
        writer.kill()
        writer.join()
        while ours.poll():
            try:
                last = ours.recv()
            except EOFError:
                break
        found = read(folder)
        assert found in (last, last + 1), f"step {found} after {last} was reported"
        outcomes["new" if found == last + 1 else "old"] += 1
        left += any(p.name.startswith(".") for p in folder.iterdir())
        last = found
    return {"kills": kills, "outcomes": dict(outcomes), "kills_in_the_middle_of_a_save": left}


def kill_exports(folder: Path, kills: int) -> dict[str, Any]:
    return kill_sweep(folder, kills, 0, export_for_ever, read_export, LONGEST_EXPORT_S)


def damage_sweep(folder: Path, tries: int, seed: int = 0) -> dict[str, int]:
    """How often each kind of damage was named. Raises AssertionError for one that was not."""
    draw, named = random.Random(seed), Counter[str]()
    model, opt = build(7.0)
    path = memopt.save(folder, model=model, optimizer=opt).path
    target, loaded = build(-1.0)
    files = sorted(path.iterdir())
    for _ in range(tries):
        victim = draw.choice(files)
        whole = victim.read_bytes()
        kind, damaged = damage(whole, draw)
        victim.write_bytes(damaged)
        try:
            memopt.load(path, model=target, optimizer=loaded, rng=False)
        except ValueError as error:
            require(str(victim) in str(error), f"{error} does not name {victim}")
            require("\n" not in str(error), f"not one sentence: {error}")
        else:
            raise AssertionError(f"{kind} in {victim.name} was loaded silently")
        finally:
            victim.write_bytes(whole)
        assert all(bool((p == -1).all()) for p in target.parameters()), "the model was changed"
        named[f"{kind} in {'manifest' if victim.suffix == '.json' else 'tensors'}"] += 1
    return dict(named)


def damage(whole: bytes, draw: random.Random) -> tuple[str, bytes]:
    """One random bit, byte, cut, or hole of zeros."""
    damaged, place = bytearray(whole), draw.randrange(len(whole))
    kind = draw.choice(["flipped bit", "other byte", "cut short", "bytes added", "4 KiB of zeros"])
    if kind == "flipped bit":
        damaged[place] ^= 1 << draw.randrange(8)
    elif kind == "other byte":
        damaged[place] = (damaged[place] + draw.randrange(1, 256)) % 256
    elif kind == "cut short":
        del damaged[place:]
    elif kind == "bytes added":
        damaged += draw.randbytes(draw.randrange(1, 100))
    else:
        damaged[place : place + 4096] = bytes(len(damaged[place : place + 4096]))
        if damaged == whole:
            damaged[place] ^= 255
    return kind, bytes(damaged)


def full_sweep(folder: Path, tries: int, seed: int = 0) -> dict[str, int]:
    """Saves that meet a limit on the size of files at a random byte: the old checkpoint stays, the file is named."""
    draw, refused = random.Random(seed), Counter[str]()
    model, opt = build(1.0, "adamw")  # its state is two files' worth of the model
    memopt.save(folder, model=model, optimizer=opt, extra={"step": 1}, keep=1)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for _ in range(tries):
            resource.setrlimit(resource.RLIMIT_FSIZE, (draw.randrange(1, 8 * WIDTH * WIDTH), hard))
            try:
                memopt.save(folder, model=model, optimizer=opt, extra={"step": 2}, keep=1)
            except OSError as error:
                require("could not be written" in str(error), str(error))
                refused[Path(str(error).split(" could")[0]).name] += 1
            else:
                raise AssertionError("a save went through a limit that it cannot fit in")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert read_step(folder) == 1
            assert len({p.name for p in folder.iterdir()} - {".lock"}) == 1, "something was left behind"
    finally:
        signal.signal(signal.SIGXFSZ, previous)
    return dict(refused)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--tries", type=int, default=1500)
    parser.add_argument("--full", type=int, default=100)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        results = {
            "torch": torch.__version__,
            "kill": kill_sweep(Path(directory, "kill"), args.kills),
            "damage": damage_sweep(Path(directory, "damage"), args.tries),
            "full_disk": full_sweep(Path(directory, "full"), args.full),
            "kill_export": kill_exports(Path(directory, "export"), args.kills),
        }
    print(json.dumps(results, indent=1))
    if args.out:
        write_result(args.out, results)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
