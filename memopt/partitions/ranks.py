"""The processes that save or load one checkpoint together, and the few things they must agree on."""

from __future__ import annotations

import json
from typing import Any

import torch

from memopt.partitions.world import answered


class Ranks:
    """This process among those of ``group`` (all of torch.distributed's by default, or just this one without it).

    A gloo group of its own carries the messages: a save in the background does not meet training's collectives, and
    numbers need not be on a card.
    """

    def __init__(self, group: Any = None) -> None:
        import torch.distributed as dist

        ready = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if ready else 0
        self.world_size = dist.get_world_size(group) if ready else 1
        self._group = _own_group(group) if self.world_size > 1 else None

    def gather(self, value: Any) -> list[Any]:
        """A JSON value of every rank, by rank."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        with answered("saving or loading"):
            dist.all_gather(sizes, torch.tensor([text.numel()]), group=self._group)
            longest = max(int(size) for size in sizes)
            texts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
            dist.all_gather(texts, torch.nn.functional.pad(text, (0, longest - text.numel())), group=self._group)
        return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, sizes, strict=True)]

    def agree(self, error: BaseException | None) -> None:
        """Raise on every rank if any has an error: its own, or RuntimeError with the sentence of the first."""
        sentences = self.gather(None if error is None else f"{error}")
        if error is not None:
            raise error
        for rank, sentence in enumerate(sentences):
            if sentence is not None:
                raise RuntimeError(f"rank {rank}: {sentence}")


_GROUPS: dict[Any, Any] = {}


def _own_group(group: Any) -> Any:
    """A gloo group of the same ranks, made once."""
    import torch.distributed as dist

    key = group or dist.group.WORLD
    if key not in _GROUPS:
        ranks = dist.get_process_group_ranks(key)
        _GROUPS[key] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return _GROUPS[key]
