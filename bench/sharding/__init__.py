"""Speed of sharding, compared with the usual alternatives."""
