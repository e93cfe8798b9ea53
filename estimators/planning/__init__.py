"""Configurations that fit a card."""
