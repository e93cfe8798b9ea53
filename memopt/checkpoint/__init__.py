"""Optimizer state that travels: between formats, tools, world sizes and processes."""

from memopt.checkpoint.background_save import Saving
from memopt.checkpoint.conversion.report import Conversion
from memopt.checkpoint.exporting import export
from memopt.checkpoint.loading import Loaded, load
from memopt.checkpoint.saving import save
from memopt.checkpoint.state.live import source_of
from memopt.checkpoint.tensorfile import DamagedFile

__all__ = ["Conversion", "DamagedFile", "Loaded", "Saving", "export", "load", "save", "source_of"]
