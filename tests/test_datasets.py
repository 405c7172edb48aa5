"""Data sets read as published, and refused when damaged (the damaged ones are in test_bad_input)."""

import gzip
import struct

import numpy as np

from jaxdp import datasets


def idx_bytes(array: np.ndarray) -> bytes:
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_digits_come_with_scikit_learn():
    digits = datasets.load_digits()
    assert digits.train_images.shape == (1437, 8, 8)
    assert digits.test_images.shape == (360, 8, 8)
    assert digits.train_images.max() == digits.max_pixel == 16
    assert sorted(set(digits.train_labels)) == list(range(10))
    assert digits.fingerprint() == datasets.load_digits().fingerprint()


def test_mnist_reads_idx_files_gzipped_or_not(tmp_path):
    rng = np.random.default_rng(0)
    for stem, size in (("train", 5), ("t10k", 3)):
        images = rng.integers(0, 256, (size, 28, 28)).astype(np.uint8)
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(size, dtype=np.uint8)))
    mnist = datasets.load_mnist(tmp_path)
    np.testing.assert_array_equal(mnist.test_images, images)
    assert mnist.train_labels.tolist() == [0, 1, 2, 3, 4]


def test_real_mnist(jaxdp_data):
    mnist = datasets.load_mnist(jaxdp_data / "mnist")
    assert mnist.train_images.shape == (60_000, 28, 28)
    assert np.bincount(mnist.test_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
