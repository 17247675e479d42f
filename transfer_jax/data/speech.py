"""Raw speech as sequences of samples: spoken digits and Speech Commands."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from transfer_jax.data.bundle import DataBundle, DatasetInfo
from transfer_jax.data.paths import require, require_file
from transfer_jax.data.sources import ArraySource, Example, Source
from transfer_jax.data.splits import Mapped, Subset, stratified_split

SC10 = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")


def every_nth_sample(rate: int) -> Callable[[Example], Example]:
    """Returns a transform that keeps the samples 0, rate, 2 rate ... of ``inputs`` [..., L, D].

    It takes examples and batches. ``lengths``, where there is one, becomes the number of valid
    samples kept. There is no low-pass filter: this is the sampling-rate test of S4.
    """

    def transform(example: Example) -> Example:
        result = {**example, "inputs": example["inputs"][..., ::rate, :]}
        if "lengths" in example:
            result["lengths"] = (-(-example["lengths"] // rate)).astype(np.int32)
        return result

    return transform


def _at_rate(source: Source, rate: int) -> Source:
    return source if rate == 1 else Mapped(source, every_nth_sample(rate), batched=True)


def fsdd(
    *,
    average: int = 4,
    length: int | None = None,
    rate: int = 1,
    validation_indices: Sequence[int] = (5, 6),
) -> DataBundle:
    """Returns the Free Spoken Digit Dataset: ten digits by six speakers, 8 kHz.

    Read from ``fsdd/fsdd_8khz_idx0-24.npz`` in the directory TRANSFER_JAX_DATA (1,500 recordings).
    Each recording is averaged in groups of ``average`` samples (an incomplete last group is left
    out), divided by its largest absolute value, and cut or padded with zeros to ``length``.

    Args:
      average: samples to a group; 4 gives 2 kHz, 1 the raw 8 kHz.
      length: samples after averaging; by default 4096 / ``average`` (0.5 s).
      rate: keep every ``rate``-th sample of those (see ``every_nth_sample``).
      validation_indices: recording indices of the training part (5..24) that become "validation".
        Recordings 0..4 of each digit and speaker are the official "test".

    Returns:
      Examples with ``inputs`` [ceil(length / rate), 1] float32 in [-1, 1], ``labels`` int32 0..9,
      and ``lengths`` int32. "validation" only where ``validation_indices`` are given.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: a validation index that is no training index.
    """
    wrong = sorted(set(validation_indices) - set(range(5, 25)))
    if wrong:
        raise ValueError(f"validation_indices must lie in 5..24, the training part; got {wrong}")
    size = length or 4096 // average
    with np.load(require("fsdd", "fsdd_8khz_idx0-24.npz")) as file:
        samples, offsets = file["samples"], file["offsets"]
        digit, index = file["digit"], file["index"]
    inputs = np.zeros((len(digit), size, 1), np.float32)
    lengths = np.zeros(len(digit), np.int32)
    for r in range(len(digit)):
        wave = samples[offsets[r] : offsets[r + 1]].astype(np.float32) / 32768
        wave = wave[: len(wave) // average * average].reshape(-1, average).mean(1)
        wave = wave / max(np.abs(wave).max(), 1e-9)
        lengths[r] = min(len(wave), size)
        inputs[r, : lengths[r], 0] = wave[:size]
    source = ArraySource({"inputs": inputs, "labels": digit.astype(np.int32), "lengths": lengths})
    validation = np.isin(index, list(validation_indices))
    parts = {"train": (index >= 5) & ~validation, "validation": validation, "test": index < 5}
    splits = {
        name: _at_rate(Subset(source, np.flatnonzero(part)), rate)
        for name, part in parts.items()
        if part.any()
    }
    info = DatasetInfo(
        num_classes=10,
        length=-(-size // rate),
        features=1,
        sample_rate=8000 / average / rate,
    )
    return DataBundle(splits, info)


def speech_commands(
    directory: str | os.PathLike[str],
    *,
    classes: Sequence[str] = SC10,
    rate: int = 1,
    seed: int = 0,
) -> DataBundle:
    """Returns Speech Commands as raw 16 kHz audio, by default the ten words of SC10.

    Recordings shorter than a second are continued with their last value. Values are scaled to
    [-1, 1) and then standardised by the mean and standard deviation of all training samples. The
    recordings stay in memory (2 bytes per sample; 1.2 GB for SC10).

    Args:
      directory: the unpacked archive, with one folder of ``*.wav`` files per word.
      classes: words; the label of a word is its position.
      rate: keep every ``rate``-th sample (see ``every_nth_sample``).
      seed: of the split 70/15/15 % into "train", "validation" and "test", word by word.

    Returns:
      Examples with ``inputs`` [16000 / rate, 1] float32 and ``labels`` int32.

    Raises:
      FileNotFoundError: a folder is missing or empty.
      ValueError: a file that is not mono 16-bit at 16 kHz, or is longer than a second.
    """
    from scipy.io import wavfile

    how = (
        "Download speech_commands_v0.02.tar.gz from download.tensorflow.org/data, unpack it, and "
        "give its folder as directory."
    )
    samples = 16_000
    waves, labels = [], []
    for label, word in enumerate(classes):
        paths = sorted(require_file(Path(directory).expanduser() / word, how).glob("*.wav"))
        if not paths:
            raise FileNotFoundError(f"{Path(directory) / word} has no *.wav files. {how}")
        for path in paths:
            frequency, wave = wavfile.read(path)
            if frequency != samples or wave.dtype != np.int16 or wave.ndim != 1:
                raise ValueError(
                    f"{path} has {frequency} Hz, {wave.dtype}, shape {wave.shape}; expected mono "
                    "16-bit at 16000 Hz"
                )
            if not 0 < len(wave) <= samples:
                raise ValueError(f"{path} has {len(wave)} samples; expected 1..{samples}")
            waves.append(np.pad(wave, (0, samples - len(wave)), mode="edge"))
            labels.append(label)
    source = ArraySource(
        {"inputs": np.stack(waves)[..., None], "labels": np.array(labels, np.int32)}
    )
    parts = stratified_split(source, {"train": 0.7, "validation": 0.15, "test": 0.15}, seed=seed)

    total, square, count = 0, 0, 0
    train = parts["train"]
    for i in range(len(train)):
        wave = train[i]["inputs"].astype(np.int64)
        total, square, count = total + wave.sum(), square + (wave**2).sum(), count + wave.size
    mean = total / count / 2**15
    deviation = np.sqrt(square / count / 2**30 - mean**2)

    def standardise(example: Example) -> Example:
        inputs = example["inputs"].astype(np.float32) / 2**15
        return {**example, "inputs": (inputs - np.float32(mean)) / np.float32(deviation + 1e-5)}

    splits = {
        name: _at_rate(Mapped(part, standardise, batched=True), rate)
        for name, part in parts.items()
    }
    info = DatasetInfo(
        num_classes=len(classes),
        length=-(-samples // rate),
        features=1,
        sample_rate=samples / rate,
    )
    return DataBundle(splits, info)
