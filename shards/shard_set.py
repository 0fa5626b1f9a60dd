"""A shard set on disk: its contents and paths. All other code reads sets through it; it writes nothing."""

import csv
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.files import read_file
from cxrfast.shards.format.checksums import read_sums
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.manifest import ShardManifest, built, read_manifest, scales_in
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.parts import LabelledRows, Selection, make_part, resolve_split

log = logging.getLogger(__name__)


class ShardSet:
    """A set that `build` wrote or is writing; `info` describes it, as its set.json does.

        shards = ShardSet("data/shards")
        shards.info.labels, shards.scales, shards.rows()

    Raises ShardError if `folder` is not a shard set, or one of another schema version.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.info = read_set(self.folder)

    @property
    def scales(self) -> list[int]:
        """Scales (px) with at least one shard, ascending."""
        return scales_in(self.folder)

    @property
    def is_whole(self) -> bool:
        """Is the set finished, with every shard at each of its scales?"""
        if not all(len(self.shards(scale)) == self.info.shards for scale in self.scales):
            return False
        try:
            return bool(read_sums(self.folder))
        except ShardError:
            return False

    def rows(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """rows.parquet, one line per image in the order of `row`; `columns`: those to read, `row` among them; default: all.

        Raises ShardError if it is missing or damaged, or if its labels were replaced since the set was opened.
        """
        return read_rows(self.folder / "rows.parquet", self.info, columns)

    def part(
        self,
        name: str,
        *,
        fold: int = 0,
        scale: int | None = None,
        split: str = "auto",
        policy: str | Mapping[str, str] = "u_zeros",
        blank: str | Mapping[str, str] = "negative",
        unlabelled: str = "drop",
        views: Sequence[str] = (),
        allow_shared_patients: bool = False,
    ) -> LabelledRows:
        """The rows that `cxrfast train` uses as `name` (train, val or test) with the same options, and their labels.

            train = shards.part("train", fold=0, scale=256)
            order = TrainOrder(rows=train.rows, global_batch=32, micro_batch=32)
            labels = torch.from_numpy(train.labels)  # labels[batch.row]: (32, L)

        `scale`: leaves out rows that are not built at this scale; default: at any of the set's scales.
        `split`: folds, official, or auto: official if the set was built with a split of its own.
        `policy`: what uncertain labels become: u_zeros, u_ones or u_ignore. `blank`: what blank ones become: negative or
        ignore. Each is one for all labels, or a mapping from label to policy. `unlabelled`: rows without any label: drop or
        negative. `views`: view positions, such as PA; default: all.

        Raises RunError if the part is empty, for options that do not exist in this set, and if two parts hold the same
        patient, unless `allow_shared_patients`. Raises ShardError if the scale is not built, or files are damaged.
        """
        selection = Selection(
            labels=self.info.labels,
            split=resolve_split(self.info, split, fold),
            fold=fold,
            unlabelled=unlabelled,
            views=(views,) if isinstance(views, str) else tuple(views),
            allow_shared_patients=allow_shared_patients,
        )
        scales = self.scales if scale is None else [scale]
        held = reduce(np.intersect1d, [self.held(one) for one in scales]) if scales else np.array([], np.int64)
        for one in scales:
            if (done := len(self.shards(one))) < self.info.shards:
                log.warning(
                    f"{self.folder}: {done:,} of {self.info.shards:,} shards are built at {one} px; the rows of the others are "
                    "left out"
                )
        return make_part(name, self.rows(), held, selection, policy, blank)

    def held(self, scale: int) -> np.ndarray:
        """int64, ascending: rows that are built at this scale, without those in quarantine. Raises ShardError if there are
        no shards at this scale, or a manifest is damaged."""
        manifests = [self.manifest(scale, shard) for shard in self.shards(scale)]
        if not manifests:
            there = ", ".join(map(str, self.scales)) or "none"
            raise ShardError(
                f"{self.folder} holds no shards at {scale} px (scales there: {there}): "
                f"build them with `cxrfast shard --scale {scale}`"
            )
        return np.array([row for manifest in manifests if manifest for row in manifest.rows], np.int64)

    def quarantined(self) -> np.ndarray:
        """int64, ascending: rows in quarantine.csv, which a build writes at its end. Raises ShardError if it is missing or
        damaged."""
        path = self.folder / "quarantine.csv"
        try:
            lines = csv.DictReader(io.StringIO(read_file(path).decode(), newline=""))
            return np.unique(np.array([int(line["row"]) for line in lines], np.int64))
        except (OSError, ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
            raise ShardError(f"{path} is missing or damaged ({error}): run `cxrfast verify --repair`") from error

    def shards(self, scale: int) -> list[int]:
        """Numbers of the shards that are built at this scale, ascending."""
        return built(self.folder, scale)

    def manifest(self, scale: int, shard: int) -> ShardManifest | None:
        """A shard's manifest, None if the shard is not built. Raises ShardError if it is damaged."""
        return read_manifest(self.folder, scale, shard, self.info.rows_of(shard))

    def manifests(self) -> Iterator[ShardManifest]:
        """Manifests of all built shards, by scale and number. Raises ShardError for a damaged one."""
        for scale in self.scales:
            for shard in self.shards(scale):
                if m := self.manifest(scale, shard):
                    yield m

    def path(self, scale: int, shard: int, suffix: str = "tar") -> Path:
        """Path of a shard's tar, index (`idx`) or manifest (`json`)."""
        return shard_path(self.folder, scale, shard, suffix)
