"""The files of a shard set: what is in them, how they are read and written."""
