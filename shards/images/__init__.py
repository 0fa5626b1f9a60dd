"""One image: bytes, pixels, and bytes again."""
