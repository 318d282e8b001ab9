"""tools.crops.duplicates finds copies and no other photographs, as a plain search does."""

from __future__ import annotations

import hashlib

import cv2
import numpy as np
import pytest

from dataset_photographs import blurred, brightened, crops, photographs, recompressed, resized
from tools.crops.duplicates import (
    HASH_BYTES,
    MAX_DISTANCE,
    NearDuplicates,
    has_structure,
    perceptual_hash,
)


def _trimmed(pixels: np.ndarray, part: float) -> np.ndarray:
    rows, columns = (max(1, int(side * part / 2)) for side in pixels.shape[:2])
    return np.ascontiguousarray(pixels[rows:-rows, columns:-columns])


def _next_frame(pixels: np.ndarray) -> np.ndarray:
    """The camera moved by three pixels, and the noise differs."""
    noise = np.random.default_rng(5).normal(0, 2, pixels.shape)
    return np.clip(np.roll(pixels, 3, axis=1) + noise, 0, 255).astype(np.uint8)


COPIES = {
    "JPEG 60": lambda pixels: recompressed(pixels, 60),
    "half": lambda pixels: resized(pixels, 0.5),
    "0.7": lambda pixels: resized(pixels, 0.7),
    "twice": lambda pixels: resized(pixels, 2),
    "brighter": lambda pixels: brightened(pixels, 8),
    "darker": lambda pixels: brightened(pixels, -8),
    "trimmed": lambda pixels: _trimmed(pixels, 0.01),
    "blurred": lambda pixels: blurred(pixels, 1),
    "all": lambda pixels: recompressed(resized(_trimmed(brightened(pixels, 4), 0.01), 0.6), 70),
    "next frame": _next_frame,
}


def _flipped(hash: bytes, count: int, rng: np.random.Generator) -> bytes:
    bits = np.unpackbits(np.frombuffer(hash, np.uint8))
    bits[rng.choice(len(bits), count, replace=False)] ^= 1
    return np.packbits(bits).tobytes()


@pytest.mark.parametrize("change", COPIES.values(), ids=COPIES.keys())
def test_copies_are_found(change):
    table = NearDuplicates()
    for name, pixels in photographs().items():
        assert table.add(name, perceptual_hash(pixels)) is None
    for name, pixels in photographs().items():
        assert table.find(perceptual_hash(change(pixels))) == name


def test_different_photographs_and_crops_are_not_copies():
    hashes = [
        perceptual_hash(crop)
        for pixels in photographs().values()
        for crop in (pixels, *crops(pixels, 160))
        if cv2.Laplacian(crop, cv2.CV_16S).std() > 10
    ]
    assert len(hashes) > 25
    numbers = [int.from_bytes(hash, "big") for hash in hashes]
    assert (
        min((a ^ b).bit_count() for place, a in enumerate(numbers) for b in numbers[:place])
        > MAX_DISTANCE + 20
    )
    table = NearDuplicates()
    assert [table.add(number, hash) for number, hash in enumerate(hashes)] == [None] * len(hashes)


def test_luma_and_rgb_have_one_hash_of_32_bytes():
    pixels = photographs()["coffee.png"]
    hash = perceptual_hash(pixels)
    assert len(hash) == HASH_BYTES
    assert hash == perceptual_hash(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))


PINNED = "f608af452df2e41d96484250e96b37bc0212dbc3b2ea9053d4d7946d4f5d062e"


def test_the_hash_is_the_same_on_every_machine():
    y, x = np.mgrid[:100, :140]
    pattern = ((x * x // 9 + 7 * y + (x * y) // 13) % 256).astype(np.uint8)
    assert hashlib.sha256(perceptual_hash(pattern)).hexdigest() == PINNED


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((64, 64, 3), np.uint8),
        np.full((300, 200, 3), 200, np.uint8),
        np.arange(256, dtype=np.uint8)[:, None, None].repeat(256, 1).repeat(3, 2),
        (np.arange(256, dtype=np.uint8)[None, :, None] // 16 % 2 * 255).repeat(256, 0).repeat(3, 2),
    ],
    ids=["black", "gray", "ramp", "stripes"],
)
def test_pictures_without_structure_are_nobodys_copies(pixels):
    hash = perceptual_hash(np.ascontiguousarray(pixels))
    assert not has_structure(hash)
    table = NearDuplicates()
    assert table.add("first", hash) is None
    assert table.add("second", hash) is None
    assert len(table) == 0


def test_the_nearest_and_the_earliest_of_the_nearest_is_named():
    rng = np.random.default_rng(0)
    hash = rng.bytes(HASH_BYTES)
    table = NearDuplicates(max_distance=12)
    near, nearer = _flipped(hash, 12, rng), _flipped(hash, 3, rng)
    assert table.add("near", near) is None
    table._remember("nearer", nearer)  # as if both had been accepted: `add` keeps one of a cluster
    table._remember("as near", nearer)
    assert table.find(hash) == "nearer"
    assert table.add("copy", hash) == "nearer"
    assert len(table) == 3
    assert NearDuplicates(0).find(hash) is None


def test_a_large_table_agrees_with_a_plain_search():
    rng = np.random.default_rng(7)
    hashes = [rng.bytes(HASH_BYTES) for _ in range(40000)]
    table = NearDuplicates()
    for number, hash in enumerate(hashes):
        assert table.add(number, hash) is None
    assert len(table) == len(hashes)
    for number in (0, 1, 1023, 1024, 16383, 16384, 20000, 39000, 39999):
        for count in (0, 1, 8, 15):  # certain up to 15, usual up to MAX_DISTANCE
            assert table.find(_flipped(hashes[number], count, rng)) == number
        assert table.find(_flipped(hashes[number], MAX_DISTANCE + 1, rng)) is None
    assert all(table.find(rng.bytes(HASH_BYTES)) is None for _ in range(500))


def test_the_same_calls_give_the_same_answers():
    rng = np.random.default_rng(3)
    originals = [rng.bytes(HASH_BYTES) for _ in range(3000)]
    stream = [
        _flipped(originals[rng.integers(3000)], int(rng.integers(0, 30)), rng) for _ in range(6000)
    ]
    tables = NearDuplicates(), NearDuplicates()
    answers = [[table.add(number, hash) for number, hash in enumerate(stream)] for table in tables]
    assert answers[0] == answers[1]
    assert 1000 < sum(answer is not None for answer in answers[0]) < 5000


def test_a_distance_that_would_match_everything_is_refused():
    with pytest.raises(ValueError, match="256 bits"):
        NearDuplicates(128)
