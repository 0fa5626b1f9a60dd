"""How fast sharding is, beside what users do instead."""
