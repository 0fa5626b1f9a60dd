import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from damage import contents, copy_set, flip_bit, sign
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrfast.errors import ShardError
from cxrfast.files import TEMPORARY, sha256
from cxrfast.shards.format.checksums import read_sums
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.lock import Lease
from cxrfast.shards.format.rows import read_rows, write_rows
from cxrfast.shards.storage import CHUNK
from cxrfast.shards.upkeep import stage as module
from cxrfast.shards.upkeep.stage import Staged
from cxrfast.shards.upkeep.stage import stage as stage_set
from cxrfast.shards.upkeep.verify import Problem, verify

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
sys.stdin.read()  # ends with whoever started it
"""


def stage(source: Path | str, to: Path | str, scales: list[int] | None = None, **options) -> Staged:
    return stage_set(source, to, scales, quiet=True, **options)


class Bucket:
    """A bucket of an S3 server on this machine."""

    def __init__(self, fs: fsspec.AbstractFileSystem, name: str) -> None:
        self.fs = fs
        fs.mkdir(name)
        self.name, self.url = name, f"s3://{name}/some/set"

    def contents(self) -> dict[str, bytes]:
        """Every object of the set, by its relative name."""
        root = f"{self.name}/some/set"
        return {path.removeprefix(f"{root}/"): self.fs.cat_file(path) for path in self.fs.find(root)}

    def at(self, name: str) -> str:
        return f"{self.name}/some/set/{name}"

    def uploads(self) -> list[dict]:
        """Multipart uploads that were neither finished nor given up: they cost money, and nobody sees them."""
        return self.fs.list_multipart_uploads(self.name)


@pytest.fixture(scope="module")
def server() -> Iterator[fsspec.AbstractFileSystem]:
    """An S3 server of this machine as fsspec sees it, and in the environment all that other clients need."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as child,
    ):
        patch.setenv("AWS_ENDPOINT_URL", child.stdout.readline().strip())
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        child.stdin.close()


@pytest.fixture
def bucket(server: fsspec.AbstractFileSystem, request: pytest.FixtureRequest) -> Bucket:
    return Bucket(server, f"bucket-{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]}")


@pytest.fixture
def folder(tiny_set: Path, tmp_path: Path) -> Path:
    """A copy of the tiny set that can be spoiled."""
    return copy_set(tiny_set, tmp_path / "from")


