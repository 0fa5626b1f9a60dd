"""Give a damaged set back the bytes it was built with."""
