"""``load_state_dict`` of what another optimizer saved: of another spec, or of another tool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memopt.checkpoint.importers import own_dict, read_state_dict
from memopt.checkpoint.load_state import StateLoad
from memopt.core.user_warning import warn

if TYPE_CHECKING:
    from memopt.optim.parts import OptimizerParts


def load_other(optimizer: OptimizerParts, state_dict: Mapping[str, Any]) -> None:
    """Convert the state while it is loaded, and say in one warning what was lost of each moment.

    Raises ValueError, before anything is changed, for what no tool known here wrote, for other parameters or groups,
    and SpecError for a moment that was not saved and would have to be made up.
    """
    source = read_state_dict(state_dict, "the state_dict", likely=optimizer.spec.rule)
    saved = state_dict.get("memopt", {})
    here = optimizer.partition.rank, optimizer.partition.world_size
    whole = saved.get("world_size", 1) == 1
    if own_dict.wrote(state_dict) and not whole and (saved.get("rank"), saved.get("world_size")) != here:
        raise ValueError(
            f"this state is rank {saved.get('rank')} of {saved.get('world_size')}, and it is loaded on rank {here[0]} "
            f"of {here[1]}; opt.consolidate_state_dict() before state_dict(), or memopt.save and memopt.load, go from "
            "one number of ranks to another"
        )
    plan = StateLoad(optimizer, source, hyper=True, fill={})
    with optimizer.store.restoring("load_state_dict()"):
        report = plan.apply()
    if report.before == report.after and not report.dropped and not any(x.encoded for x in report.losses.values()):
        return
    losses = ", ".join(f"{moment} {loss.relative_error:.2g}" for moment, loss in report.losses.items() if loss.encoded)
    dropped = f"; dropped: {', '.join(report.dropped)}" if report.dropped else ""
    warn(
        f"load_state_dict: the state of {report.before} was converted to {report.after}; relative error: "
        f"{losses or 'none'}{dropped}"
    )
