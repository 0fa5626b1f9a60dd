"""Sizes, durations and numbers of things as people read them."""


def counted(n: int, what: str) -> str:
    """`1 image`, `1,234 images`."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def duration(seconds: float) -> str:
    """`75` → `1m15s`; two units at most, for people."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours:
        return f"{hours}h{m:02d}m"
    return f"{m}m{s:02d}s" if m else f"{s}s"


def size(n: float) -> str:
    """Bytes for people, in powers of 1000: `922 MB`, `1.46 TB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"
