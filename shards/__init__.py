"""Data on disk: a source tree of radiographs becomes a set of WebDataset tar shards."""
