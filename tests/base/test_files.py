import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run

from cxrfast.files import (
    TEMPORARY,
    open_own,
    read_file,
    replacing,
    replacing_folder,
    sha256,
    temporary_name,
    write_bytes,
    write_json,
)


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


def test_a_file_that_cannot_be_written_is_named_as_the_user_knows_it(tmp_path):
    (tmp_path / "table.csv").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_bytes(tmp_path / "table.csv", b"new")
    assert str(caught.value) == f"[Errno 21] Is a directory: '{tmp_path / 'table.csv'}'"
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


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


# What others put in the way


def test_only_regular_files_and_links_to_them_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("pipe", "zero", "loop", "."):
        for read in (read_file, sha256):
            with pytest.raises(OSError, match=r"not a regular file|symbolic links|Is a directory"):
                read(tmp_path / name)
    assert read_file(tmp_path / "link") == b"abc"
    with pytest.raises(OSError, match="has more than 2 bytes"):
        read_file(tmp_path / "file", 2)


def test_a_file_in_a_shared_folder_is_ours_alone_or_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fchmod", lambda descriptor, mode: None)  # from its first moment on, not only after this
        os.close(open_own(tmp_path / "new"))
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(victim)
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    os.link(victim, tmp_path / "second")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("link", "is a link, which another user may have put there"),
        ("dangling", "is a link, which another user may have put there"),
        ("second", "has a second name"),
        ("pipe", "is not a regular file"),
    ):
        with pytest.raises(OSError, match=message):
            open_own(tmp_path / name)
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "absent").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_refused(tmp_path):
    (tmp_path / "theirs").touch()
    os.chown(tmp_path / "theirs", 65534, 65534)
    with pytest.raises(OSError, match="belongs to user 65534"):
        open_own(tmp_path / "theirs")


def test_a_folder_is_replaced_whole_or_if_the_block_raises_not_at_all(tmp_path):
    folder = tmp_path / "model"
    with replacing_folder(folder) as new:
        (new / "old").touch()
    with pytest.raises(ValueError, match="half"), replacing_folder(folder) as new:
        (new / "new").touch()
        raise ValueError("half")
    assert (names(tmp_path), names(folder)) == (["model"], ["old"])
    with replacing_folder(folder) as new:
        (new / "new").touch()
        assert names(folder) == ["old"]
    assert (names(tmp_path), names(folder)) == (["model"], ["new"])


def test_an_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    folder, rename = tmp_path / "model", os.rename
    folder.mkdir()
    (folder / "old").touch()

    def fails_once(source: Path, target: Path) -> None:
        if target == folder and not (Path(source) / "old").exists():
            raise OSError(28, "No space left on device", str(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails_once)
    with pytest.raises(OSError, match="No space left"), replacing_folder(folder) as new:
        (new / "new").touch()
    assert (names(tmp_path), names(folder)) == (["model"], ["old"])


def test_temporary_folders_of_killed_processes_are_removed_and_those_of_living_ones_stay(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = temporary_name(tmp_path / "model")
    theirs = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{ended.pid}-"))
    other = tmp_path / f"other.{theirs.name.partition('.')[2]}"
    for leftover in (mine, theirs, other):
        leftover.mkdir()
    with replacing_folder(tmp_path / "model"):
        pass
    assert names(tmp_path) == sorted([mine.name, other.name, "model"])
