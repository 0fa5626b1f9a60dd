"""The networks: uint8 grey batches in, logits out."""
