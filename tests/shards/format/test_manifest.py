import csv
import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict

import pytest
from damage import change
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cxrfast.errors import ShardError
from cxrfast.shards.format.checksums import read_sums
from cxrfast.shards.format.info import SCHEMA, parse_set, read_set, versions
from cxrfast.shards.format.manifest import ShardManifest, built, quarantine_bytes, read_manifest, scales_in
from cxrfast.shards.format.names import shard_path


def manifest(**fields) -> ShardManifest:
    return ShardManifest(
        **{
            "set": "abc0" * 8,
            "scale": 32,
            "shard": 3,
            "sha256": "0" * 64,
            "bytes": 5,
            "rows": [1, 2],
            "crc32": [3, 2**32 - 1],
            "sizes": [[30, 20], [3056, 2544]],
            "quarantined": {"0": "missing"},
            **fields,
        }
    )


def test_set_json_says_what_the_set_is_and_comes_back_as_it_was_written(tiny_set, tmp_path):
    info = read_set(tiny_set)
    assert (info.schema, info.source, info.images, info.seed, info.quality) == (SCHEMA, "mimic", 150, 0, 95)
    assert info.patients < info.studies < info.images
    assert info.shards == 3 == len(built(tiny_set, 32)) == len(built(tiny_set, 64))
    assert len(info.labels) == 14
    assert info.versions == versions()
    for images, shards in ((1, 1), (64, 1), (65, 2), (128, 2), (129, 3)):
        assert dataclasses.replace(info, images=images, rows_per_shard=64).shards == shards
    renamed = dataclasses.replace(info, labels=["Röntgen"])
    renamed.write(tmp_path)
    assert read_set(tmp_path) == renamed


def test_another_schema_version_is_refused_and_both_versions_are_named(folder):
    change(folder / "set.json", schema=SCHEMA + 1, unheard_of=1)
    (folder / "rows.parquet").unlink()
    with pytest.raises(ShardError, match=rf"has schema version {SCHEMA + 1}, this cxrfast reads {SCHEMA}"):
        read_set(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"schema": 2}', '{"schema": 2, "id": "x", "colour": 3}', "\xff"]
)
def test_a_damaged_set_json_is_an_error(tmp_path, text):
    (tmp_path / "set.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ShardError, match=r"set.json is damaged"):
        read_set(tmp_path)


def test_a_manifest_comes_back_as_it_was_written_and_scales_are_those_with_one(tmp_path):
    for folder in ("32", "128", "notes"):
        (tmp_path / folder).mkdir()
    (tmp_path / "128" / "000000.tar").touch()
    (tmp_path / "notes" / "000000.json").touch()
    manifest().write(tmp_path)
    assert read_manifest(tmp_path, 32, 3) == manifest()
    assert read_manifest(tmp_path, 32, 4) is None
    assert scales_in(tmp_path) == [32]
    assert built(tmp_path, 32) == [3]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "truncated"),
        (b"[1]", "Expected `object`, got `array`"),
        (b"\xff", "malformed"),
        (b'{"set": "\xff"}', "utf-8"),
        (b'{"set": "' + b"abc0" * 8 + b'"}', "missing required field `scale`"),
        (dict(scale=None), r"Expected `int`, got `null` - at `\$.scale`"),
        (dict(shard="3"), r"Expected `int`, got `str`"),
        (dict(colour=3), "unknown field 'colour'"),
        (dict(sha256="0" * 63), "matching regex"),
        (dict(bytes=-1), "Expected `int` >= 0"),
        (dict(crc32=[3, 2**32]), r"at `\$.crc32"),
        (dict(crc32=[3]), "lists of different lengths"),
        (dict(rows=[2, 1]), "rows that do not ascend"),
        (dict(rows=[2, 2]), "rows that do not ascend"),
        (dict(rows=[1, 2**70]), r"at `\$.rows"),
        (dict(rows=[1, 200]), "rows outside 0 to 63"),
        (dict(sizes=[[30, 20], [3056]]), "length >= 2"),
        (dict(quarantined=["missing"]), "Expected `object`, got `array`"),
        (dict(quarantined={"x": "missing"}), "matching regex"),
        (dict(quarantined={"2": "missing"}), "both held and quarantined"),
        (dict(grids="AAAA"), "reshape|buffer size"),
        (b'{"set": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested too deeply"),
    ],
)
def test_a_damaged_manifest_is_an_error_that_names_it_and_what_is_wrong(tmp_path, data, what):
    path = shard_path(tmp_path, 32, 3, "json")
    path.parent.mkdir()
    path.write_bytes(data if isinstance(data, bytes) else json.dumps({**asdict(manifest()), **data}).encode())
    with pytest.raises(ShardError, match=r"32/000003.json is damaged \(.*\): `cxrfast verify --repair") as caught:
        read_manifest(tmp_path, 32, 3, range(64))
    assert re.search(what, str(caught.value))


