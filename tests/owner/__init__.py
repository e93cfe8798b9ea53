"""Tests of owner."""
