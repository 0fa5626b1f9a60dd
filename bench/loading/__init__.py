"""How fast loading is, next to what users do instead."""
