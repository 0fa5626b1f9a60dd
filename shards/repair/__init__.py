"""Restore the bytes that a damaged set was built with."""
