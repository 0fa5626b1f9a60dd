import pytest

from cxrfast.shards.format.checksums import parse_sums, sums_bytes

SUMS = {"32/000000.idx": "1" * 64, "32/000000.tar": "2" * 64, "rows.parquet": "3" * 64}


def test_sums_are_read_as_they_were_written():
    assert parse_sums(sums_bytes(SUMS)) == (SUMS, [])


@pytest.mark.parametrize(
    ("damage", "wrong"),
    [
        (lambda lines: [lines[0], *lines], "line 2 is not a hash and the name of a file"),  # listed twice
        (lambda lines: [lines[0], lines[1].replace("2", "g", 1), lines[2]], "line 2 is not a hash and"),
        (lambda lines: [lines[0], lines[1].replace(".tar", ".exe"), lines[2]], "line 2 is not a hash and"),
        (lambda lines: lines[::-1], "out of order"),
        (lambda lines: [*lines[:-1], lines[-1].rstrip()], "no newline at its end"),
    ],
)
def test_what_is_wrong_is_said(damage, wrong):
    lines = sums_bytes(SUMS).decode().splitlines(keepends=True)
    assert wrong in "; ".join(parse_sums("".join(damage(lines)).encode())[1])
