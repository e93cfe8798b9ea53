"""Codes of other tools, which state may be in: read, written and converted; no value of a spec."""
