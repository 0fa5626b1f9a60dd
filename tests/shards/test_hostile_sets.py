"""Sets that somebody hostile changed, their hashes made to agree or not: commands do the right thing or refuse with a message."""

import io
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import invoke, run
from damage import change, contents, copy_set, sign
from set_mutator import attempt, mutate
from sets import build

from cxrfast.errors import CxrfastError, ShardError
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.format.manifest import quarantine_bytes
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.shard_set import ShardSet

HOSTILE = int(os.environ.get("CXRFAST_HOSTILE", "500"))
MEMORY = 2048
"""MiB that a process may hold at its peak; torch alone takes a third of it."""
SCRIPT = Path(__file__).parents[1] / "support" / "set_mutator.py"


@pytest.fixture(scope="module")
def two_scales(corrupt, tmp_path_factory):
    """70 phantoms, six of them damaged, at 16 and 32 px: two shards each, some rows quarantined."""
    out = tmp_path_factory.mktemp("two-scales") / "set"
    build(corrupt, out, [16, 32])
    return out


def test_a_set_that_nobody_changed_passes_and_a_seed_names_its_change(two_scales, corrupt, tmp_path, monkeypatch):
    monkeypatch.setattr("set_mutator.mutate", lambda folder, seed: "nothing")
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        assert set(attempt(two_scales, corrupt, seed, tmp_path / str(seed)).values()) == {"right"}
    first, second = (copy_set(two_scales, tmp_path / name / "set") for name in "ab")
    assert mutate(first, 3) == mutate(second, 3)
    assert contents(first) == contents(second) != contents(two_scales)


@pytest.mark.parametrize("mutations", [60, pytest.param(HOSTILE, marks=pytest.mark.slow)])
def test_every_command_does_the_right_thing_with_a_hostile_set_or_refuses_it_with_a_message(
    two_scales, corrupt, mutations
):
    done = run(sys.executable, SCRIPT, two_scales, corrupt, 0, mutations, timeout=None)
    lines = done.stdout.splitlines()
    seed = next((line for line in reversed(lines) if line.startswith("seed")), "before the first seed")
    assert done.returncode == 0, f"{seed}: exit status {done.returncode} (-14: it hangs)\n{done.stderr[-3000:]}"
    assert sum(line.startswith("seed") for line in lines) == mutations
    found = Counter(" ".join(line.split()[:2]) for line in lines if not line.startswith(("seed", "peak")))
    outcomes = ("right", "refused") if mutations == HOSTILE else ("refused",)
    assert {f"{name} {how}" for name in ("train", "stage", "verify") for how in outcomes} <= found.keys()
    assert int(lines[-1].removeprefix("peak ")) < MEMORY


# What a set may hold


@pytest.mark.parametrize(
    "name", ["set.json", "rows.parquet", "32/000000.tar", "32/000000.idx", "32/000000.json", "SHA256SUMS"]
)
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/etc/passwd", "loop"])
def test_what_is_no_file_in_a_set_is_refused_and_never_waited_for_or_copied(two_scales, tmp_path, name, kind):
    folder = copy_set(two_scales, tmp_path / "set")
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(folder / name if kind == "loop" else kind)
    secret = Path("/etc/passwd").read_bytes()
    for words in (("verify", folder), ("stage", folder, tmp_path / "copy")):
        done = invoke(*words)
        assert done.exit_code == 2
        assert isinstance(done.exception, SystemExit), done.exception
    assert not [path for path in tmp_path.glob("copy/**/*") if path.is_file() and path.read_bytes() == secret]
    if name not in ("set.json", "SHA256SUMS"):
        with pytest.raises(CxrfastError), Reader(folder, 32) as reader:
            ShardSet(folder).rows()
            reader.read(int(reader.rows[0]))


def test_a_pipe_in_place_of_the_lease_is_named_and_not_waited_for(two_scales, corrupt, tmp_path):
    folder = copy_set(two_scales, tmp_path / "set")
    os.mkfifo(folder / "lease.lock")
    for words in (("verify", folder, "--repair"), ("relabel", folder, corrupt / "mimic-cxr-2.0.0-negbio.csv.gz")):
        done = invoke(*words)
        assert (done.exit_code, "lease.lock is not a file that cxrfast leaves: delete it" in done.output) == (2, True)


@pytest.mark.parametrize(
    "name", ["../../x.tar", "/etc/passwd", "32/../../x.tar", "32/" + "9" * 5000 + ".tar", "9" * 5000 + "/000000.tar"]
)
def test_names_in_the_list_of_hashes_never_lead_out_of_the_set(two_scales, tmp_path, name):
    folder = copy_set(two_scales, tmp_path / "in" / "set")
    lines = [*(folder / "SHA256SUMS").read_text().splitlines(), f"{'0' * 64}  {name}"]
    (folder / "SHA256SUMS").write_text("".join(f"{line}\n" for line in sorted(lines, key=lambda line: line[66:])))
    done = invoke("stage", folder, tmp_path / "out" / "copy")
    assert (done.exit_code, "SHA256SUMS is damaged" in done.output) == (2, True)
    assert invoke("verify", folder).exit_code == 2
    assert {path.name for path in tmp_path.iterdir()} <= {"in", "out"}


