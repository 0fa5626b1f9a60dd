"""How fast loading is, beside what users do instead."""
