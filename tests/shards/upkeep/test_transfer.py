import signal
import subprocess

import fsspec
import pytest
from damage import change, contents, copy_set, flip_bit, mounted, sign
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from staging import signal_when, start

from cxrfast.errors import ShardError
from cxrfast.files import TEMPORARY, sha256
from cxrfast.shards.upkeep import transfer
from cxrfast.shards.upkeep.stage import stage
from cxrfast.shards.upkeep.verify import verify

# Killed


@pytest.mark.slow
def test_an_upload_killed_half_way_is_finished_by_the_same_command_and_repeats_no_whole_shard(large_set, s3_bucket):
    def shards() -> list[str]:
        return [
            name for name in s3_bucket.fs.find(s3_bucket.at("")) if name.endswith(".json") and "/set.json" not in name
        ]

    assert signal_when(large_set, s3_bucket.url, lambda: len(shards()) > 0, signal.SIGKILL) == -signal.SIGKILL
    assert "SHA256SUMS" not in s3_bucket.contents()
    whole = len(shards())
    assert stage(large_set, s3_bucket.url).kept == 3 + 3 * whole
    assert s3_bucket.contents() == contents(large_set)


@pytest.mark.slow
def test_a_download_killed_half_way_is_finished_by_the_same_command(large_set, s3_bucket, tmp_path):
    stage(large_set, s3_bucket.url)
    to = tmp_path / "to"
    for whole in (1, 3):

        def ready(whole: int = whole) -> bool:
            return len(list(to.glob("*/*.tar"))) >= whole and any(to.glob(f"*/*.tar.*{TEMPORARY}"))

        assert signal_when(s3_bucket.url, to, ready, signal.SIGKILL) == -signal.SIGKILL
        with pytest.raises(ShardError, match=r"is not finished .*`cxrfast stage` command again"):
            verify(to)
    whole = len(list(to.glob("*/*.tar")))
    assert whole >= 3
    assert stage(s3_bucket.url, to).kept >= whole
    assert contents(to) == contents(large_set)
    assert verify(to).problems == []


@pytest.mark.slow
def test_an_interrupted_upload_leaves_nothing_half_behind(large_set, s3_bucket):
    signal_when(large_set, s3_bucket.url, lambda: len(s3_bucket.uploads()) > 0, signal.SIGINT)
    assert s3_bucket.uploads() == []
    assert "SHA256SUMS" not in s3_bucket.contents()
    stage(large_set, s3_bucket.url)
    assert s3_bucket.contents() == contents(large_set)


@pytest.mark.slow
def test_two_uploads_at_once_end_with_the_same_bytes(large_set, s3_bucket):
    with start(large_set, s3_bucket.url) as one, start(large_set, s3_bucket.url) as two:
        errors = [child.communicate()[1] for child in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), errors
    assert s3_bucket.contents() == contents(large_set)


# Damaged


def test_a_damaged_file_does_not_travel_and_is_named_and_the_others_do(large_set, place, tmp_path):
    folder = copy_set(large_set, tmp_path / "from")
    flip_bit(folder / "32/000000.idx", 0)
    flip_bit(folder / "64/000001.tar", -1)
    with pytest.raises(
        ShardError, match=r"from is damaged.* SHA256SUMS: 32/000000.idx, 64/000001.tar\. .*cxrfast verify"
    ):
        stage(folder, place.url)
    there = place.contents()
    assert contents(folder).keys() - there.keys() == {
        "SHA256SUMS",
        *(f"32/000000.{suffix}" for suffix in ("idx", "json")),
        *(f"64/000001.{suffix}" for suffix in ("tar", "idx", "json")),
    }
    assert all(data == contents(large_set)[name] for name, data in there.items())
    assert place.uploads() == []
    stage(large_set, place.url)
    assert place.contents() == contents(large_set)


def test_a_copy_that_stopped_half_way_is_known_to_be_unfinished_and_has_no_manifest_of_another_tar(
    folder, place, tmp_path
):
    stage(folder, place.url)
    flip_bit(folder / "64/000001.tar", -1)
    flip_bit(folder / "64/000001.idx", -2)
    change(folder / "64/000001.json", sha256=sha256(folder / "64/000001.tar"))
    sign(folder)
    flip_bit(folder / "64/000001.idx", 0)
    with pytest.raises(ShardError, match=r"damaged.*SHA256SUMS: 64/000001.idx"):
        stage(folder, place.url)
    there = place.contents()
    assert there["64/000001.tar"] == (folder / "64/000001.tar").read_bytes()
    missing = {"64/000001.json", "SHA256SUMS"}
    if not place.is_folder and not place.is_s3:
        missing.add("64/000001.idx")  # memory, as sftp, has no uploads that appear when they are whole
    assert contents(folder).keys() - there.keys() == missing
    with pytest.raises(ShardError, match="is not finished"):
        stage(place.url, tmp_path / "further")
    flip_bit(folder / "64/000001.idx", 0)
    stage(folder, place.url)
    assert place.contents() == contents(folder)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB that takes 20 files and folders."""
    with mounted(tmp_path / "disk", "size=16m,nr_inodes=20") as disk:
        yield disk


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


# A remote storage that fails


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
def flaky(monkeypatch):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(Flaky, "opened", {})
    monkeypatch.setattr(transfer, "WAITS", (0.01, 0.01))
    return Flaky


@pytest.mark.parametrize("upload", [False, True])
def test_a_file_is_tried_three_times_and_then_is_one_error_and_leaves_nothing_half(tiny_set, tmp_path, flaky, upload):
    places = [tiny_set, f"flaky://{tmp_path}/to"] if upload else [f"flaky://{tiny_set}", tmp_path / "to"]
    flaky.failures = 3
    with pytest.raises(
        ShardError, match=r"\.tar could not be copied from .* to .* \(RuntimeError: the driver's own idea"
    ):
        stage(*places)
    there = contents(tmp_path / "to")
    assert all(data == contents(tiny_set)[name] for name, data in there.items())
    flaky.opened.clear()
    flaky.failures = 2
    done = stage(*places)
    assert contents(tmp_path / "to") == contents(tiny_set)
    copied = contents(tiny_set).keys() - there.keys() - {"SHA256SUMS"}
    assert done.bytes == sum(len(contents(tiny_set)[name]) for name in copied)


@pytest.mark.slow
def test_an_absent_bucket_missing_credentials_and_a_wrong_endpoint_are_one_message_each(
    tiny_set, s3_bucket, monkeypatch, tmp_path
):
    for places in ([tiny_set, "s3://absent-bucket/set"], ["s3://absent-bucket/set", tmp_path / "to"]):
        with pytest.raises(
            ShardError, match=r"s3://absent-bucket/set cannot be reached \(The specified bucket does not"
        ):
            stage(*places)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(ShardError, match=r"Unable to locate credentials\): check the address, the credentials"):
        stage(tiny_set, s3_bucket.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    for address in ("http://127.0.0.1:9", "nonsense"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with pytest.raises(ShardError, match=rf"cannot be reached \(.*{address}.*AWS_ENDPOINT_URL is the address"):
            stage(tiny_set, s3_bucket.url)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
