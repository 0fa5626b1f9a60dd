"""A trained study on new films: the same preparation as its set, every scale, the ensemble."""
