"""A set names its source and where its tables are; a repair believes neither unless the user says so."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
from commands import invoke
from damage import contents, redescribe, repair
from sets import build

from cxrfast.errors import ShardError
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.upkeep.verify import verify


def damage(folder: Path) -> None:
    path = folder / "rows.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def module(folder: Path, monkeypatch: pytest.MonkeyPatch, marker: Path) -> str:
    """A module whose import, and whose call, leaves a trace."""
    name = f"clinic_{folder.name}".replace("-", "_")
    (folder / f"{name}.py").write_text(
        "from pathlib import Path\n"
        "from cxrfast.shards.sources.read import SOURCES\n"
        f"Path({str(marker)!r}).write_text('imported')\n"
        "def listed(tree):\n"
        f"    Path({str(marker)!r}).write_text('called')\n"
        "    return SOURCES['mimic'](tree)\n"
    )
    monkeypatch.syspath_prepend(folder)
    return f"{name}:listed"


@pytest.fixture
def hostile(folder, tmp_path, monkeypatch):
    """A set that names code, whose rows.parquet is damaged, and where the code leaves a trace."""
    marker = tmp_path / "marker"
    source = module(tmp_path, monkeypatch, marker)
    redescribe(folder, source=source)
    damage(folder)
    yield folder, source, marker
    sys.modules.pop(source.partition(":")[0], None)


def test_a_repair_neither_imports_nor_calls_what_a_set_names_as_its_source(hostile, phantoms):
    folder, source, marker = hostile
    done = invoke("verify", folder, "--repair", "--data", phantoms)
    assert done.exit_code == 2
    assert f"names the source {source}, which is code that a repair would run" in done.output
    assert f"--trust-source {source}" in done.output
    assert not marker.exists()
    invoke("verify", folder, "--repair", "--data", phantoms, "--trust-source", "os:system")
    assert not marker.exists()


def test_a_repair_runs_the_source_that_the_user_names_too(hostile, phantoms):
    folder, source, marker = hostile
    repair(folder, phantoms, trust_source=source, accept_new_bytes=True)
    assert marker.read_text() == "called"
    assert verify(folder).problems == []


def test_shell_commands_in_the_options_of_a_source_are_not_run(folder, phantoms, tmp_path):
    redescribe(folder, source="pydoc:pipepager", source_options={"cmd": f"touch {tmp_path}/PWNED"})
    damage(folder)
    assert invoke("verify", folder, "--repair", "--data", phantoms).exit_code == 2
    assert not (tmp_path / "PWNED").exists()


def test_a_build_imports_only_the_source_on_its_command_line(folder, phantoms, tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    source = module(tmp_path, monkeypatch, marker)
    redescribe(folder, source=source)
    with pytest.raises(ShardError, match=rf"was built with --source {source}, not mimic: give the same value"):
        build(phantoms, folder, [16])
    assert not marker.exists()
    assert build(phantoms, folder, [16], source=source).complete


# Tables


@pytest.fixture
def table_set(tmp_path, phantoms):
    """A set from a table outside the tree, the table and the set."""
    images = phantoms / "files"
    paths = sorted(str(path.relative_to(phantoms)) for path in images.rglob("*.jpg"))
    table = tmp_path / "labels.csv"
    pd.DataFrame({"path": paths, "patient_id": [Path(p).parts[2] for p in paths], "Mass": 1}).to_csv(table, index=False)
    out = tmp_path / "out" / "set"
    build(phantoms, out, [32], source="table", source_options={"table": str(table), "label": ["Mass"]})
    return table, out


def test_a_table_outside_the_tree_is_read_by_a_repair_only_where_the_user_says_it_is(table_set, phantoms):
    table, folder = table_set
    before = contents(folder)
    damage(folder)
    done = invoke("verify", folder, "--repair", "--data", phantoms, "--workers", 1)
    assert done.exit_code == 2
    assert (
        f"was built from the table {table}, which is outside --data: say where the table is, with --table"
        in done.output
    )
    done = invoke("verify", folder, "--repair", "--data", phantoms, "--workers", 1, "--table", table)
    assert done.exit_code == 0, done.output
    assert contents(folder) == before


def test_a_table_in_the_working_folder_is_found_by_a_repair(table_set, phantoms, monkeypatch):
    table, folder = table_set
    before = contents(folder)
    damage(folder)
    monkeypatch.chdir(table.parent)
    done = invoke("verify", folder, "--repair", "--data", phantoms, "--workers", 1, "--table", table.name)
    assert done.exit_code == 0, done.output
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["/etc/passwd.csv", "http://127.0.0.1:9/x.csv", "file:///etc/x.csv", "../secret.csv"])
def test_a_set_cannot_make_a_repair_open_other_files_or_addresses(table_set, phantoms, name, monkeypatch):
    _, folder = table_set
    redescribe(folder, source_options={"table": name, "label": ["Mass"]})
    damage(folder)
    done = invoke("verify", folder, "--repair", "--data", phantoms)
    assert done.exit_code == 2
    assert "with --table" in done.output or "not a path below the source tree" in done.output


@pytest.mark.parametrize("options", [{"table": 5}, {"table": {}, "label": "Mass"}, {"label": [1]}, {"labels": [["x"]]}])
def test_options_of_another_type_in_a_set_are_refused(folder, phantoms, options):
    redescribe(folder, source_options=options, source="mimic" if "labels" in options else "table")
    damage(folder)
    done = invoke("verify", folder, "--repair", "--data", phantoms)
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)


def test_options_of_a_repair_need_a_repair(folder):
    for option in ("--table", "--trust-source"):
        done = invoke("verify", folder, option, "x:y")
        assert (done.exit_code, f"{option} needs --repair" in done.output) == (2, True)


# Credentials


def test_credentials_in_the_location_of_a_table_are_in_no_file_of_the_set_and_in_no_message(phantoms, tmp_path):
    import fsspec

    paths = sorted(str(path.relative_to(phantoms)) for path in (phantoms / "files").rglob("*.jpg"))
    text = pd.DataFrame({"path": paths, "patient_id": [Path(p).parts[2] for p in paths], "Mass": 1}).to_csv(index=False)
    fsspec.filesystem("memory").pipe("/tables/labels.csv?sig=hunter2&part=1", text.encode())
    url = "memory://tables/labels.csv?sig=hunter2&part=1"
    out = tmp_path / "set"
    build(phantoms, out, [32], source="table", source_options={"table": url, "label": ["Mass"]})
    options = json.loads((out / "set.json").read_text())["source_options"]
    assert options["table"] == "memory://tables/labels.csv?part=1"
    assert not [name for name, data in contents(out).items() if b"hunter2" in data]
    before = contents(out)
    damage(out)
    done = invoke("verify", out, "--repair", "--data", phantoms, "--workers", 1)
    assert "with --table" in done.output
    done = invoke("verify", out, "--repair", "--data", phantoms, "--workers", 1, "--table", url)
    assert done.exit_code == 0, done.output
    assert contents(out) == before
    for words in (
        ("--table", url, "--label", "Absent"),
        ("--table", url.replace("labels", "absent"), "--label", "Mass"),
    ):
        done = invoke(
            "shard", "--data", phantoms, "--source", "table", *words, "--out", tmp_path / "new", "--scale", 32
        )
        assert done.exit_code == 2
        assert "hunter2" not in done.output
        assert "sig=***" in done.output


def test_credentials_of_a_table_of_labels_are_not_recorded(folder, phantoms):
    import fsspec

    rows = read_rows(folder / "rows.parquet")
    text = pd.DataFrame({"image_id": rows["image_id"], "Mass": 1}).to_csv(index=False)
    fsspec.filesystem("memory").pipe("/tables/new.csv?X-Amz-Signature=hunter2", text.encode())
    done = invoke("relabel", folder, "memory://tables/new.csv?X-Amz-Signature=hunter2")
    assert done.exit_code == 0, done.output
    assert "hunter2" not in done.output
    assert json.loads((folder / "set.json").read_text())["labels_from"].startswith("new.csv sha256:")
    assert not [name for name, data in contents(folder).items() if b"hunter2" in data]


def test_labels_of_a_table_are_checked_as_those_of_a_source_are(folder):
    rows = read_rows(folder / "rows.parquet")
    before = contents(folder)
    for label in ("a\x1b[31m", "=cmd|'/C calc'!A0", "x" * 201, "a\x7fb"):
        table = folder.parent / "labels.csv"
        pd.DataFrame({"image_id": rows["image_id"], label: 1}).to_csv(table, index=False)
        done = invoke("relabel", folder, table)
        assert done.exit_code == 2
        assert "the label" in done.output
        assert "\x1b" not in done.output
        assert contents(folder) == before
