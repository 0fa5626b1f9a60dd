"""Runs with predictions, for every test of this folder."""

from predicted import study

__all__ = ["study"]
