"""The model card: what is known about the networks, their data and their results."""
