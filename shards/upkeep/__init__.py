"""A set after it was built: verify, relabel, stage, describe."""
