"""State in a directory on several ranks: all go on from the last commit that every one of them has made.

Ranks commit one after the other. A run that is ended in between leaves some a commit ahead; these roll back, which they
can, because nothing of the commit before is written over until all ranks have made the next one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memopt.partitions.ranks import Ranks
from memopt.placements.stores.record import Commit

if TYPE_CHECKING:
    from memopt.partitions import Partition
    from memopt.placements.stores.by_placement import PlacementStores


def go_on_together(placement_stores: PlacementStores, partition: Partition, process_group: Any) -> None:
    """Raises RuntimeError on every rank where there is no such commit or it is damaged."""
    directory = placement_stores.durable if partition.world_size > 1 else None
    if directory is None:
        return
    ranks = Ranks(process_group, "@disk", "a directory")
    every = [
        [Commit(number, steps) for number, steps in commits]
        for commits in ranks.gather([list(commit) for commit in directory.commits()])
    ]
    common = [commit for commit in every[0] if all(commit in other for other in every)]
    if not common:
        numbers = ", ".join(f"rank {i}: {[c.number for c in commits]}" for i, commits in enumerate(every))
        raise RuntimeError(
            f"disk: the ranks' state in {directory.path} is of different runs or steps, and no commit is one of every "
            f"rank ({numbers}). Give another directory, and load a checkpoint"
        )
    last = max(common, key=lambda commit: commit.number)
    directory.undone = any(commits[0] != last for commits in every)
    error: Exception | None = None
    try:
        directory.go_on_from(last, lambda: ranks.barrier("a commit of @disk"))
    except (ValueError, OSError) as failure:
        error = failure
    ranks.agree(error)
