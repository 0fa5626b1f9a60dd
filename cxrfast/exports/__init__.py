"""Trained networks as a folder that others can load, and its model card."""
