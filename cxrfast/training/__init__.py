"""From a shard set and a configuration to a run: the loop, its checkpoints, its signals, its predictions."""