@pytest.fixture(scope="module")
def large_set(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny set with tars of several chunks at 64 px, by zeros at their ends as tar allows them."""
    folder = copy_set(tiny_set, tmp_path_factory.mktemp("large") / "set")
    for path in folder.glob("64/*.tar"):
        size = 2 * CHUNK + 512
        os.truncate(path, size)
        change(path.with_suffix(".json"), sha256=sha256(path), bytes=size)
    sign(folder)
    return folder


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **fields}) + "\n")


def sums(names: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in names.items() if name != "SHA256SUMS"}


def of_scale(files: dict[str, bytes], *scales: int) -> dict[str, bytes]:
    """The files of these scales, and those of the plan."""
    return {
        name: data
        for name, data in files.items()
        if name != "SHA256SUMS" and ("/" not in name or int(name.split("/")[0]) in scales)
    }


def start(source: Path | str, to: Path | str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "cxrfast", "stage", str(source), str(to), "--workers", "2"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def signal_when(source: Path | str, to: Path | str, ready: Callable[[], bool], which: signal.Signals) -> int:
    """Stage in a process that is sent a signal as soon as `ready`; its return code."""
    with start(source, to) as child:
        while child.poll() is None and not ready():
            time.sleep(0.001)
        child.send_signal(which)
        child.communicate()
    return child.returncode


# There and back


def test_a_set_comes_back_from_an_object_store_with_the_same_bytes(either_set, bucket, tmp_path):
    there = stage(either_set, bucket.url)
    assert bucket.contents() == contents(either_set)
    back = stage(bucket.url, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(either_set)
    assert verify(tmp_path / "back", deep=True, quiet=True).problems == []
    size = sum(len(data) for name, data in contents(either_set).items() if name != "SHA256SUMS")
    for done in (there, back):
        assert (done.scales, done.files, done.bytes, done.kept) == ([32, 64], 21, size, 0)


def test_a_second_time_everything_is_kept_and_nothing_written(tiny_set, bucket, tmp_path):
    for to in (bucket.url, tmp_path / "to"):
        stage(tiny_set, to)
    objects = {path: info["LastModified"] for path, info in bucket.fs.find(bucket.at(""), detail=True).items()}
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "to").rglob("*.*")}
    for to in (bucket.url, tmp_path / "to"):
        done = stage(tiny_set, to)
        assert (done.files, done.bytes, done.kept) == (0, 0, 21)
    assert {path: info["LastModified"] for path, info in bucket.fs.find(bucket.at(""), detail=True).items()} == objects
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_between_two_places_of_an_object_store_and_two_folders_alike(large_set, bucket, tmp_path):
    stage(large_set, bucket.url)
    stage(bucket.url, f"s3://{bucket.name}/other/", workers=3)
    stage(large_set, tmp_path / "a" / "b" / "set", workers=3)
    stage(f"s3://{bucket.name}/other", tmp_path / "back")
    assert contents(tmp_path / "a" / "b" / "set") == contents(tmp_path / "back") == contents(large_set)
    assert bucket.uploads() == []


def test_the_command_says_what_it_did(tiny_set, bucket):
    with start(tiny_set, bucket.url) as child:
        out, _ = child.communicate()
    assert child.returncode == 0
    assert out.startswith(f"to {bucket.url}: 2 scales, 21 files, ")
    assert " copied, 0 kept, " in out


def test_only_what_the_sums_list_travels(folder, tiny_set, bucket, tmp_path):
    for name in ("lease.json", "notes.txt", "32/000000.tar.host-1.tmp", "64/000009.tar"):
        (folder / name).write_text("no part of the set")
    for to in (bucket.url, tmp_path / "to"):
        stage(folder, to)
    assert contents(tmp_path / "to") == bucket.contents() == contents(tiny_set)


# Scales


@pytest.mark.parametrize("remote", [False, True])
def test_scales_staged_one_at_a_time_make_the_whole_set(tiny_set, bucket, tmp_path, remote):
    to = bucket.url if remote else tmp_path / "to"
    look = bucket.contents if remote else lambda: contents(tmp_path / "to")
    assert stage(tiny_set, to, [64]).scales == [64]
    first = look()
    assert of_scale(first, 64) == of_scale(contents(tiny_set), 64)
    assert first["SHA256SUMS"].decode() == "".join(f"{h}  {n}\n" for n, h in sorted(sums(first).items()))
    if not remote:
        assert verify(to, quiet=True).rows == {64: 150}
    done = stage(tiny_set, to, [32])
    assert (done.scales, done.files, done.kept) == ([32], 9, 3)
    assert look() == contents(tiny_set)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("forgotten", [False, True])
def test_a_scale_that_came_from_another_copy_stays_and_stays_listed(tiny_set, bucket, tmp_path, remote, forgotten):
    to = bucket.url if remote else tmp_path / "to"
    for scale in (32, 64):
        stage(tiny_set, tmp_path / str(scale), [scale])
    stage(tmp_path / "32", to)
    if forgotten:  # killed while another scale was staged
        bucket.fs.rm_file(bucket.at("SHA256SUMS")) if remote else (to / "SHA256SUMS").unlink()
    stage(tmp_path / "64", to)
    assert (bucket.contents() if remote else contents(to)) == contents(tiny_set)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_damage_to_a_scale_that_came_earlier_is_not_signed_as_right(tiny_set, tmp_path, elsewhere):
    to = tmp_path / "to"
    stage(tiny_set, to, [32])
    flip_bit(to / "32/000001.idx", 3)
    source = tiny_set
    if elsewhere:
        source = tmp_path / "64"
        stage(tiny_set, source, [64])
    stage(source, to, [64])
    assert verify(to, quiet=True).problems == [Problem("32/000001.idx", "its bytes have changed")]


def test_a_scale_that_is_not_there_is_an_error_that_names_those_that_are(tiny_set, tmp_path):
    with pytest.raises(ShardError, match=r"has no 128, 512 px: it holds 32, 64 px"):
        stage(tiny_set, tmp_path / "to", [512, 32, 128])
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("remote", [False, True])
def test_shards_built_again_are_not_mixed_with_other_scales_of_before(folder, bucket, tmp_path, remote):
    to = bucket.url if remote else tmp_path / "to"
    stage(folder, to)
    before = bucket.contents() if remote else contents(to)
    for scale in (32, 64):
        change(folder / f"{scale}/000001.json", quarantined={"70": "truncated"})
    sign(folder)
    with pytest.raises(ShardError, match=r"holds 32 px as it was before .* stage it too \(--scale 32\)"):
        stage(folder, to, [64])
    assert (bucket.contents() if remote else contents(to)) == before
    stage(folder, to)
    assert (bucket.contents() if remote else contents(to)) == contents(folder)


# Killed


def test_an_upload_killed_half_way_is_finished_by_the_same_command_and_repeats_no_whole_shard(large_set, bucket):
    def shards() -> list[str]:
        return [name for name in bucket.fs.find(bucket.at("")) if name.endswith(".json") and "/set.json" not in name]

    assert signal_when(large_set, bucket.url, lambda: len(shards()) > 0, signal.SIGKILL) == -signal.SIGKILL
    assert "SHA256SUMS" not in bucket.contents()
    whole = len(shards())
    assert stage(large_set, bucket.url).kept == 3 + 3 * whole
    assert bucket.contents() == contents(large_set)


def test_a_download_killed_half_way_is_finished_by_the_same_command(large_set, bucket, tmp_path):
    stage(large_set, bucket.url)
    to = tmp_path / "to"
    for whole in (1, 3):

        def ready(whole: int = whole) -> bool:
            return len(list(to.glob("*/*.tar"))) >= whole and any(to.glob(f"*/*.tar.*{TEMPORARY}"))

        assert signal_when(bucket.url, to, ready, signal.SIGKILL) == -signal.SIGKILL
        with pytest.raises(ShardError, match=r"is not finished .*`cxrfast stage` command again"):
            verify(to, quiet=True)
    whole = len(list(to.glob("*/*.tar")))
    assert whole >= 3
    assert stage(bucket.url, to).kept >= whole
    assert contents(to) == contents(large_set)
    assert verify(to, quiet=True).problems == []


def test_an_interrupted_upload_leaves_nothing_half_behind(large_set, bucket):
    signal_when(large_set, bucket.url, lambda: len(bucket.uploads()) > 0, signal.SIGINT)
    assert bucket.uploads() == []
    assert "SHA256SUMS" not in bucket.contents()
    stage(large_set, bucket.url)
    assert bucket.contents() == contents(large_set)


def test_two_uploads_at_once_end_with_the_same_bytes(large_set, bucket):
    with start(large_set, bucket.url) as one, start(large_set, bucket.url) as two:
        errors = [child.communicate()[1] for child in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), errors
    assert bucket.contents() == contents(large_set)


def test_a_folder_that_another_command_writes_into_is_refused(tiny_set, tmp_path):
    to = tmp_path / "to"
    stage(tiny_set, to, [32])
    before = contents(to)
    with Lease(to):
        with pytest.raises(ShardError, match=f"to is being built by process {os.getpid()} on "):
            stage(tiny_set, to)
        assert {name: data for name, data in contents(to).items() if name != "lease.json"} == before
    stage(tiny_set, to)
    assert contents(to) == contents(tiny_set)


# What is there already


DAMAGE = ("missing", "flipped", "truncated", "empty", "longer")


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "flipped":
        flip_bit(path, len(data) // 2)
    else:
        path.write_bytes({"truncated": data[:-1], "empty": b"", "longer": data + b"\0"}[how])


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_whatever_became_of_a_local_copy_only_what_differs_is_copied_again(tiny_set, tmp_path_factory, data):
    to = copy_set(tiny_set, tmp_path_factory.mktemp("spoilt") / "to")
    names = sorted(contents(tiny_set).keys() - {"set.json"})
    spoilt = data.draw(st.dictionaries(st.sampled_from(names), st.sampled_from(DAMAGE), max_size=6))
    for name, how in spoilt.items():
        spoil(to / name, how)
    done = stage(tiny_set, to)
    assert contents(to) == contents(tiny_set)
    again = {name.rsplit(".", 1)[0] + ".json" for name in spoilt if "/" in name}  # a manifest follows its tar
    assert done.files == len((spoilt.keys() | again) - {"SHA256SUMS"})
    shutil.rmtree(to.parent)


@pytest.mark.parametrize(
    ("name", "data", "copied"),
    [
        ("32/000001.tar", lambda data: data[:-512], 2),
        ("32/000001.idx", lambda data: b"", 2),
        ("32/000001.json", lambda data: data.replace(b"32", b"23", 1), 3),
        ("rows.parquet", lambda data: data[::-1], 1),
        ("SHA256SUMS", lambda data: data[:-1], 0),
    ],
)
def test_objects_that_differ_are_replaced(tiny_set, bucket, name, data, copied):
    stage(tiny_set, bucket.url)
    bucket.fs.pipe_file(bucket.at(name), data((tiny_set / name).read_bytes()))
    assert stage(tiny_set, bucket.url).files == copied
    assert bucket.contents() == contents(tiny_set)


def test_a_tar_of_the_right_size_without_its_manifest_is_not_relied_on(tiny_set, bucket):
    stage(tiny_set, bucket.url)
    data = (tiny_set / "64/000000.tar").read_bytes()
    bucket.fs.pipe_file(bucket.at("64/000000.tar"), data[::-1])
    bucket.fs.rm_file(bucket.at("64/000000.json"))
    assert stage(tiny_set, bucket.url).files == 3
    assert bucket.contents() == contents(tiny_set)


@pytest.mark.parametrize("remote", [False, True])
def test_other_labels_reach_a_copy_and_no_tar_is_copied_again(folder, bucket, tmp_path, remote):
    to = bucket.url if remote else tmp_path / "to"
    stage(folder, to)
    info, rows = read_set(folder), read_rows(folder / "rows.parquet")
    label, renamed = info.labels[0], info.labels[0][::-1]
    write_rows(folder / "rows.parquet", rows.rename(columns={label: renamed}))
    change(folder / "set.json", labels=[renamed, *info.labels[1:]])
    sign(folder)
    assert stage(folder, to, [32]).files == 2
    assert (bucket.contents() if remote else contents(to)) == contents(folder)


# Damaged


@pytest.mark.parametrize("remote", [False, True])
def test_a_damaged_file_does_not_travel_and_is_named_and_the_others_do(large_set, bucket, tmp_path, remote):
    folder = copy_set(large_set, tmp_path / "from")
    to = bucket.url if remote else tmp_path / "to"
    flip_bit(folder / "32/000000.idx", 0)
    flip_bit(folder / "64/000001.tar", -1)
    with pytest.raises(ShardError, match=r"from is damaged.*: 32/000000.idx, 64/000001.tar not as .*cxrfast verify"):
        stage(folder, to)
    there = bucket.contents() if remote else contents(to)
    assert contents(folder).keys() - there.keys() == {
        "SHA256SUMS",
        *(f"32/000000.{suffix}" for suffix in ("idx", "json")),
        *(f"64/000001.{suffix}" for suffix in ("tar", "idx", "json")),
    }
    assert all(data == contents(large_set)[name] for name, data in there.items())
    assert bucket.uploads() == []
    stage(large_set, to)
    assert (bucket.contents() if remote else contents(to)) == contents(large_set)


@pytest.mark.parametrize("remote", [False, True])
def test_a_copy_that_stopped_half_way_is_known_to_be_unfinished_and_has_no_manifest_of_another_tar(
    folder, bucket, tmp_path, remote
):
    to = bucket.url if remote else tmp_path / "to"
    stage(folder, to)
    flip_bit(folder / "64/000001.tar", -1)
    flip_bit(folder / "64/000001.idx", -2)
    change(folder / "64/000001.json", sha256=sha256(folder / "64/000001.tar"))
    sign(folder)
    flip_bit(folder / "64/000001.idx", 0)
    with pytest.raises(ShardError, match=r"damaged.*64/000001.idx not as"):
        stage(folder, to)
    there = bucket.contents() if remote else contents(to)
    assert there["64/000001.tar"] == (folder / "64/000001.tar").read_bytes()
    assert contents(folder).keys() - there.keys() == {"64/000001.json", "SHA256SUMS"}
    with pytest.raises(ShardError, match="is not finished"):
        stage(to, tmp_path / "further")
    flip_bit(folder / "64/000001.idx", 0)
    stage(folder, to)
    assert (bucket.contents() if remote else contents(to)) == contents(folder)


def test_a_damaged_plan_stops_before_any_shard_is_copied(folder, bucket):
    flip_bit(folder / "rows.parquet", 50)
    with pytest.raises(ShardError, match=r"damaged.*rows.parquet not as"):
        stage(folder, bucket.url)
    assert bucket.contents() == {}


def test_a_source_that_lacks_a_file_is_refused(folder, bucket, tmp_path):
    (folder / "64/000002.idx").unlink()
    with pytest.raises(ShardError, match=r"is damaged: it lacks 64/000002.idx"):
        stage(folder, bucket.url)
    stage(folder, bucket.url, [32])
    bucket.fs.rm_file(bucket.at("32/000000.tar"))
    with pytest.raises(ShardError, match=r"is damaged: it lacks 32/000000.tar"):
        stage(bucket.url, tmp_path / "to")
    assert not (tmp_path / "to").exists()


# No room


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB that takes 20 files and folders."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m,nr_inodes=20", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs to mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_an_error_and_after_making_room_the_same_call_goes_on(tiny_set, small_disk):
    to = small_disk / "set"
    with pytest.raises(
        ShardError, match=r"no space or quota left in .*set: what was copied is kept; make room and run"
    ):
        stage(tiny_set, to)
    assert not list(to.rglob(f"*{TEMPORARY}"))
    kept = sum(path.is_file() for path in to.rglob("*"))
    assert kept >= 10
    subprocess.run(["mount", "-o", "remount,nr_inodes=100", str(small_disk)], check=True)
    assert stage(tiny_set, to).kept >= kept - 4, "two shards were under way"
    assert contents(to) == contents(tiny_set)


def test_a_set_that_does_not_fit_is_refused_before_anything_is_written(large_set, small_disk):
    with pytest.raises(
        ShardError, match=r"needs [\d.]+ MB more and 16\.\d MB are free: make room, or stage fewer scales"
    ):
        stage(large_set, small_disk / "set")
    assert list(small_disk.iterdir()) == []


# A remote place that fails


class Flaky(DirFileSystem):
    """A remote file system that is a folder here, and whose files fail when they are first opened `failures` times."""

    protocol = "flaky"
    failures: int = 0
    opened: dict[str, int] = {}  # noqa: RUF012 - set by each test

    def __init__(self, **options) -> None:
        super().__init__(path="/", fs=LocalFileSystem(), **options)

    def open(self, path, mode="rb", *args, **options):
        tries = self.opened[path] = self.opened.get(path, 0) + 1
        if path.endswith(".tar") and tries <= self.failures:
            raise RuntimeError("the driver's own idea of a lost connection")
        return super().open(path, mode, *args, **options)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> type[Flaky]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(Flaky, "opened", {})
    monkeypatch.setattr(module, "WAITS", (0.01, 0.01))
    return Flaky


@pytest.mark.parametrize("upload", [False, True])
def test_a_file_that_fails_twice_is_copied_at_the_third_try(tiny_set, tmp_path, flaky, upload):
    flaky.failures = 2
    places = [tiny_set, f"flaky://{tmp_path}/to"] if upload else [f"flaky://{tiny_set}", tmp_path / "to"]
    done = stage(*places)
    assert contents(tmp_path / "to") == contents(tiny_set)
    assert done.bytes == sum(len(data) for name, data in contents(tiny_set).items() if name != "SHA256SUMS")


@pytest.mark.parametrize("upload", [False, True])
def test_a_file_that_keeps_failing_is_one_error_and_leaves_nothing_half(tiny_set, tmp_path, flaky, upload):
    flaky.failures = 3
    places = [tiny_set, f"flaky://{tmp_path}/to"] if upload else [f"flaky://{tiny_set}", tmp_path / "to"]
    with pytest.raises(
        ShardError, match=r"\.tar could not be copied from .* to .* \(RuntimeError: the driver's own idea"
    ):
        stage(*places)
    assert all(data == contents(tiny_set)[name] for name, data in contents(tmp_path / "to").items())
    flaky.failures = 0
    stage(*places)
    assert contents(tmp_path / "to") == contents(tiny_set)


def test_a_bucket_that_does_not_exist_is_told(tiny_set, server, tmp_path):
    for places in ([tiny_set, "s3://absent-bucket/set"], ["s3://absent-bucket/set", tmp_path / "to"]):
        with pytest.raises(
            ShardError, match=r"s3://absent-bucket/set cannot be reached \(The specified bucket does not"
        ):
            stage(*places)


def test_missing_credentials_and_a_wrong_endpoint_are_one_message_each(tiny_set, bucket, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(ShardError, match=r"Unable to locate credentials\): check the address, the credentials"):
        stage(tiny_set, bucket.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    for address in ("http://127.0.0.1:9", "nonsense"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with pytest.raises(ShardError, match=rf"cannot be reached \(.*{address}.*AWS_ENDPOINT_URL says where"):
            stage(tiny_set, bucket.url)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_driver_that_is_missing_is_named(tiny_set):
    script = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from cxrfast.cli.main import cli; cli(['stage', sys.argv[1], 's3://bucket/set'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tiny_set], capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 2
    assert "s3fs" in done.stderr
    assert "Traceback" not in done.stderr


# Refused


@pytest.mark.parametrize("remote", [False, True])
def test_another_set_and_anything_that_is_no_set_are_refused_and_nothing_is_touched(folder, bucket, tmp_path, remote):
    other, notes = copy_set(folder, tmp_path / "other"), tmp_path / "notes"
    change(other / "set.json", id="0" * 32)
    notes.mkdir()
    (notes / "thesis.tex").write_text("all of it")
    for place, message in ((other, "holds another set"), (notes, "is not empty and not a shard set")):
        to, before = place, contents(place)
        if remote:
            to = f"s3://{bucket.name}/{place.name}"
            bucket.fs.put(f"{place}/", to, recursive=True)
        with pytest.raises(ShardError, match=message):
            stage(folder, to)
        assert contents(place) == before
    if remote:
        assert bucket.fs.cat_file(f"{bucket.name}/notes/thesis.tex") == b"all of it"
        assert len(bucket.fs.find(f"{bucket.name}/notes")) == 1


def test_an_unfinished_source_is_refused(folder, bucket, tmp_path):
    stage(folder, bucket.url)
    bucket.fs.rm_file(bucket.at("SHA256SUMS"))
    (folder / "SHA256SUMS").unlink()
    for source in (folder, bucket.url):
        with pytest.raises(ShardError, match=r"is not finished \(no SHA256SUMS\)"):
            stage(source, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_what_is_no_set_a_file_or_the_same_place_is_refused(tiny_set, bucket, tmp_path):
    with pytest.raises(ShardError, match=r"is not a shard set \(no set.json\)"):
        stage(tmp_path / "absent", tmp_path / "to")
    with pytest.raises(ShardError, match=r"is not a shard set \(no set.json\)"):
        stage(bucket.url, tmp_path / "to")
    with pytest.raises(ShardError, match=r"set\.json is a file"):
        stage(tiny_set, tiny_set / "set.json")
    (tmp_path / "link").symlink_to(tiny_set)
    for source, to in (
        (tiny_set, tmp_path / "link" / "32"),
        (bucket.url, f"s3://{bucket.name}/some"),
        (bucket.url, bucket.url + "/"),
    ):
        with pytest.raises(ShardError, match="are the same place, or one is inside the other"):
            stage(source, to)
    with pytest.raises(ShardError, match="s4://bucket/set cannot be opened"):
        stage(tiny_set, "s4://bucket/set")
    with pytest.raises(ShardError, match=r"s3:// cannot be reached|s3:// is not empty"):
        stage(tiny_set, "s3://")


def test_a_set_in_an_archive_is_unpacked(tiny_set, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "set"), "zip", tiny_set)
    stage(f"zip://::{archive}", tmp_path / "to")
    assert contents(tmp_path / "to") == contents(tiny_set)


def test_what_a_killed_call_left_in_a_folder_is_cleared_away(tiny_set, tmp_path):
    to = tmp_path / "to"
    (to / "32").mkdir(parents=True)
    for name in ("rows.parquet.host-1.tmp", "32/000000.tar.host-1.tmp"):
        (to / name).write_text("half")
    (to / "rows.parquet").write_text("an earlier state")
    (to / "32").rename(to.parent / "32")  # a killed call leaves no scale before its set.json
    stage(tiny_set, to)
    assert contents(to) == contents(tiny_set)
    assert read_sums(to) == sums(contents(to))
