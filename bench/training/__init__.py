"""How fast training is, and with how much memory."""
