"""The steps of a build: rows, tasks, workers."""
