"""One rank of one run: build, train, validate, count."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

import memopt
from memopt.partitions import PARTITIONS
from memopt.partitions.fsdp import Sharded
from memopt.train.job import Job, ModelConfig, RankResult
from memopt.train.model import LanguageModel
from memopt.train.recipe import CLIP_NORM, warmup_and_cosine
from memopt.train.resident import peak_resident
from memopt.train.text import Corpus, load_text

#: Windows validated at once; bounds the memory that validation takes below that of a training step.
VALIDATION_BATCH = 16


def shapes(config: ModelConfig) -> LanguageModel:
    """The model with its shapes and without memory."""
    with torch.device("meta"):
        return LanguageModel(config)


def predict(job: Job) -> tuple[int, ...]:
    """Bytes of optimizer state on each rank, before anything exists."""
    model = shapes(job.model)
    return tuple(
        memopt.price(model, job.parsed, world_size=job.world_size, rank=rank).nbytes for rank in range(job.world_size)
    )


def train(job: Job, rank: int, on_step: Callable[[int, float], None]) -> RankResult:
    """Train one rank's share; ``on_step(step, loss)`` is called after each step, steps counted from 1.

    With more than one rank a process group must exist. All ranks draw the same batch and take their part of it, and
    DistributedDataParallel, or FSDP2 for ``/zero2`` and ``/zero3``, averages their gradients, so a run over two ranks
    sees the data of a run over one.
    """
    torch.set_num_threads(max((job.threads or torch.get_num_threads()) // job.world_size, 1))
    torch.manual_seed(job.seed)
    corpus = Corpus(load_text(job.path), job.model.context)
    resident_before = psutil.Process().memory_info().rss
    model = LanguageModel(job.model)
    sharded = issubclass(PARTITIONS[job.parsed.partition], Sharded)
    replica: nn.Module = model
    if sharded:
        memopt.shard(model, job.parsed)
    elif job.world_size > 1:
        replica = nn.parallel.DistributedDataParallel(model)
    optimizer = memopt.create(model, job.parsed, lr=job.lr, seed=job.seed)
    scheduler = warmup_and_cosine(optimizer, job.steps)
    share = job.batch // job.world_size

    step_s, optimizer_step_s = [], []
    for step in range(1, job.steps + 1):
        started = perf_counter()
        windows = corpus.batch(job.seed, step, job.batch)[rank * share : (rank + 1) * share]
        loss = replica(windows)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        updating = perf_counter()
        optimizer.step()
        optimizer_step_s.append(perf_counter() - updating)
        scheduler.step()
        optimizer.zero_grad()
        step_s.append(perf_counter() - started)
        on_step(step, loss.item())

    if job.world_size > 1 and not sharded:
        require_same_replicas(model)
    live, storage, tensors = count_state(optimizer)
    return RankResult(
        live=live,
        storage=storage,
        tensors=tensors,
        validation_loss=validate(model, corpus, rank, job.world_size),
        step_s=median(step_s),
        optimizer_step_s=median(optimizer_step_s),
        resident_before=resident_before,
        peak_resident=peak_resident(),
        threads=torch.get_num_threads(),
        skipped_steps=optimizer.skipped_steps,
    )


def count_state(optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
    """``(bytes of the tensors, bytes of their storages, tensors)`` in ``optimizer.state``.

    Looks at torch's own attribute and at nothing of memopt's, so that it can contradict the ledger.
    """
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(t.numel() * t.element_size() for t in tensors), sum(storages.values()), len(tensors)


@torch.no_grad()
def validate(model: nn.Module, corpus: Corpus, rank: int, world_size: int) -> float:
    """Mean loss over the validation windows in nats per byte; each rank takes every ``world_size``-th."""
    windows = corpus.validation_windows()
    total = torch.zeros((), dtype=torch.float64)
    mine = windows[rank::world_size].split(VALIDATION_BATCH)
    for i in range(len(windows[::world_size].split(VALIDATION_BATCH))):
        # A rank with nothing left takes part: a sharded model gathers its parameters from all.
        loss = model(mine[i] if i < len(mine) and len(mine[i]) else windows[:1])
        if i < len(mine):
            total += loss.double() * len(mine[i])
    if world_size > 1:
        dist.all_reduce(total)
    return total.item() / len(windows)


@torch.no_grad()
def require_same_replicas(model: nn.Module) -> None:
    """Raise RuntimeError unless the parameters of all ranks are the same, bit for bit."""
    mine = torch.stack([p.view(torch.int32).sum(dtype=torch.int64) for p in model.parameters()])
    lowest, highest = mine.clone(), mine.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    different = [name for (name, _), same in zip(model.named_parameters(), lowest == highest, strict=True) if not same]
    if different:
        raise RuntimeError(f"after training, the ranks hold different values of {', '.join(different)}")
