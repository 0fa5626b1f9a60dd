"""A trained study on new films: the same preparation, every scale, the ensemble; and what is handed on."""