# Rows


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("row", 3, "not numbered from 0 on"),
        ("row", -1, "row is blank or not between 0"),
        ("fold", 5, "fold is blank or not between 0 and 4"),
        ("block", -1, "block is blank or not between 0 and 9"),
        ("height", -1, "height is blank or not between"),
        ("image_id", None, "image_id is blank"),
        ("image_id", "a\x1b[31m", r"image_id 'a\\x1b\[31m' holds the character U\+001B"),
        ("path", "a\u202eb", r"path .*U\+202E"),
        ("view", "x" * 5000, "view .* has 5,000 bytes"),
        ("Edema", 1e30, "the label 'Edema' holds more than 1, 0, -1 and blank"),
    ],
)
def test_values_that_no_build_writes_are_named_when_the_rows_are_read(two_scales, tmp_path, column, value, message):
    path = copy_set(two_scales, tmp_path / "set") / "rows.parquet"
    table = pq.read_table(path)
    at = table.column_names.index(column)
    values = [value, *table[column].to_pylist()[1:]]
    pq.write_table(table.set_column(at, column, pa.array(values, table.schema.field(column).type)), path)
    with pytest.raises(ShardError, match=message):
        read_rows(path)


def test_columns_of_another_type_or_twice_are_named_when_the_rows_are_read(two_scales, tmp_path):
    path = copy_set(two_scales, tmp_path / "set") / "rows.parquet"
    table = pq.read_table(path)
    for made, message in (
        (table.append_column("row", table["row"]), "a column is there twice"),
        (table.set_column(0, "row", table["row"].cast(pa.string())), "column 'row' holds string, not int64"),
        (table.append_column("Other", table["row"]), "column 'Other' holds int64, not float"),
        (table.drop_columns(["fold"]), "it lacks the columns fold"),
    ):
        pq.write_table(made, path)
        with pytest.raises(ShardError, match=message):
            read_rows(path)


# Manifests, indexes


@pytest.mark.parametrize("field", ["rows", "crc32", "sizes", "bytes", "shard", "scale"])
@pytest.mark.parametrize("value", [-1, 2**63, 2**70, "7", None, 1.5, [[]], {}])
def test_numbers_of_a_manifest_are_bounded(two_scales, tmp_path, field, value):
    folder = copy_set(two_scales, tmp_path / "set")
    change(folder / "32" / "000000.json", **{field: [value] if field in ("rows", "crc32", "sizes") else value})
    sign(folder)
    for words in (("describe", folder, "--out", tmp_path / "out"), ("verify", folder, "--deep")):
        done = invoke(*words)
        assert done.exit_code == 2
        assert isinstance(done.exception, SystemExit), done.exception
    with pytest.raises(CxrfastError):
        Reader(folder, 32)


@pytest.mark.parametrize("number", ["9" * 5000, "9" * 14, str(2**63), "-1", "1_0", "+1", "٣", "1e9"])
@pytest.mark.parametrize("field", [1, 2])
def test_numbers_of_an_index_are_bounded(two_scales, tmp_path, number, field):
    folder = copy_set(two_scales, tmp_path / "set")
    path = folder / "32" / "000000.idx"
    first, second, *rest = path.read_text().splitlines()
    words = second.split(" ")
    words[field] = number
    path.write_text("\n".join([first, " ".join(words), *rest]) + "\n")
    sign(folder)
    with pytest.raises(CxrfastError, match=r"000000.idx is damaged \(line 2 is not an image and its JSON\)"):
        Reader(folder, 32)
    assert invoke("verify", folder, "--deep").exit_code == 2


# Spreadsheets


def test_a_path_that_a_spreadsheet_would_run_is_written_as_the_same_path_that_it_does_not_run(two_scales):
    manifest = next(m for m in ShardSet(two_scales).manifests() if m.quarantined)
    row = int(next(iter(manifest.quarantined)))
    paths = {int(key): f"={key}|cmd.jpg" for key in manifest.quarantined}
    text = quarantine_bytes(paths, [manifest]).decode()
    assert f"{row},./={row}|cmd.jpg," in text
    assert np.all(
        [not field.startswith(("=", "+", "-", "@")) for line in text.splitlines() for field in line.split(",")]
    )
    assert pd.read_csv(io.StringIO(text))["row"].tolist() == sorted(paths)
