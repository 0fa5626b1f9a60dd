"""Synthetic radiographs with findings of known place and size."""
