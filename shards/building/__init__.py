"""The steps of a build: rows, checks, tasks, workers, report."""
