"""Runs on disk: their files, where their weights came from, their status."""
