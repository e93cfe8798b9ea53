"""``cpu``: state and step in host memory."""

from __future__ import annotations

from typing import final

from memopt.placements.base import Home, Placement
from memopt.placements.leases import Setting


@final
class Cpu(Placement):
    name = "cpu"
    summary = "in host memory, and the step on the host's processor"

    def location(self, device: str) -> str:
        return "cpu"

    def home(self, setting: Setting) -> Home:
        return Home(self)
