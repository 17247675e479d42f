"""A tiny data set is prepared offline and read back, in a process of its own so that what other
tests have imported does not matter."""

import os
import subprocess
import sys

import numpy as np
import pytest

from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.tfds import tfds_source

PREPARE = """
import io, sys
import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

def png(i):
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.full((4, 4), 10 * i, np.uint8)).save(buffer, "PNG")
    buffer.seek(0)
    return buffer

class TinyImages(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(4, 4, 1)),
            "label": tfds.features.ClassLabel(num_classes=3),
        }))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(7), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": png(i), "label": i % 3}

builder = TinyImages(data_dir=sys.argv[1], file_format=sys.argv[2])
builder.download_and_prepare()
"""

READ = """
import sys
from transfer_jax.data.tfds import tfds_source

source = tfds_source("tiny_images", "train", sys.argv[1])
print(len(source), sum(int(source[i]["label"]) for i in range(7)))
assert "tensorflow_datasets" in sys.modules
assert "tensorflow" not in sys.modules
"""


def python(code, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    python(PREPARE, directory, "array_record")
    return directory


def test_reads_without_tensorflow(prepared):
    assert python(READ, prepared).split() == ["7", "6"]


def test_source_in_a_pipeline(prepared):
    source = tfds_source("tiny_images", "train[:5]", prepared)
    assert len(source) == 5

    def transform(example):
        return {"inputs": example["image"] / np.float32(255), "labels": np.int32(example["label"])}

    pipeline = Pipeline(
        tfds_source("tiny_images", "train", prepared), 7, transforms=(transform,), repeat=True
    )
    batch = pipeline.example_batch()
    assert batch["inputs"].shape == (7, 4, 4, 1) and batch["inputs"].dtype == np.float32
    values = np.sort(batch["inputs"][:, 0, 0, 0] * 255)
    np.testing.assert_allclose(values, 10 * np.arange(7), rtol=1e-6)
    raw = Pipeline(tfds_source("tiny_images", "test", prepared), 3).example_batch()
    assert raw["image"].shape == (3, 4, 4, 1)


def test_errors(prepared, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        tfds_source("mnist", "train", tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "tfds.builder('mnist'" in str(error.value) and "array_record" in str(error.value)
    with pytest.raises(ValueError, match="it has t"):
        tfds_source("tiny_images", "validation", prepared)
