"""Speed of loading, compared with the usual alternatives."""
