"""Files and seeds → damaged files: what transfers, disks and broken writers do to a JPEG, PNG or DICOM file.

As a program it decodes them: `python mutator.py FILES LAST` reads a pickled list of files and prints the outcome of each seed.
"""

import pickle
import resource
import signal
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

PNG = b"\x89PNG\r\n\x1a\n"
DEADLINE = 30
"""Seconds for one image; a busy machine may take a hundred times as long as a free one."""


def damaged(files: list[bytes], seed: int) -> bytes:
    """One of the files after one to three accidents; the same files and seed give the same bytes."""
    rng = np.random.default_rng([20_190_121, seed])
    data = files[rng.integers(len(files))]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        data = accident(data, rng)
    return data


def accident(data: bytes, rng: np.random.Generator) -> bytes:
    """Lose, double or change some bytes, or damage something that only this format has."""
    if len(data) < 32:
        return data
    if rng.random() < 0.55:
        for start, of_its_own in ((b"\xff\xd8", of_a_jpeg), (PNG, of_a_png)):
            if data.startswith(start):
                return of_its_own(data, rng)
        if data[128:132] == b"DICM" or data[:2] == b"\2\0":
            return of_a_dicom(data, rng)
    image, at, length = bytearray(data), int(rng.integers(len(data))), int(rng.integers(1, 600))
    match rng.integers(8):
        case 0:
            for position in rng.integers(len(data), size=rng.integers(1, 20)):
                image[position] ^= 1 << int(rng.integers(8))
        case 1:
            image[at : at + length] = bytes([int(rng.choice([0, 255]))]) * len(image[at : at + length])
        case 2:
            image[at : at + length] = rng.bytes(len(image[at : at + length]))
        case 3:
            del image[at : at + length]
        case 4:
            image[at:at] = image[at : at + length]
        case 5:
            other = int(rng.integers(len(data)))
            image[at : at + length], image[other : other + length] = (
                image[other : other + length],
                image[at : at + length],
            )
        case 6:
            del image[at:]
        case _:
            image[int(rng.integers(2, min(700, len(data))))] = int(rng.integers(256))
    return bytes(image)


def jpeg_segments(data: bytes) -> list[bytes]:
    """SOI, each segment up to the first scan, then the rest in one."""
    parts, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        parts.append(data[at:end])
        at = end
    return [*parts, data[at:]]


def of_a_jpeg(data: bytes, rng: np.random.Generator) -> bytes:
    parts = jpeg_segments(data)
    frames = [n for n, part in enumerate(parts) if part[:1] == b"\xff" and part[1:2] in (b"\xc0", b"\xc1", b"\xc2")]
    image, at = bytearray(data), int(rng.integers(2, len(data)))
    match rng.integers(6):
        case 0 if frames:  # another size, process, precision or sampling
            frame = bytearray(parts[frames[0]])
            where = int(rng.choice([1, 4, 5, 6, 7, 8, 9, 11])) % len(frame)
            frame[where] = int(rng.choice([0, 1, 2, 4, 8, 12, 0x11, 0x22, 0xC2, 0xC3, 0xC9, 255, rng.integers(256)]))
            parts[frames[0]] = bytes(frame)
        case 1:  # a segment twice
            n = int(rng.integers(1, len(parts)))
            parts.insert(int(rng.integers(1, len(parts))), parts[n])
        case 2:  # two segments change places
            n, m = rng.integers(1, len(parts), 2)
            parts[n], parts[m] = parts[m], parts[n]
        case 3:  # a segment is lost
            del parts[int(rng.integers(len(parts)))]
        case 4:  # a marker where none was
            marker = bytes((0xFF, int(rng.choice([*range(0xC0, 0xE0), 0xE1, 0xEE, 0xFE, 0x01, 0xFF]))))
            image[at : at + int(rng.integers(0, 3))] = marker + rng.bytes(int(rng.integers(0, 20)))
            return bytes(image)
        case _:  # a segment whose length is wrong
            n = int(rng.integers(1, len(parts)))
            parts[n] = parts[n][:2] + rng.bytes(2) + parts[n][4:]
    return b"".join(parts)


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A file with right checksums, whatever the chunks hold."""
    return PNG + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def of_a_png(data: bytes, rng: np.random.Generator) -> bytes:
    """A writer's mistake: the checksums are right."""
    chunks = png_chunks(data)
    if not chunks:
        return data
    n = int(rng.integers(len(chunks)))
    kind, content = chunks[n]
    match rng.integers(6):
        case 0 if chunks[0][1]:  # another size, depth, colour or interlacing
            header = bytearray(chunks[0][1])
            header[int(rng.integers(len(header)))] = int(rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 255]))
            chunks[0] = chunks[0][0], bytes(header)
        case 1:
            chunks[n] = kind, content[: int(rng.integers(len(content) + 1))]
        case 2:
            spoilt = bytearray(content or b"\0")
            for position in rng.integers(len(spoilt), size=rng.integers(1, 9)):
                spoilt[position] = int(rng.integers(256))
            chunks[n] = kind, bytes(spoilt)
        case 3:
            chunks.insert(int(rng.integers(len(chunks))), chunks[n])
        case 4:
            del chunks[n]
        case _:  # other pixels, fewer, more, or with filters that do not exist
            try:
                raw = bytearray(zlib.decompress(b"".join(content for kind, content in chunks if kind == b"IDAT")))
            except zlib.error:
                return data
            raw[int(rng.integers(len(raw) or 1)) :: int(rng.integers(1, 5000))] = b""
            raw += rng.bytes(int(rng.integers(0, 3000)))
            others = [chunk for chunk in chunks if chunk[0] != b"IDAT"]
            chunks = [*others[:-1], (b"IDAT", zlib.compress(bytes(raw), 1)), *others[-1:]]
    return png(chunks)


def of_a_dicom(data: bytes, rng: np.random.Generator) -> bytes:
    image = bytearray(data)
    pixels = data.rfind(b"\xe0\x7f\x10\x00")
    match rng.integers(3):
        case 0:  # in the header
            at = int(rng.integers(132, max(133, pixels)))
            image[at : at + int(rng.integers(0, 9))] = rng.bytes(int(rng.integers(0, 9)))
        case 1:  # in a number of the image's own group
            at = data.find(b"\x28\0", 132 + int(rng.integers(0, max(1, pixels - 132)))) + int(rng.integers(2, 12))
            image[at : at + 1] = rng.bytes(1)
        case _:  # at the start of the pixels, where a compressed frame has its header
            at = pixels + int(rng.integers(4, 150))
            image[at : at + int(rng.integers(1, 4))] = rng.bytes(int(rng.integers(1, 4)))
    return bytes(image)


def main(files: str, last: str) -> None:
    """Print each seed and what became of it, at the end the peak of resident memory in MiB. SIGALRM kills a decoder that hangs."""
    from cxrfast.shards.images.bad_image import BadImage
    from cxrfast.shards.images.decode import decode

    held = pickle.loads(Path(files).read_bytes())
    for seed in range(int(last)):
        data = damaged(held, seed)
        print("seed", seed, flush=True)
        signal.alarm(DEADLINE)
        try:
            image = decode(data, ("window", "mimic")[seed % 2])
        except BadImage as error:
            print("refused", error.reason.value, flush=True)
            continue
        assert image.ndim == 2
        assert image.dtype == np.uint8
        print("decoded", flush=True)
    print("peak", peak(), flush=True)


def peak() -> int:
    """Peak memory of this process, MiB. Not `ru_maxrss` where avoidable: it starts at the parent's peak."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) // 2**10 for line in status.open() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main(*sys.argv[1:])
