"""The processes that save or load one checkpoint together, and the few things they must agree on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from memopt.partitions.world import answered


class Ranks:
    """This process among those of ``group`` (all of torch.distributed's by default, or just this one without it).

    A gloo group of its own carries the messages, one for each ``purpose``: a save in the background does not meet
    training's collectives, and numbers need not be on a card. Every message says in ``what`` it is, and how many came
    before: a rank that was interrupted there and does something else is noticed.
    """

    def __init__(self, group: Any = None, what: str = "memopt.save", purpose: str = "") -> None:
        import torch.distributed as dist

        ready = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if ready else 0
        self.world_size = dist.get_world_size(group) if ready else 1
        self._group = _own_group(group, purpose) if self.world_size > 1 else None
        self._what, self._count = what, 0

    def gather(self, value: Any) -> list[Any]:
        """A JSON value of every rank, by rank."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        self._count += 1
        mine = [self._what, self._count]
        text = torch.frombuffer(bytearray(json.dumps([*mine, value]).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        with answered("saving or loading"):
            dist.all_gather(sizes, torch.tensor([text.numel()]), group=self._group)
            longest = max(int(size) for size in sizes)
            texts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
            dist.all_gather(texts, torch.nn.functional.pad(text, (0, longest - text.numel())), group=self._group)
        found = [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, sizes, strict=True)]
        for rank, (what, count, _) in enumerate(found):
            if [what, count] != mine:
                raise RuntimeError(
                    f"rank {rank} is in the middle of {what} (message {count}) and rank {self.rank} of {self._what} "
                    f"({self._count}): one of them was interrupted. End all ranks and load the last checkpoint"
                )
        return [value for _, _, value in found]

    def barrier(self, what: str) -> None:
        """Wait for all ranks, in the middle of ``what``."""
        if self.world_size > 1:
            import torch.distributed as dist

            with answered(what):
                dist.barrier(self._group)

    def agree(self, error: BaseException | None) -> None:
        """Raise on every rank if any has an error: its own, or RuntimeError with the sentence of the first."""
        sentences = self.gather(None if error is None else str(error) or type(error).__name__)
        if error is not None:
            raise error
        for rank, sentence in enumerate(sentences):
            if sentence is not None:
                raise RuntimeError(f"rank {rank}: {sentence}")


_GROUPS: dict[Any, Any] = {}


def _own_group(group: Any, purpose: str) -> Any:
    """A gloo group of the same ranks, made once for each purpose.

    Who joins waits for the others at the store, which does not know that one of them has ended. So the ranks meet in
    ``group`` first: gloo finds a connection that is gone at once. And nobody waits longer than ``group`` would.
    """
    import torch.distributed as dist

    key = group or dist.group.WORLD
    if (key, purpose) not in _GROUPS:
        with answered("saving or loading"):
            if dist.get_backend(key) == "gloo":
                dist.barrier(key)
            ranks, timeout = dist.get_process_group_ranks(key), _timeout(key)
            with _store_timeout(timeout):
                made = dist.new_group(ranks, timeout, backend="gloo", use_local_synchronization=True)
        _GROUPS[key, purpose] = made
    return _GROUPS[key, purpose]


def _timeout(group: Any) -> timedelta | None:
    """How long collectives of this group wait; None where it does not say."""
    for kind in group._device_types:
        options = getattr(group._get_backend(kind), "options", None)
        found = getattr(options, "_timeout", None)
        if isinstance(found, timedelta):
            return found
    return None


@contextmanager
def _store_timeout(timeout: timedelta | None) -> Iterator[None]:
    """Who connects waits at the store for the others' addresses, by the store's timeout and not by the group's."""
    from torch.distributed import distributed_c10d

    store: Any = distributed_c10d._get_default_store()
    before = store.timeout
    if timeout is not None:
        store.set_timeout(min(timeout, before))
    try:
        yield
    finally:
        store.set_timeout(before)
