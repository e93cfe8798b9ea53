"""Optimizer state that travels: between formats, tools, world sizes and processes."""

from memopt.checkpoint.background import Saving
from memopt.checkpoint.exporting import export
from memopt.checkpoint.live import source_of
from memopt.checkpoint.loading import Loaded, load
from memopt.checkpoint.report import Conversion
from memopt.checkpoint.saving import save
from memopt.checkpoint.tensorfile import DamagedFile

__all__ = ["Conversion", "DamagedFile", "Loaded", "Saving", "export", "load", "save", "source_of"]