# Any value replaced, dropped or added, nested or cut short

STRANGE = [None, [], {}, "text", "", True, 1.5, 2**70, -1, 0, [None], {"0": None}]


def places(value: object) -> Iterator[tuple[object, object]]:
    """Every (container, key) in a JSON value."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


@st.composite
def mutated(draw: st.DrawFn, value: dict) -> bytes:
    value = json.loads(json.dumps(value))
    how = draw(st.sampled_from(["replace", "drop", "add", "nest", "cut", "byte"]))
    container, key = draw(st.sampled_from([(c, k) for c, k in places(value)]))
    if how == "replace":
        container[key] = draw(st.sampled_from(STRANGE))
    elif how == "drop":
        del container[key]
    elif how == "add":
        value[draw(st.sampled_from(["colour", "", "ROWS"]))] = draw(st.sampled_from(STRANGE))
    text = json.dumps(value).encode()
    if how == "nest":
        old = json.dumps(container[key]).encode()
        return text.replace(old, b"[" * 10_000 + old + b"]" * 10_000, 1)
    at = draw(st.integers(0, len(text) - 1))
    if how == "cut":
        return text[:at]
    if how == "byte":
        return text[:at] + bytes([text[at] ^ draw(st.integers(1, 255))]) + text[at + 1 :]
    return text


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_set_json_says_what_it_says_or_is_an_error(tiny_set, data):
    whole = (tiny_set / "set.json").read_bytes()
    assert parse_set(whole, "set.json").to_bytes() == whole
    text = data.draw(mutated(json.loads(whole)))
    with suppress(ShardError):
        info = parse_set(text, "set.json")
        assert {"labels_from": "", **json.loads(text)} == json.loads(info.to_bytes())
        assert info.shards > 0
        assert info.recipe


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_manifest_says_what_it_says_or_is_an_error(tiny_set, tmp_path, data):
    whole = json.loads(shard_path(tiny_set, 32, 0, "json").read_bytes())
    short = {name: v[:3] if isinstance(v, list) else v for name, v in whole.items() if name not in ("grids", "sources")}
    text = data.draw(mutated({**short, "quarantined": {"3": "missing"}}))
    path = shard_path(tmp_path, 32, 0, "json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**short, "quarantined": {"3": "missing"}}))
    assert read_manifest(tmp_path, 32, 0) is not None
    path.write_bytes(text)
    with suppress(ShardError):
        m = read_manifest(tmp_path, 32, 0, range(64))
        assert json.loads(text) == json.loads(m.to_json())
        quarantine_bytes(dict.fromkeys(range(64), "a.jpg"), [m])


def test_the_quarantine_is_a_csv_sorted_by_row():
    manifests = [manifest(quarantined={"10": "truncated"}), manifest(quarantined={"2": "missing"})]
    text = quarantine_bytes({2: 'files/a,"b.jpg', 10: "files/c.jpg"}, manifests).decode()
    assert list(csv.DictReader(text.splitlines())) == [
        {"row": "2", "path": 'files/a,"b.jpg', "reason": "missing"},
        {"row": "10", "path": "files/c.jpg", "reason": "truncated"},
    ]


def test_the_sums_name_every_other_file_sorted_and_sha256sum_agrees(tiny_set):
    files = {str(path.relative_to(tiny_set)) for path in tiny_set.rglob("*") if path.is_file()} - {"SHA256SUMS"}
    assert list(read_sums(tiny_set)) == sorted(files)
    assert len(files) == 3 + 2 * 3 * 3
    if shutil.which("sha256sum"):
        command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
        done = subprocess.run(command, cwd=tiny_set, capture_output=True, text=True, check=True)
        assert done.stdout.count(": OK\n") == len(files)
