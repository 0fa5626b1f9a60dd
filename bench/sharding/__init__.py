"""How fast sharding is, next to what users do instead."""
