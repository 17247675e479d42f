import gzip
import os

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from transfer_jax.data import images
from transfer_jax.data.registry import DATASETS, load
from transfer_jax.data.sources import ArraySource

needs_data = pytest.mark.skipif(
    not os.environ.get("TRANSFER_JAX_DATA"), reason="TRANSFER_JAX_DATA is not set"
)
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)


def test_grey_is_that_of_pillow():
    expected = np.stack([np.asarray(Image.fromarray(p).convert("L")) for p in PIXELS])
    np.testing.assert_array_equal(images.grey(PIXELS)[..., 0], expected)


@pytest.fixture
def prepared(monkeypatch):
    """Stands for prepared data sets: the first 20 images of each split."""

    def source(name, split, data_dir):
        pixels = PIXELS if name == "cifar10" else PIXELS[:, :28, :28, :1]
        return ArraySource({"image": pixels, "label": np.arange(20) % 10, "id": np.arange(20)})

    monkeypatch.setattr(images, "tfds_source", source)


def test_cifar10(prepared):
    colour = images.cifar10(seed=3)
    assert [len(s) for s in colour.splits.values()] == [18, 2, 20]
    batch = colour.splits["test"].take(np.arange(20))
    expected = (PIXELS / 255 - [0.4914, 0.4822, 0.4465]) / [0.247, 0.243, 0.261]
    np.testing.assert_allclose(batch["inputs"], expected.reshape(20, 1024, 3), atol=1e-5)
    assert batch["inputs"].dtype == np.float32 and set(batch) == {"inputs", "labels"}
    np.testing.assert_array_equal(colour.splits["test"][4]["inputs"], batch["inputs"][4])
    greyscale = images.cifar10(greyscale=True, sequence=False).splits["test"][7]["inputs"]
    luma = images.grey(PIXELS[7]) / 255
    np.testing.assert_allclose(greyscale, (luma - 122.6 / 255) / (61 / 255), atol=1e-5)


def test_mnist_and_its_permutation(prepared):
    plain = images.mnist().splits["test"].take(np.arange(20))["inputs"]
    np.testing.assert_allclose(plain, PIXELS[:, :28, :28, :1].reshape(20, 784, 1) / 255, rtol=1e-6)
    permuted = images.mnist(permutation_seed=1).splits["test"].take(np.arange(20))["inputs"]
    assert (permuted != plain).any()
    order = np.random.default_rng(1).permutation(784)
    np.testing.assert_array_equal(permuted, plain[:, order])
    with pytest.raises(ValueError, match="sequence=True"):
        images.mnist(sequence=False, permutation_seed=1)


def test_absent_data_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="download_and_prepare"):
        images.cifar10(data_dir=tmp_path)
    monkeypatch.setenv("TRANSFER_JAX_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="mnist_t10k"):
        images.mnist_t10k()


def test_mnist_t10k(tmp_path, monkeypatch):
    folder = tmp_path / "mnist_t10k"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10_000, 28, 28)).astype(np.uint8)
    labels = (np.arange(10_000) % 10).astype(np.uint8)
    for name, data in (("images-idx3", pixels), ("labels-idx1", labels)):
        header = b"\x00\x00\x08" + bytes([data.ndim]) + np.array(data.shape, ">u4").tobytes()
        packed = gzip.compress(header + data.tobytes(), compresslevel=0)
        (folder / f"t10k-{name}-ubyte.gz").write_bytes(packed)
    monkeypatch.setenv("TRANSFER_JAX_DATA", str(tmp_path))
    bundle = images.mnist_t10k(seed=5)
    assert [len(s) for s in bundle.splits.values()] == [8000, 1000, 1000]
    seen = np.concatenate([s.source.indices for s in bundle.splits.values()])
    np.testing.assert_array_equal(np.sort(seen), np.arange(10_000))
    example = bundle.splits["test"][3]
    i = seen[9003]
    np.testing.assert_allclose(example["inputs"].reshape(28, 28) * 255, pixels[i], rtol=1e-5)
    assert example["labels"] == labels[i]


@needs_data
def test_mnist_t10k_as_distributed():
    bundle = load("mnist_t10k")
    labels = np.concatenate([s.take(np.arange(len(s)))["labels"] for s in bundle.splits.values()])
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    np.testing.assert_array_equal(np.bincount(labels), counts)


def test_optdigits_and_an_alphabet(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSFER_JAX_DATA", str(tmp_path))
    rng = np.random.default_rng(0)
    (tmp_path / "optdigits").mkdir()
    rows = {"tra": rng.integers(0, 17, (5, 65)), "tes": rng.integers(0, 17, (3, 65))}
    for part, table in rows.items():
        lines = ["Block 1,...,Class", *(",".join(map(str, row)) for row in table)]
        packed = gzip.compress("\r\n".join(lines).encode())
        (tmp_path / "optdigits" / f"optdigits.{part}.csv.gz").write_bytes(packed)
    plain, enlarged = load("optdigits").splits, load("optdigits", enlarged=True).splits
    assert [len(s) for s in plain.values()] == [5, 3]
    example = plain["test"][2]
    np.testing.assert_array_equal(example["inputs"].ravel() * 16, rows["tes"][2, :64])
    assert example["labels"] == rows["tes"][2, 64]
    np.testing.assert_array_equal(enlarged["test"][2]["inputs"][3:26:3, 3:26:3], example["inputs"])

    (tmp_path / "omniglot8").mkdir()
    drawings = np.zeros((80, 35, 35), np.uint8)  # two alphabets of two characters
    drawings[:, :5, :5] = np.arange(80)[:, None, None] % 10  # 5 pixels become 4
    char, drawer = np.arange(80) // 20, np.arange(80) % 20 + 1
    np.savez(
        tmp_path / "omniglot8" / "omniglot8_35.npz", x=drawings, char=char, drawer=drawer,
        alphabet=char // 2, alphabet_names=["Greek", "Latin"],
    )  # fmt: skip
    bundle = load("omniglot8", alphabet="Latin")
    assert [len(s) for s in bundle.splits.values()] == [30, 10] and bundle.info.num_classes == 2
    test = bundle.splits["test"].take(np.arange(10))
    np.testing.assert_array_equal(test["labels"], np.arange(10) // 5)
    ink = np.tile(np.arange(15, 20) % 10 / 9, 2)
    np.testing.assert_allclose(test["inputs"].sum(axis=(1, 2, 3)), 16 * ink, rtol=1e-6)
    np.testing.assert_allclose(test["inputs"][:, 3, 3, 0], ink, rtol=1e-6)
    assert list(load("omniglot8", alphabet="Latin", test_drawers=0).splits) == ["train"]
    with pytest.raises(ValueError, match="no alphabet 'Thai'"):
        load("omniglot8", alphabet="Thai")


@needs_data
def test_optdigits_as_distributed():
    ours = load("optdigits").splits
    bundled = load_digits()
    assert len(ours["train"]) == 3823
    test = ours["test"].take(np.arange(1797))
    np.testing.assert_array_equal(test["inputs"][..., 0] * 16, bundled.images)
    np.testing.assert_array_equal(test["labels"], bundled.target)
    assert load("omniglot8", alphabet="Greek").info.num_classes == 24


def test_registry():
    assert load("digits", sequence=True).info.length == 64
    with pytest.raises(ValueError, match=r"named 'listop'; nearest: listops"):
        load("listop")
    with pytest.raises(TypeError, match=r"'sequences'.*nearest: sequence"):
        load("digits", sequences=True)
    assert all(fn.__doc__ for fn in DATASETS.values())
