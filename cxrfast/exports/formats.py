"""A network in other programs' formats: ONNX, TorchScript, and torchvision's state dict, each compared with the original.

In: a classifier. Out: the bytes of a file, and how far its logits are from the classifier's. No file holds a path or a line of
the program that wrote it, which exporters note for debugging.
"""

import io
import json
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn

from cxrfast.errors import DeviceError, RunError, is_out_of_memory
from cxrfast.models.classifier import Classifier
from cxrfast.phantoms.cohort import make_cohort
from cxrfast.phantoms.drawing import draw
from cxrfast.shards.images.resize import at_scales

FORMATS = ("onnx", "torchscript", "torchvision")

SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "torchvision": ".safetensors"}

IMAGE, LOGITS = "image", "logits"
"""Names of the input and the output in ONNX files."""

BATCHES = (1, 2, 5)
"""Images of each batch that is compared."""

BOUND = 1e-4
"""Largest difference of a logit from the original's, as a fraction of the largest logit, or of 1 if none is larger."""

LARGEST_ONNX = 2**31 - 2**24
"""Bytes of weights that an ONNX file can hold, with some room for the graph: protobuf ends at 2 GiB."""

RECORD = "cxrfast"
"""Key of what ONNX and TorchScript files say about themselves: JSON text."""

DEPRECATED = r"`torch\.jit\.\w+` is (deprecated|not supported)"
"""torch says so since 2.9 about all of TorchScript, which other programs still read."""

Run = Callable[[torch.Tensor], np.ndarray]
"""uint8 (N, 1, scale, scale) → logits float32 (N, L)"""


@dataclass(frozen=True)
class Difference:
    """How far the logits of an exported file are from the original's, on `check_films`."""

    largest: float
    """The largest difference of a logit."""
    logit: float
    """The largest logit of the original, as an absolute value."""

    @property
    def bound(self) -> float:
        return BOUND * max(1.0, self.logit)


@dataclass(frozen=True)
class Exported:
    """A file of another format."""

    data: bytes
    difference: Difference | None
    """None: it was not compared, because the library that would run it is not installed."""


def export_network(model: Classifier, scale: int, kind: str, record: Mapping[str, Any]) -> Exported:
    """The classifier as a file of `kind`, one of FORMATS, compared with the original on the CPU.

    `record`: what the file says about itself, as JSON values. Raises RunError if the network cannot be exported, or if a logit
    differs by more than `Difference.bound`; DeviceError if a library is missing.
    """
    check_libraries([kind])
    model = model.cpu().eval()
    if kind == "torchvision":
        return to_torchvision(model, scale)
    to_format = {"onnx": to_onnx, "torchscript": to_torchscript}[kind]
    try:
        with torch.inference_mode(False), torch.no_grad():
            data = to_format(model, scale, record)
    except Exception as error:  # exporters raise dozens of unrelated classes
        if isinstance(error, (RunError, DeviceError)) or is_out_of_memory(error):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RunError(
            f"torch cannot export {model.arch} to {kind} ({type(error).__name__}: {first}): leave out --format {kind}; the "
            "weights can be exported without it"
        ) from error
    run = {"onnx": onnx_runner, "torchscript": torchscript_runner}[kind](data)
    return Exported(data, run and compare(model, scale, run, f"{model.arch} as {kind}"))


def compare(model: Classifier, scale: int, run: Run, name: str) -> Difference:
    """How far `run` is from the classifier on `check_films`. Raises RunError if it is beyond the bound."""
    films, largest, logit = check_films(scale), 0.0, 0.0
    for number in BATCHES:
        images, films = films[:number], films[number:]
        with torch.no_grad():
            expected = model(images).numpy()
        found = run(images)
        if found.shape != expected.shape or found.dtype != np.float32 or not np.isfinite(found).all():
            raise RunError(
                f"{name} gives {found.dtype} {found.shape} for {number} images, expected were finite float32 "
                f"{expected.shape}: leave out this format"
            )
        largest = max(largest, float(np.abs(found - expected).max()))
        logit = max(logit, float(np.abs(expected).max()))
    difference = Difference(largest, logit)
    if largest > difference.bound:
        raise RunError(
            f"{name} differs from the original by {largest:.2g} in a logit, and at most {difference.bound:.2g} is allowed: leave "
            "out this format"
        )
    return difference


def check_films(scale: int) -> torch.Tensor:
    """uint8 (8, 1, scale, scale): phantom radiographs and noise in turn, the same each time."""
    noise = np.random.default_rng(0).integers(0, 256, (4, scale, scale), np.uint8)
    side = min(max(scale, 128), 512)  # larger phantoms take seconds to draw
    phantoms = [at_scales(draw(image, 0), [scale])[scale] for image in make_cohort(4, side)]
    films = np.stack([film for pair in zip(phantoms, noise, strict=True) for film in pair])
    return torch.from_numpy(films[:, None])


