"""A rank that dies, or hangs, in mid-step or mid-save: the others say so in time, and the last checkpoint loads."""

import importlib
import multiprocessing
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import memopt
from tests.helpers import sharded

#: The process group's, in seconds; a test allows for starting processes on a busy machine.
TIMEOUT, PATIENCE = 5, 60
SPEC = {
    "step": "adafactor/zero1",
    "gather": "adamw-8bit/zero1",
    "save": "adamw-8bit/zero3",
    "matrices": "muon-8bit/zero1",
}
SLOW = [pytest.param(where, marks=pytest.mark.slow) for where in ("gather", "matrices")]


def one_rank(rank: int, directory: str, where: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    store = dist.FileStore(f"{directory}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT))
    model, opt = sharded.build(SPEC[where])
    sharded.drive(model, opt, 0, 1)
    memopt.save(f"{directory}/saved", model=model, optimizer=opt)
    if rank == 1:
        die_in(where)
    started = time.monotonic()
    try:
        sharded.drive(model, opt, 1, 1)
        memopt.save(f"{directory}/saved", model=model, optimizer=opt)
    except RuntimeError as error:
        Path(f"{directory}/said").write_text(f"{time.monotonic() - started:.1f}\n{error}")
    os._exit(0)


def die_in(where: str) -> None:
    def end(*_: object, **__: object) -> None:
        os._exit(9)

    if where == "step":  # in the middle of the sums of a whole-tensor rule
        importlib.import_module("memopt.partitions.batched_allreduce").sum_over = end
    elif where == "matrices":  # with some of them under way
        importlib.import_module("memopt.engines.matrices")._batched = end
    elif where == "gather":
        importlib.import_module("memopt.partitions.zero1")._Bucket.__init__ = end
    else:  # with some of its rows written
        importlib.import_module("memopt.checkpoint.io.safetensors_write").spec_of = end


@pytest.mark.parametrize("where", ["step", *SLOW, "save"])
def test_the_others_stop_and_the_last_checkpoint_loads(tmp_path, where):
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=one_rank, args=(rank, str(tmp_path), where)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            pytest.fail("a rank did not end")
    assert processes[1].exitcode == 9
    seconds, said = (tmp_path / "said").read_text().split("\n", 1)
    assert float(seconds) < 2 * TIMEOUT
    middle = "saving or loading" if where == "save" else "a step"
    assert said.startswith(f"another rank has ended or does not answer, in the middle of {middle}; what is here is")
    model = sharded.uneven_model()
    opt = memopt.create(model, SPEC[where].partition("/")[0])
    loaded = memopt.load(tmp_path / "saved", model=model, optimizer=opt, rng=False)
    assert loaded.step == 1
