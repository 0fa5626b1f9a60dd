import gc
import hashlib
import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from damage import contents
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cxrfast.errors import ShardError
from cxrfast.labels import MIMIC
from cxrfast.shards.format.codec import decode_member
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.manifest import read_manifest
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.format.tar import TarWriter, read_index

SHARDS = 3
SAMPLE = "png 512 99 000000064.png json 1536 99 000000064.json"
MEMBERS = st.lists(st.tuples(st.binary(max_size=1500), st.binary(max_size=600)), max_size=6)


def tars(folder: Path, scale: int) -> list[Path]:
    return [shard_path(folder, scale, n, "tar") for n in range(SHARDS)]


def suffix(folder: Path) -> str:
    """Suffix of the images in the set's tars."""
    return {"jpeg": "jpg", "raw": "pgm"}[read_set(folder).codec]


def by_tarfile(folder: Path, scale: int) -> list[tuple[str, bytes]]:
    """Every member of every tar of the scale, in order, as Python's own library reads them: none tells who built it or when."""
    members = []
    for path in tars(folder, scale):
        with tarfile.open(path) as tar:
            members += [(m.name, tar.extractfile(m).read()) for m in tar]
            assert all((m.mtime, m.uid, m.gid, m.uname, m.gname) == (0, 0, 0, "", "") for m in tar)
    return members


@pytest.mark.parametrize("scale", [32, 64])
def test_tarfile_finds_every_row_in_order_with_its_ids_and_labels_next_to_it(either_set, scale):
    members = by_tarfile(either_set, scale)
    for shard in range(SHARDS):
        indexed = [row for row, _, _ in read_index(either_set, scale, shard)]
        assert indexed == read_manifest(either_set, scale, shard).rows
    rows, kinds = read_rows(either_set / "rows.parquet"), (suffix(either_set), "json")
    assert [name for name, _ in members] == [f"{row:09d}.{kind}" for row in rows["row"] for kind in kinds]
    for record, (_, data) in zip(rows.to_dict("records"), members[1::2], strict=True):
        meta = json.loads(data)
        assert {key: meta[key] for key in ("row", "image_id", "study_id", "patient_id")} == {
            key: record[key] for key in ("row", "image_id", "study_id", "patient_id")
        }
        assert list(meta["labels"]) == list(MIMIC)
        for label, value in meta["labels"].items():
            assert value == record[label] or (value is None and np.isnan(record[label]))


@pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning"
)  # webdataset leaves closing its tars to the collector
def test_webdataset_reads_every_sample_in_order_and_decodes_it(either_set):
    kind, expected = suffix(either_set), dict(by_tarfile(either_set, 32))
    dataset = webdataset.WebDataset([str(path) for path in tars(either_set, 32)], shardshuffle=False)
    samples, decoded = list(dataset), list(dataset.decode("l8"))
    assert [sample["__key__"] for sample in samples] == [f"{row:09d}" for row in range(150)]
    for sample, image in zip(samples, decoded, strict=True):
        assert sample[kind] == expected[f"{sample['__key__']}.{kind}"]
        assert sample["json"] == expected[sample["__key__"] + ".json"]
        pixels = decode_member(sample[kind], read_set(either_set).codec)
        np.testing.assert_array_equal(image[kind], pixels)
        np.testing.assert_array_equal(Image.open(io.BytesIO(sample[kind])), pixels)
    del dataset
    gc.collect()  # while the warning is ignored


def test_dali_s_own_tar_reader_reads_every_sample_in_order_with_our_indexes(either_set):
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=50, num_threads=1, device_id=None)
    def graph():
        images, metas = fn.readers.webdataset(
            paths=[str(path) for path in tars(either_set, 32)],
            index_paths=[str(path.with_suffix(".idx")) for path in tars(either_set, 32)],
            ext=[suffix(either_set), "json"],
        )
        return images, metas, fn.decoders.image(images, output_type=types.GRAY)

    pipe = graph()
    pipe.build()
    read = []
    for _ in range(3):
        images, metas, decoded = pipe.run()
        for i in range(50):
            read += [bytes(np.asarray(images.at(i))), bytes(np.asarray(metas.at(i)))]
            pixels = decode_member(read[-2], read_set(either_set).codec)
            np.testing.assert_array_equal(np.asarray(decoded.at(i))[:, :, 0], pixels)
    assert read == [data for _, data in by_tarfile(either_set, 32)]


@settings(max_examples=30)
@given(MEMBERS, st.sampled_from(["jpeg", "raw"]))
def test_what_is_written_is_where_the_index_says_and_a_tar_given_up_leaves_nothing(tmp_path_factory, members, codec):
    folder = tmp_path_factory.mktemp("tar")
    (folder / "32").mkdir()
    given_up = TarWriter(folder, 32, 0, codec)
    given_up.add(0, b"an image", b"{}")
    given_up.discard()
    assert contents(folder) == {}
    writer = TarWriter(folder, 32, 7, codec)
    for row, (image, meta) in enumerate(members):
        writer.add(100 + row, image, meta)
    assert not shard_path(folder, 32, 7, "tar").exists()
    digest, size = writer.close()
    writer.discard()
    data = shard_path(folder, 32, 7, "tar").read_bytes()
    assert (digest, size) == (hashlib.sha256(data).hexdigest(), len(data))
    assert writer.crc32 == [zlib.crc32(image) for image, _ in members]
    index = read_index(folder, 32, 7)
    assert [(row, data[offset : offset + length]) for row, offset, length in index] == [
        (100 + row, image) for row, (image, _) in enumerate(members)
    ]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [tar.extractfile(m).read() for m in tar] == [part for member in members for part in member]
    assert sorted(contents(folder)) == ["32/000007.idx", "32/000007.tar"]


@pytest.mark.parametrize("damage", ["", "v1.1 64", "v1.2 63", "v1.2 64\njpg 512", f"v1.2 64\n{SAMPLE}"])
def test_an_index_missing_or_damaged_is_an_error_that_names_it(folder, damage):
    path = shard_path(folder, 32, 1, "idx")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(damage + "\n" + "".join(lines[len(damage.splitlines()) :]) if damage else "")
    with pytest.raises(ShardError, match=r"000001.idx is damaged"):
        read_index(folder, 32, 1)
    with pytest.raises(ShardError, match=r"000009.idx is missing: run the same `cxrfast shard`"):
        read_index(folder, 32, 9)
