"""A run at rest: what lies in its folder, where its weights came from, how far it is."""
