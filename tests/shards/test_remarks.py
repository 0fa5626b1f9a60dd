"""What is noteworthy about images is kept in manifests, counted by `shard`, and tabulated by `describe`."""

import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from commands import invoke
from damage import contents, copy_set, flip_bit, repair
from sets import build

from cxrfast.shards.building.cautions import by_remark, remark_lines, rows_in_words, sample_lines
from cxrfast.shards.format.manifest import read_manifest
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.upkeep.describe import describe

UNIFORM, NARROW = "one grey value", "less than a quarter of the grey range"
NARROW_PNG = "16-bit PNG that uses less than a quarter of its range"
TABLE = {"source": "table", "source_options": {"table": "t.csv", "label": ["Edema"]}}


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> tuple[Path, Path, dict[str, list[str]]]:
    """A tree of uniform, narrow and ordinary images, its set at 16 and 32 px, and the paths by remark."""
    tree = tmp_path_factory.mktemp("odd") / "tree"
    tree.mkdir()
    ramp = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    images = {
        UNIFORM: [np.full((64, 64), 90, np.uint8), np.zeros((64, 64), np.uint16)],
        NARROW: [ramp // 2 + 100],
        NARROW_PNG: [(ramp.astype(np.uint16) * 60)] * 7,
        "": [ramp * 4] * 20,
    }
    found: dict[str, list[str]] = {}
    lines = ["path,patient_id,Edema"]
    for remark, arrays in images.items():
        for array in arrays:
            name = f"i{len(lines):02}.png"
            cv2.imwrite(str(tree / name), array)
            lines.append(f"{name},p{len(lines)},1")
            found.setdefault(remark, []).append(name)
    (tree / "t.csv").write_text("\n".join(lines) + "\n")
    build(tree, tree.parent / "set", [16, 32], **TABLE)
    return tree, tree.parent / "set", found


def rows_of(folder: Path, names: list[str]) -> list[int]:
    rows = read_rows(folder / "rows.parquet")
    return sorted(rows.loc[rows["path"].isin(names), "row"].tolist())


def test_every_remark_is_in_the_manifests_of_all_scales(odd):
    _, out, found = odd
    for scale in (16, 32):
        remarks = read_manifest(out, scale, 0).remarks
        assert {remark: sorted(map(int, rows)) for remark, rows in _by(remarks).items()} == {
            remark: rows_of(out, names) for remark, names in found.items() if remark
        }


def _by(remarks: dict[str, list[str]]) -> dict[str, list[str]]:
    return {
        kind: [row for row, some in remarks.items() if kind in some]
        for kind in {k for v in remarks.values() for k in v}
    }


def test_shard_counts_them_and_names_the_first_rows_and_what_to_do(odd, tmp_path):
    tree, out, found = odd
    report = build(tree, out, [16], **TABLE)
    lines = report.lines(out)
    first = ", ".join(map(str, rows_of(out, found[NARROW_PNG])[:5]))
    assert (
        f"warning: 7 images: {NARROW_PNG}; with --grey mimic or --grey window, a new set uses it all (rows {first}, …)"
        in lines
    )
    assert f"warning: 1 image: {NARROW} (row {rows_of(out, found[NARROW])[0]})" in lines
    assert not any(path in "\n".join(lines) for paths in found.values() for path in paths), "images are named by row"
    text = "\n".join(build(tree, tmp_path / "new", [16], dry_run=True, **TABLE).lines(tmp_path / "new"))
    sampled = len({*range(0, 24, 2)} & {*rows_of(out, found[NARROW_PNG])})
    assert f"warning: {sampled} of 12 sampled images: 16-bit PNG" in text


def test_a_dry_run_says_so_when_every_image_is_narrow(tmp_path):
    for n in range(12):
        cv2.imwrite(str(tmp_path / f"{n}.png"), np.tile(np.arange(64, dtype=np.uint16) * 60, (64, 1)))
    (tmp_path / "t.csv").write_text("path,patient_id,Edema\n" + "".join(f"{n}.png,{n},1\n" for n in range(12)))
    done = invoke(
        *("shard", "--data", tmp_path, "--out", tmp_path.parent / "set", "--scale", 16, "--dry-run"),
        *("--source", "table", "--table", "t.csv", "--label", "Edema"),
    )
    assert f"warning: 12 of 12 sampled images: {NARROW_PNG}; with --grey mimic or --grey window" in done.stdout


def test_describe_tabulates_them_and_writes_them_all(odd, tmp_path):
    _, out, found = odd
    description = describe(out, tmp_path)
    table = next(table for table in description.tables if table.title == "Remarks on images")
    assert [[*row[:2]] for row in table.rows] == [[NARROW_PNG, "7"], [UNIFORM, "2"], [NARROW, "1"]]
    assert tmp_path / "remarks.csv" in description.written
    listed = pd.read_csv(tmp_path / "remarks.csv")
    assert sorted(listed.itertuples(index=False, name=None)) == sorted(
        (row, remark) for remark, names in found.items() if remark for row in rows_of(out, names)
    )


def test_a_set_without_remarks_has_no_such_field_table_or_file(tiny_set, tmp_path):
    assert "remarks" not in json.loads(shard_path(tiny_set, 32, 0, "json").read_bytes())
    (tmp_path / "remarks.csv").write_text("of an earlier description")
    description = describe(tiny_set, tmp_path)
    assert "Remarks on images" not in [table.title for table in description.tables]
    assert not (tmp_path / "remarks.csv").exists()


def test_a_lost_manifest_gets_remarks_and_hashes_from_another_scale_or_the_source(odd, tmp_path):
    tree, out, _ = odd
    for data in (None, tree):
        folder = copy_set(out, tmp_path / f"set-{data is None}")
        shard_path(folder, 32, 0, "json").unlink()
        repair(folder, data)
        m, whole = read_manifest(folder, 32, 0), read_manifest(out, 32, 0)
        assert (m.remarks, m.sources) == (whole.remarks, whole.sources)
    for path in (folder / "16").iterdir():
        path.unlink()
    flip_bit(shard_path(folder, 32, 0, "json"), 3)
    repair(folder, tree)
    assert contents(folder / "32") == contents(out / "32")


def test_a_set_of_one_scale_loses_them_without_its_source_and_says_so(odd, tmp_path):
    tree = odd[0]
    build(tree, tmp_path / "set", [16], **TABLE)
    shard_path(tmp_path / "set", 16, 0, "json").unlink()
    lines = repair(tmp_path / "set").lines()
    assert (
        "repaired: 16/000000.json: derived from its tar, with grids from its images, without the hashes of its source "
        "images and the remarks on them"
    ) in lines
    assert build(tree, tmp_path / "set", [32], **TABLE).complete, "grids are compared then"


def test_lines_are_sorted_by_count_and_rows_are_shortened():
    remarks = {9: ["b"], 2: ["a", "b"], 30: ["b"], **{n: ["c"] for n in range(100, 108)}}
    assert by_remark(remarks) == {"c": list(range(100, 108)), "b": [2, 9, 30], "a": [2]}
    assert rows_in_words([3]) == "row 3"
    assert rows_in_words(range(6)) == "rows 0, 1, 2, 3, 4, …"
    assert remark_lines(remarks)[1:] == ["3 images: b (rows 2, 9, 30)", "1 image: a (row 2)"]
    assert sample_lines({"a": 1, "b": 2}, 12) == ["2 of 12 sampled images: b", "1 of 12 sampled images: a"]