def _traced(model: Classifier) -> nn.Sequential:
    """The classifier without its properties, which torch.jit.trace would call."""
    return nn.Sequential(model.normalise, model.net).eval()


def _example(scale: int) -> torch.Tensor:
    return torch.zeros((2, 1, scale, scale), dtype=torch.uint8)


# ONNX


def to_onnx(model: Classifier, scale: int, record: Mapping[str, Any]) -> bytes:
    """An ONNX model: `image` uint8 (N, 1, scale, scale) → `logits` float32 (N, L), any N. Its metadata hold `record`."""
    import onnx

    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > LARGEST_ONNX:
        raise RunError(
            f"{model.arch} has {size / 2**30:.1f} GiB of weights, and one ONNX file holds 2 at most: leave out --format onnx"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself; what it made is compared
        program = torch.onnx.export(
            _traced(model),
            (_example(scale),),
            dynamo=True,
            input_names=[IMAGE],
            output_names=[LOGITS],
            dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
            verbose=False,
        )
    assert program is not None  # as long as dynamo is true
    proto = program.model_proto
    _strip(proto)
    entry = proto.metadata_props.add()
    entry.key, entry.value = RECORD, json.dumps(record, ensure_ascii=False)
    onnx.checker.check_model(proto)
    return proto.SerializeToString(deterministic=True)


NOTES = ("doc_string", "metadata_props")
"""Fields of an ONNX file in which exporters note lines of the program and their files."""


def _strip(message: Any) -> None:
    """Remove the exporter's notes from an ONNX message and from all messages in it."""
    for field, value in message.ListFields():
        if field.name in NOTES:
            message.ClearField(field.name)
        elif field.type == field.TYPE_MESSAGE:
            for one in [value] if hasattr(value, "ListFields") else value:
                _strip(one)


def onnx_runner(data: bytes) -> Run | None:
    """Runs an ONNX file by onnxruntime on the CPU; None if that is not installed."""
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run([LOGITS], {IMAGE: images.numpy()})[0]


# TorchScript


def to_torchscript(model: Classifier, scale: int, record: Mapping[str, Any]) -> bytes:
    """A TorchScript archive of the traced network: uint8 (N, 1, scale, scale) → logits float32 (N, L), any N.

    It runs on the device that it is moved to. Its extra file `cxrfast` holds `record`.
    """
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", DEPRECATED)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # what it made is compared
        traced = torch.jit.trace(_traced(model), _example(scale), check_trace=False)
        torch.jit.save(traced, file, _extra_files={RECORD: json.dumps(record, ensure_ascii=False)})
    return _without_debug(file.getvalue())


def _without_debug(archive: bytes) -> bytes:
    """A TorchScript archive without the records that name lines of the program and their files. torch loads it alike."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                new.writestr(zipfile.ZipInfo(entry.filename), old.read(entry))
    return out.getvalue()


def torchscript_runner(data: bytes) -> Run:
    """Runs a TorchScript archive, of one's own, on the CPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", DEPRECATED)
        network = torch.jit.load(io.BytesIO(data), map_location="cpu")

    def run(images: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return network(images).numpy()

    return run


# torchvision


def to_torchvision(model: Classifier, scale: int) -> Exported:
    """Weights that torchvision's own network of this architecture loads, as safetensors. Its input must be normalised.

    Raises RunError for an architecture that is not torchvision's.
    """
    import torchvision
    from safetensors.torch import save

    if model.arch not in torchvision.models.list_models(module=torchvision.models):
        raise RunError(f"{model.arch} is not an architecture of torchvision: leave out --format torchvision")
    weights = {name: tensor.contiguous() for name, tensor in model.net.state_dict().items()}
    network = torchvision.models.get_model(model.arch, weights=None, num_classes=model.outputs).eval()
    network.load_state_dict(weights)  # strict

    def run(images: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return network(model.normalise(images)).numpy()

    return Exported(save(weights), compare(model, scale, run, f"torchvision's {model.arch}"))


def check_libraries(formats: Collection[str]) -> None:
    """Raises RunError for an unknown format, DeviceError if a library that one needs is not installed."""
    if unknown := sorted(set(formats) - set(FORMATS)):
        raise RunError(f"format {unknown[0]!r} is unknown: use {', '.join(FORMATS)}")
    if "onnx" in formats and (missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]):
        raise DeviceError(f"--format onnx needs {' and '.join(missing)}: pip install 'cxrfast[export]'")
