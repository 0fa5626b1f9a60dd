import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run

from cxrfast.files import TEMPORARY, replacing, sha256, temporary_name, write_bytes, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_if_the_block_raises_not_at_all_and_no_other_file_stays(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), replacing(path) as file:
            file.write(b"half")
            raise error
        assert (path.read_bytes(), names(tmp_path)) == (b"old", ["file"])
    with replacing(path) as file:
        file.write(b"new and ")
        assert path.read_bytes() == b"old"
        file.write(b"longer")
    assert (path.read_bytes(), names(tmp_path)) == (b"new and longer", ["file"])


def test_a_writer_killed_half_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    script = (
        "import os, signal, sys; from pathlib import Path; from cxrfast.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, path], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    left = [name for name in names(tmp_path) if name != "file"]
    assert len(left) == 1
    assert left[0].endswith(TEMPORARY)


def test_files_honour_the_umask_and_a_folder_that_does_not_exist_is_the_system_s_own_error(tmp_path):
    before = os.umask(0o007)
    try:
        write_bytes(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o660
    with pytest.raises(FileNotFoundError):
        write_bytes(tmp_path / "absent" / "file", b"")


def test_temporary_names_lie_in_the_same_folder_and_are_never_the_same(tmp_path):
    script = (
        "import sys; from pathlib import Path; from cxrfast.files import temporary_name\n"
        "print(temporary_name(Path(sys.argv[1])))"
    )
    other = Path(run(sys.executable, "-c", script, tmp_path / "a.tar").stdout.strip())
    mine = temporary_name(tmp_path / "a.tar")
    assert len({other, mine, temporary_name(tmp_path / "a.tar")}) == 3
    assert other.parent == mine.parent == tmp_path


def test_json_is_read_back_and_the_same_value_gives_the_same_bytes(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"Röntgen": True}}
    write_json(tmp_path / "one", value)
    write_json(tmp_path / "two", json.loads((tmp_path / "one").read_bytes()))
    assert json.loads((tmp_path / "one").read_bytes()) == value
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert "Röntgen" in (tmp_path / "one").read_text(encoding="utf-8")


def test_sha256_is_that_of_the_bytes(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()
