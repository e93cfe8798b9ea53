"""The version, for those that say which one wrote a file."""

__version__ = "0.1.0"
