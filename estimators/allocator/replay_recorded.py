"""A traced step's allocations and frees through the model of torch's allocator."""

from __future__ import annotations

from estimators.activations.recorded import Recorded
from estimators.allocator.alloc_conf import Settings
from estimators.allocator.caching_allocator import Block
from estimators.allocator.replayed_step import FREE, GRADIENT, INSIDE, TAKE, Held, Replay


class ReplayRecorded(Replay):
    """The events as they were recorded. A gradient is there already when it is complete: the block stays."""

    def __init__(self, recorded: Recorded, held: Held, settings: Settings) -> None:
        super().__init__(held, settings)
        self.recorded = recorded

    def micro_batch(self, first: bool) -> None:
        malloc, free = self.allocator.malloc, self.allocator.free
        slots: list[Block | None] = [None] * self.recorded.slots
        for code, slot, nbytes in self.recorded.events:
            if code == TAKE:
                slots[slot] = malloc(nbytes)
            elif code == FREE:
                free(slots[slot])
                slots[slot] = None
            elif code == INSIDE:
                free(malloc(nbytes))
            elif code == GRADIENT and slot >= 0 and slots[slot] is not None:
                block, slots[slot] = slots[slot], None
                if self.held.release:
                    while self.gradients:
                        free(self.gradients.pop())
                if self.held.release or first:
                    self.gradients.append(block)
                else:  # added to the one that is there
                    free(block)
        for block in slots:
            free(block)
