import os

import numpy as np
import pytest
from scipy.io import wavfile

from transfer_jax.data.speech import every_nth_sample, fsdd, speech_commands

needs_data = pytest.mark.skipif(
    not os.environ.get("TRANSFER_JAX_DATA"), reason="TRANSFER_JAX_DATA is not set"
)


def write_fsdd(folder):
    """Three recordings whose preprocessing can be done by hand."""
    (folder / "fsdd").mkdir()
    waves = [
        np.array([4, 0, 0, 0, -8, -8, -8, -8, 99], np.int16),
        np.arange(40, dtype=np.int16),
        np.ones(8, np.int16),
    ]
    np.savez_compressed(
        folder / "fsdd" / "fsdd_8khz_idx0-24.npz",
        samples=np.concatenate(waves),
        offsets=np.cumsum([0] + [len(w) for w in waves]),
        digit=np.array([7, 1, 2], np.int8),
        index=np.array([5, 0, 9], np.int16),
    )


def test_fsdd_preprocessing(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSFER_JAX_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="fsdd"):
        fsdd()
    write_fsdd(tmp_path)
    bundle = fsdd(length=6)
    assert {name: len(s) for name, s in bundle.splits.items()} == {
        "train": 1, "validation": 1, "test": 1
    }  # fmt: skip
    example = bundle.splits["validation"][0]
    np.testing.assert_allclose(example["inputs"][:, 0], [0.125, -1, 0, 0, 0, 0])
    assert example["lengths"] == 2 and example["labels"] == 7
    long = bundle.splits["test"][0]
    np.testing.assert_allclose(long["inputs"][:, 0], (np.arange(6) * 4 + 1.5) / 37.5, rtol=1e-6)
    assert long["lengths"] == 6 and bundle.info.sample_rate == 2000
    everything = fsdd(length=6, validation_indices=())
    assert len(everything.splits["train"]) == 2 and "validation" not in everything.splits
    raw = fsdd(average=1, length=12).splits["validation"][0]
    np.testing.assert_allclose(raw["inputs"][:9, 0] * 99, [4, 0, 0, 0, -8, -8, -8, -8, 99])
    with pytest.raises(ValueError, match=r"5\.\.24.*\[3\]"):
        fsdd(validation_indices=(3, 6))


def test_every_second_sample(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSFER_JAX_DATA", str(tmp_path))
    write_fsdd(tmp_path)
    full, half = (fsdd(length=7, rate=rate) for rate in (1, 2))
    example = half.splits["validation"][0]
    np.testing.assert_array_equal(
        example["inputs"], full.splits["validation"][0]["inputs"][[0, 2, 4, 6]]
    )
    assert example["lengths"] == 1 and half.info.length == 4 and half.info.sample_rate == 1000
    batch = half.splits["test"].take(np.array([0, 0]))
    assert batch["inputs"].shape == (2, 4, 1)
    lengths = every_nth_sample(3)({"inputs": np.zeros((2, 9, 1)), "lengths": np.array([4, 9])})
    np.testing.assert_array_equal(lengths["lengths"], [2, 3])


@needs_data
def test_fsdd_as_distributed():
    bundle = fsdd()
    assert {name: len(s) for name, s in bundle.splits.items()} == {
        "train": 1080, "validation": 120, "test": 300
    }  # fmt: skip
    batch = bundle.splits["train"].take(np.arange(1080))
    assert batch["inputs"].shape == (1080, 1024, 1)
    np.testing.assert_array_equal(np.bincount(batch["labels"]), [108] * 10)
    assert (np.abs(batch["inputs"]).max((1, 2)) <= 1).all()
    beyond = np.arange(1024) >= batch["lengths"][:, None]
    assert (batch["inputs"][..., 0][beyond] == 0).all()


def test_speech_commands(tmp_path):
    rng = np.random.default_rng(0)
    for word in ("yes", "no"):
        (tmp_path / word).mkdir()
        for i in range(20):
            length = 16_000 if i else 9_000
            wave = rng.integers(-1000, 3000, length).astype(np.int16)
            wavfile.write(tmp_path / word / f"{i:02}.wav", 16_000, wave)
    bundle = speech_commands(tmp_path, classes=("yes", "no"))
    sizes = {name: len(s) for name, s in bundle.splits.items()}
    assert sizes == {"train": 28, "validation": 6, "test": 6}
    train = bundle.splits["train"].take(np.arange(28))
    np.testing.assert_allclose(train["inputs"].mean(), 0, atol=1e-3)
    np.testing.assert_allclose(train["inputs"].std(), 1, rtol=1e-3)
    whole = np.concatenate([s.take(np.arange(len(s)))["inputs"] for s in bundle.splits.values()])
    padded = whole[(np.diff(whole[:, 9_000:, 0], axis=1) == 0).all(1)]
    assert len(padded) == 2
    np.testing.assert_array_equal(padded[:, 8_999], padded[:, -1])
    halved = speech_commands(tmp_path, classes=("yes", "no"), rate=2).splits["test"][0]
    np.testing.assert_array_equal(halved["inputs"], bundle.splits["test"][0]["inputs"][::2])
    with pytest.raises(FileNotFoundError, match="speech_commands_v0"):
        speech_commands(tmp_path)
