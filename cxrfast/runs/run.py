"""Reads and writes the files of a run. RunFolder knows where they are; `arrays` handles zarr.

torch is imported where weights are read or written: tables do without it, which halves their memory.
"""

import io
import json
import os
import shutil
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cxrfast import __version__
from cxrfast.config import TrainConfig
from cxrfast.errors import RunError
from cxrfast.files import open_file, read_file, replacing, write_bytes, write_json
from cxrfast.runs.arrays import open_arrays, read_array, update_arrays, write_arrays
from cxrfast.runs.folder import LARGEST_TEXT, RunFolder
from cxrfast.runs.lease import locked
from cxrfast.runs.lineage import Origin
from cxrfast.runs.records import ConfigFile, checked, read_line
from cxrfast.runs.thresholds import read_thresholds, write_thresholds
from cxrfast.shards.format.lock import Lease
from cxrfast.thresholds import Thresholds

if TYPE_CHECKING:
    import torch

    from cxrfast.models.classifier import Classifier
    from cxrfast.pipelines.reader import Reader


@dataclass(frozen=True)
class Predictions:
    """A run's logits for one part of its rows."""

    row: np.ndarray
    """int64 (n,), ascending, unique."""
    logits: np.ndarray
    """float32 (n, L)"""


@dataclass(frozen=True)
class Run(RunFolder):
    """A run on disk, opened."""

    config: TrainConfig
    shards: Path
    """Where its shard set was when it was started."""
    origin: Origin
    """Where its first weights came from."""
    stored_hash: str | None = field(default=None, repr=False, compare=False)
    division: str | None = None
    """Hash of its set's division into parts, see `shards.parts.division`; None: an earlier version did not record it."""
    lease: Lease | None = field(default=None, repr=False, compare=False)
    """This process's right to write into the folder, checked before each write; None: not asked for."""

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """The run in a folder like `runs/densenet121-256/fold-0`. Raises RunError if its config.json is missing or damaged."""
        folder = Path(folder)
        path = RunFolder(folder).config_path
        if not path.exists():
            raise RunError(f"{folder} is not a run (no config.json): give a folder like runs/densenet121-256/fold-0")
        try:
            value = checked(json.loads(read_file(path, LARGEST_TEXT)), ConfigFile)
            config = TrainConfig.from_json(value["config"])
            recorded = value.get("origin")
            origin = Origin.from_json(recorded) if recorded else Origin.of_path(config)
            started = replace(config, epochs=value.get("first_epochs", config.epochs)).hash
            if value.get("hash") not in (None, started):
                raise RunError("its configuration is not the one that it was started with: restore the file")
            return cls(folder, config, Path(value["shards"]), origin, started, value.get("division"))
        except (OSError, ValueError, RecursionError, RunError) as error:
            raise RunError(
                f"{path} is damaged ({error}): restore it, or move the folder of this run elsewhere"
            ) from error

    @classmethod
    def find(cls, runs: str | Path, damaged: Container[str] = ()) -> list["Run"]:
        """Every run below `runs`, by name, scale and fold. Raises RunError if there is none.

        damaged: names of those that are not opened.
        """
        folders = [one for one in RunFolder.below(Path(runs)) if one.is_started and one.name not in damaged]
        found = [cls.open(one.folder) for one in folders]
        if not found:
            raise RunError(RunFolder.none_below(Path(runs)))
        return sorted(
            found, key=lambda run: (run.config.arch, run.config.scale, run.folder.parent.name, run.config.fold)
        )

    @classmethod
    def start(
        cls,
        folder: Path,
        config: TrainConfig,
        shards: Path,
        rows: pd.DataFrame,
        origin: Origin | None = None,
        division: str | None = None,
    ) -> "Run":
        """Create the run, or continue the existing one if its configuration is the same, whatever its number of epochs.

        Otherwise raises RunError naming the differences, unless the run failed before it had trained anything: then it is
        replaced. One that starts over takes the `rows` of now, whose labels may be others. `origin`: of its first weights, if
        they were just loaded; default: what is recorded.
        """
        run = cls(folder, config, shards, origin or Origin.of_path(config), division=division)
        if run.is_started:
            earlier = cls.open(folder)
            differences = config.differences(earlier.config)
            if differences and not earlier.has_nothing_to_lose:
                raise RunError(
                    f"{folder} holds a run of another configuration ({'; '.join(differences)}): "
                    "choose another --runs or --name, or give the same options to resume it"
                )
            if not differences:
                if not earlier.starts_over:
                    return replace(earlier, config=config, shards=shards)
                run = replace(run, origin=origin or earlier.origin)
        import torch

        folder.mkdir(parents=True, exist_ok=True)
        with replacing(run.rows_path) as file:
            rows.to_parquet(file, index=False)
        write_json(
            run.config_path,
            {
                "config": asdict(config),
                "hash": config.hash,
                "shards": str(shards.absolute()),
                "origin": run.origin.json(),
                **({"division": division} if division else {}),
                "versions": {"cxrfast": __version__, "torch": torch.__version__},
            },
        )
        return run

    @property
    def hash(self) -> str:
        """Hash of the configuration that it was started with. Its files carry it, and others with another are refused."""
        return self.stored_hash or self.config.hash

    def keep_epochs(self) -> None:
        """Write the number of epochs of `config` into config.json, which keeps its hash and all else."""
        known = json.loads(read_file(self.config_path, LARGEST_TEXT))
        if known["config"]["epochs"] != self.config.epochs:
            self.check_lease()
            known.setdefault("first_epochs", known["config"]["epochs"])
            known["config"]["epochs"] = self.config.epochs
            write_json(self.config_path, known)

    def as_origin(self) -> Origin:
        """The run as the origin of weights."""
        config = self.config
        return Origin(
            kind="run",
            run=self.name,
            set_id=config.set_id,
            fold=config.fold,
            split=config.split,
            labels=config.labels,
            division=self.division,
            shared_patients=config.allow_shared_patients or None,
            config_hash=self.hash,
            start=self.origin,
        )

    def _record(self) -> str:
        """What its weights say about the run, wherever they are copied to."""
        return json.dumps(self.as_origin().json())

    # The right to write

    @contextmanager
    def lock(self, task: str) -> Iterator["Run"]:
        """The run, while no other process may write into it. `task`: what this one does, such as `predicting`.

        Raises RunError naming a live holder.
        """
        with locked(self, task) as lease:
            yield replace(self, lease=lease)

    def check_lease(self) -> None:
        """Raises RunError if this process had the right to write and lost it to another one, for example while suspended."""
        if self.lease:
            self.lease.check()

    # Rows

    def rows(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """row, image_id, patient_id, part (train, val or test), then the raw labels in the order of the logits.

        `columns`: those to read. Ids are most of the file.
        """
        if columns is None:
            columns = ["row", "image_id", "patient_id", "part", *self.config.labels]
        try:
            with open(open_file(self.rows_path), "rb") as file:
                rows = pd.read_parquet(file, columns=list(columns))
            kinds = {"row": "i", **dict.fromkeys(self.config.labels, "f")}
            if wrong := [name for name in columns if name in kinds and rows[name].dtype.kind != kinds[name]]:
                raise ValueError(f"{wrong[0]} holds no numbers")
            return rows
        except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's and, of damaged metadata, pandas's
            raise RunError(
                f"{self.rows_path} is missing or damaged: restore it, or train the run again in a new folder"
            ) from error

    def reader(self, shards: Path | None = None) -> "Reader":
        """A reader of the run's shard set at its scale; `shards`: where the set is now, if it has moved.

        Raises RunError if it is another set.
        """
        from cxrfast.pipelines.reader import Reader  # OpenCV, which tables need not load

        reader = Reader(shards or self.shards, self.config.scale)
        if reader.info.id != self.config.set_id:
            raise RunError(
                f"{self.name} was trained on set {self.config.set_id}, {reader.folder} is set {reader.info.id}: "
                "give the right folder with --shards"
            )
        return reader

    # State

    def state(self) -> dict[str, Any]:
        """{} if the run never started."""
        path = self.state_path
        try:
            return checked(json.loads(read_file(path, LARGEST_TEXT)), dict[str, Any]) if path.exists() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{path} is damaged: delete it, then run the training command again") from error

    def set_state(self, state: str, **more: Any) -> None:
        self.check_lease()
        write_json(self.state_path, {"state": state, "time": round(time.time()), "pid": os.getpid(), **more})

    @property
    def is_done(self) -> bool:
        return self.state().get("state") == "done"

    @property
    def starts_over(self) -> bool:
        """True if its training starts at the first epoch: it is not done, and there is no checkpoint to resume from."""
        return not self.has_checkpoint and not self.is_done

    @property
    def has_nothing_to_lose(self) -> bool:
        """True if it failed before anything was trained, so that another configuration may take its folder."""
        results = (self.checkpoint_path, self.weights_path, self.metrics_path)
        return self.state().get("state") == "failed" and not any(path.exists() for path in results)

    # Metrics

    def metrics(self) -> list[dict[str, Any]]:
        """One dict per epoch, oldest first, without a last line that a killed process left unfinished.

        Fields that an earlier version did not write are absent. Raises RunError naming the line and field that are wrong.
        """
        path = self.metrics_path
        try:
            lines = read_file(path, LARGEST_TEXT).decode().split("\n")[:-1] if path.exists() else []
            return [read_line(number, line) for number, line in enumerate(lines, 1)]
        except (OSError, ValueError) as error:
            raise RunError(
                f"{path} is damaged ({error}): restore it, or train the run again in a new folder"
            ) from error

    def add_metrics(self, line: dict[str, Any]) -> None:
        """Append an epoch's line, in place of lines of this or later epochs that a killed process left."""
        self.cut_metrics(line["epoch"], line)

    def cut_metrics(self, epochs: int, *more: dict[str, Any]) -> None:
        """Keep the lines of the first `epochs` epochs, those in the checkpoint, and add `more`."""
        self.check_lease()
        lines = [*(m for m in self.metrics() if m["epoch"] < epochs), *more]
        write_bytes(self.metrics_path, "".join(json.dumps(m) + "\n" for m in lines).encode())

    # Checkpoint and weights

    def write_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        import torch

        from cxrfast.models.weights_file import RECORD

        self.check_lease()
        data = io.BytesIO()  # writing to a full disk itself, torch raises a RuntimeError about a position
        torch.save({**checkpoint, "config_hash": self.hash, RECORD: self._record()}, data)
        with replacing(self.checkpoint_path) as file:
            file.write(data.getbuffer())

    def read_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint, on the CPU; None if there is none. Raises RunError if it is damaged or another run's."""
        path = self.checkpoint_path
        if not path.exists():
            return None
        import torch

        try:
            with open(open_file(path), "rb") as file:
                checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            owner = checkpoint["config_hash"]
        except Exception as error:  # torch raises half a dozen unrelated classes here
            raise RunError(
                f"{path} is damaged ({type(error).__name__}): delete it to restart the run, or restore it"
            ) from error
        if owner != self.hash:
            raise RunError(
                f"{path} belongs to another configuration: delete it to restart the run, or choose another --runs"
            )
        return checkpoint

    def write_weights(self, weights: "dict[str, torch.Tensor]") -> None:
        """Replace the best weights, and delete predictions, thresholds, maps and figures made with the old ones."""
        from safetensors.torch import save

        from cxrfast.models.weights_file import RECORD

        self.check_lease()
        for derived in (self.predictions_path, self.external_path, self.maps_path):
            shutil.rmtree(derived, ignore_errors=True)
        self.thresholds_path.unlink(missing_ok=True)
        for figure in self.gradcam_paths().values():
            figure.unlink()
        tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        write_bytes(self.weights_path, save(tensors, metadata={RECORD: self._record()}))

    def read_weights(self) -> "dict[str, torch.Tensor]":
        """The best weights, as a state dict. Raises RunError if they are missing, damaged or another run's."""
        from cxrfast.models.weights_file import read_weights_file

        path = self.weights_path
        if not path.exists():
            raise RunError(f"{self.folder} has no {path.name} yet: train it first")
        try:
            file = read_weights_file(path)
        except RunError as error:
            raise RunError(f"{error}; restore it, or train the run again") from error
        if file.config_hash not in (None, self.hash):
            raise RunError(f"{path} belongs to another configuration: restore it, or train the run again")
        return file.tensors

    def load(self, device: "torch.device | str" = "cpu") -> "Classifier":
        """The run's classifier with its best weights, in eval mode on the device.

        Raises RunError without weights, and for a network of one's own that is not `models.factories.trusted`.
        """
        from cxrfast.models.classifier import Classifier  # torchvision, which tables do without

        model = Classifier.of(self.config)
        try:
            model.load_state_dict(self.read_weights())
        except RuntimeError as error:
            raise RunError(f"the weights of {self.name} do not fit {self.config.arch}: train it again") from error
        return model.to(device).eval()

    # Predictions, thresholds and maps

    def write_predictions(self, parts: Mapping[str, Predictions]) -> None:
        """Write predictions.zarr with one group per part. Raises RunError if rows are repeated."""
        arrays = {}
        for part, p in parts.items():
            if len(np.unique(p.row)) != len(p.row):
                raise RunError(f"{self.name}: rows of {part} were predicted twice")
            order = np.argsort(p.row)
            arrays[f"{part}/row"] = p.row[order].astype(np.int64)
            arrays[f"{part}/logits"] = p.logits[order].astype(np.float32)
        owner = {"set_id": self.config.set_id, "config_hash": self.hash, "labels": list(self.config.labels)}
        self.check_lease()
        write_arrays(self.predictions_path, arrays, owner)

    def read_predictions(self, part: str) -> Predictions:
        """Logits of `part`. Raises RunError if they are missing or belong to another configuration."""
        path, again = self.predictions_path, f"predict again with `cxrfast predict {self.folder}`"
        if not self.has_predictions:
            raise RunError(f"{self.name} has no predictions: `cxrfast predict {self.folder}`")
        group = open_arrays(path)
        if group.attrs.get("config_hash") != self.hash or group.attrs.get("set_id") != self.config.set_id:
            raise RunError(f"{path} belongs to another run: {again}")
        if not (path / part).is_dir():
            raise RunError(f"{path} has no part {part!r}: {again}")
        return Predictions(read_array(group, f"{part}/row", again), read_array(group, f"{part}/logits", again))

    def write_thresholds(self, thresholds: Thresholds, rows: int) -> None:
        """Replace the thresholds. rows: number of validation rows, on which they were chosen."""
        write_thresholds(self, thresholds, rows)

    def read_thresholds(self) -> Thresholds | None:
        """Thresholds of the run's own logits; None if none were chosen yet. Raises RunError if they are damaged."""
        return read_thresholds(self)

    def open_maps(self) -> Any:
        """The zarr group of the run's maps, read-only; None if there are none yet. Raises RunError if it is damaged."""
        return open_arrays(self.maps_path) if self.maps_path.is_dir() else None

    def add_maps(self, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> None:
        """Write arrays and attributes into the maps, keeping others that are there."""
        self.check_lease()
        update_arrays(self.maps_path, arrays, attributes)


def part_rows(rows: pd.DataFrame, part: str) -> np.ndarray:
    """int64, ascending: the rows of a part of a run's table."""
    return rows.loc[rows["part"] == part, "row"].to_numpy(np.int64, copy=True)
