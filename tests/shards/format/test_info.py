import json

import pytest
from damage import change, redescribe, sign

from cxrfast.errors import CxrfastError, ShardError
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.format.info import read_set
from cxrfast.shards.shard_set import ShardSet
from cxrfast.training.setup import staged

OUTSIDE = [
    "../../ESCAPED/x",
    "/tmp/x",
    "",
    ".",
    "0" * 31,
    "0" * 33,
    "0" * 32 + "\n",
    "G" * 32,
    "0" * 31 + "/",
    "٠" * 32,
]
"""Ids that are not 32 hexadecimal digits."""


@pytest.mark.parametrize("wrong", OUTSIDE)
def test_an_id_that_is_not_32_hexadecimal_digits_never_becomes_a_path(folder, tmp_path, wrong):
    for manifest in folder.glob("*/*.json"):
        change(manifest, set=wrong)
    redescribe(folder, id=wrong)
    with pytest.raises(ShardError, match=r"set.json is damaged \(Expected `str` matching regex.*id"):
        read_set(folder)
    with pytest.raises(CxrfastError):
        staged(folder, tmp_path / "a" / "b" / "c", 32)
    with pytest.raises(CxrfastError):
        Reader(folder, 32)
    assert {path.name for path in tmp_path.iterdir()} == {"set"}


def test_an_id_of_another_form_in_a_manifest_is_refused(folder):
    change(folder / "32" / "000000.json", set="../" * 9)
    sign(folder)
    with pytest.raises(ShardError, match=r"000000.json is damaged \(Expected `str` matching regex"):
        ShardSet(folder).manifest(32, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ["a\x1b[31m"]}, r"'a\\x1b\[31m' holds the character U\+001B"),
        ({"labels": ["=cmd|'/C calc'!A0"]}, "would be run as a formula by a spreadsheet"),
        ({"labels": ["x" * 300]}, "has 300 characters, and at most 200 are allowed"),
        ({"labels_from": "a\u202eb sha256:0"}, r"holds the character U\+202E"),
        ({"versions": {"numpy": "1\n2"}}, r"holds the character U\+000A"),
        ({"source": "os:system; rm -rf ~"}, "matching regex"),
        ({"source": "x" * 300}, "length <= 200"),
        ({"images": 2**62}, "<= 100000000"),
        ({"images": -1}, ">= 1"),
        ({"rows_per_shard": 0}, ">= 1"),
        ({"seed": 10**400}, "damaged"),
        ({"\x1b]0;x": 1}, r"unknown field '\\x1b\]0;x'"),
    ],
)
def test_what_a_description_claims_is_bounded_and_printable(folder, fields, message):
    redescribe(folder, **fields)
    with pytest.raises(ShardError, match=message) as caught:
        read_set(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"schema": 1e400}', '{"schema": NaN}', b"\xff\xfe", b"", "null", "2"]
)
def test_json_that_is_no_description_is_refused_by_its_name(folder, text):
    (folder / "rows.parquet").unlink()
    (folder / "set.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ShardError, match=r"set.json (is damaged|has schema version)"):
        read_set(folder)


def test_a_description_still_reads_back_as_it_was_written(folder):
    before = json.loads((folder / "set.json").read_text())
    redescribe(folder, labels_from="labels of 2024.csv sha256:" + "0" * 64, source="clinic.films:listed")
    info = read_set(folder)
    assert (info.source, info.id) == ("clinic.films:listed", before["id"])
    assert info.labels == before["labels"]
