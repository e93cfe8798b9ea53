"""The rows of docs/compatibility.md: which framework's loop, with which spec, is compared with the bare script's."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.helpers import ranks
from tests.helpers.loops import SAVED_AT, bare, under_accelerate, under_deepspeed, under_trainer
from tests.helpers.loops_lightning import under_lightning

#: Two ranks sum gradients in another order than one; 8-bit codes may round to the other side; DeepSpeed's flat vectors
#: have other blocks.
RTOL, RTOL_8BIT, RTOL_FLAT = 1e-4, 2e-2, 5e-2


class Case(NamedTuple):
    """One row of docs/compatibility.md. ``refused`` is a part of the reason, where it is."""

    framework: str
    ranks: int
    spec: str
    function: Any
    arguments: tuple[Any, ...] = ()
    rtol: float = RTOL
    refused: str = ""

    def run(self, path: str) -> dict[str, Any]:
        """The largest relative difference of a loss from the bare script's, whether training went on bit for bit from
        the checkpoint in the middle, and the reason of a refusal."""
        results = ranks.run(self.function, self.ranks, self.spec, path, *self.arguments)
        found: dict[str, Any] = {"refused": [rank.get("refused", "") for rank in results]}
        if all("losses" in rank for rank in results):
            losses = [sum(each) / self.ranks for each in zip(*(rank["losses"] for rank in results), strict=True)]
            # Trainer's groups have the weight decay of its own arguments, by default none.
            hyper = {"weight_decay": 0.0} if self.function is under_trainer else {}
            expected = bare(self.spec.partition("/")[0], **hyper)
            found["difference"] = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
        if all("resumed" in rank for rank in results):
            found["resumed"] = all(rank["resumed"] == rank["losses"][SAVED_AT:] for rank in results)
        return found


CASES = [
    Case("accelerate, DDP", 2, "adamw-8bit", under_accelerate, ("ddp",), RTOL_8BIT),
    Case("accelerate, DDP", 2, "adamw-8bit/zero1", under_accelerate, ("ddp",), RTOL_8BIT),
    Case("accelerate, FSDP2", 2, "adamw-8bit/zero3", under_accelerate, ("fsdp2",), RTOL_8BIT),
    Case("accelerate, FSDP2", 2, "adafactor/zero3", under_accelerate, ("fsdp2",)),
    Case("accelerate, DeepSpeed stage 2, offload", 2, "adamw/zero2", under_accelerate, ("deepspeed",)),
    Case("accelerate, DeepSpeed stage 2, offload", 2, "adamw-8bit/zero2", under_accelerate, ("deepspeed",), RTOL_FLAT),
    Case("accelerate, DeepSpeed stage 2, offload", 2, "adafactor/zero2", under_accelerate, ("deepspeed",)),
    Case("Trainer", 1, "adamw", under_trainer),
    Case("Trainer", 1, "adamw-8bit", under_trainer, rtol=RTOL_8BIT),  # it orders parameters otherwise: another dither
    Case("Trainer", 2, "adamw-8bit", under_trainer, rtol=RTOL_8BIT),
    Case("Trainer", 2, "adamw-8bit/zero1", under_trainer, rtol=RTOL_8BIT),
    Case("Trainer, FSDP2", 2, "adamw-8bit/zero3", under_trainer, (True,), RTOL_8BIT),
    Case("Trainer, FSDP2", 2, "adafactor/zero3", under_trainer, (True,)),
    Case("Lightning", 1, "adamw-8bit", under_lightning),
    Case("Lightning, DDP", 2, "adamw-8bit", under_lightning, rtol=RTOL_8BIT),
    Case("Lightning, DDP", 2, "adamw-8bit/zero1", under_lightning, rtol=RTOL_8BIT),
    Case("DeepSpeed stage 1", 2, "adamw", under_deepspeed, (1, False)),
    Case("DeepSpeed stage 2, offload", 2, "adamw-8bit", under_deepspeed, (2, True), RTOL_FLAT),
    Case("DeepSpeed stage 3", 2, "adamw-8bit", under_deepspeed, (3, False), RTOL_FLAT),
    Case("DeepSpeed stage 1", 2, "adafactor", under_deepspeed, (1, False)),
    Case("DeepSpeed stage 3, offload", 2, "came", under_deepspeed, (3, True)),
]


def table() -> str:
    """The rows of docs/compatibility.md: exactly what the tests run."""
    lines = [
        "| framework | processes | spec | losses of the bare script | save and load in mid-training |",
        "|---|---|---|---|---|",
    ]
    for case in CASES:
        goes_on = "refused with the reason: memopt.save" if case.refused else "bit for bit"
        lines.append(f"| {case.framework} | {case.ranks} | `{case.spec}` | yes | {goes_on} |")
    return "\n".join(lines) + "\n"
