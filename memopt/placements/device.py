"""``device``: beside the parameter."""

from __future__ import annotations

from typing import final

from memopt.layout.chunks import Setting
from memopt.placements.base import Home, Placement


@final
class Device(Placement):
    """Ordinary memory of the parameter's own device."""

    name = "device"
    summary = "beside the parameter"

    def location(self, device: str) -> str:
        return device

    def home(self, setting: Setting) -> Home:
        return Home(self)
