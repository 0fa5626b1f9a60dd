"""Radiographs nobody was exposed for, with findings of known place and size."""
