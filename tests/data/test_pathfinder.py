import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from transfer_jax.data.pathfinder import (
    STYLES,
    geometry,
    pathfinder,
    pathfinder_files,
    rasterise,
)

SMALL = dataclasses.replace(STYLES[32], contour_length=7, num_distractors=3)


def trace(shown, style):
    """Groups dashes into curves by nothing but distances of their ends; returns group numbers."""
    dashes = np.concatenate([shown.curves.reshape(-1, 2, 2), shown.distractors.reshape(-1, 2, 2)])
    dashes = dashes[np.random.default_rng(0).permutation(len(dashes))]
    ends = dashes.reshape(-1, 2)
    group = np.repeat(np.arange(len(dashes)), 2)
    distance = np.sqrt(((ends[:, None] - ends) ** 2).sum(-1))
    for i, j in np.argwhere(distance < (style.gap + style.clearance) / 2):
        group[group == group[i]] = group[j]
    return ends, group


@pytest.mark.parametrize("style", [STYLES[32], STYLES[128], SMALL], ids=["32", "128", "small"])
@pytest.mark.parametrize("label", [0, 1])
def test_label_is_what_tracing_finds(style, label):
    for seed in range(4):
        shown = geometry(np.random.default_rng(seed), label, style)
        ends, group = trace(shown, style)
        sizes = sorted(np.unique(group, return_counts=True)[1] // 2)
        assert (
            sizes == [style.distractor_length] * style.num_distractors + [style.contour_length] * 2
        )
        nearest = [np.argmin(((ends - m) ** 2).sum(-1)) for m in shown.markers]
        np.testing.assert_allclose(ends[nearest], shown.markers)
        assert (group[nearest[0]] == group[nearest[1]]) == bool(label)
        assert ((ends >= 0) & (ends <= style.size - 1)).all()


def test_classes_differ_in_one_marker_only():
    for seed in range(3):
        one = geometry(np.random.default_rng(seed), 1, SMALL)
        zero = geometry(np.random.default_rng(seed), 0, SMALL)
        np.testing.assert_array_equal(one.curves, zero.curves)
        np.testing.assert_array_equal(one.distractors, zero.distractors)
        assert (one.markers[0] == zero.markers[0]).all()
        assert (one.markers[1] != zero.markers[1]).any()


def test_raster_is_bright_on_dashes_and_dark_elsewhere():
    style = dataclasses.replace(SMALL, thickness=1.6)
    shown = geometry(np.random.default_rng(1), 1, style)
    image = rasterise(shown, style)
    dashes = np.concatenate([shown.curves.reshape(-1, 2, 2), shown.distractors.reshape(-1, 2, 2)])
    along = np.linspace(0, 1, 50)[:, None, None]
    line = (dashes[:, 0] + along * (dashes[:, 1] - dashes[:, 0])).reshape(-1, 2)
    pixels = np.stack(np.mgrid[:32, :32], -1)
    to_line = np.sqrt(((pixels[:, :, None] - line) ** 2).sum(-1)).min(-1)
    to_dot = np.sqrt(((pixels[:, :, None] - shown.markers) ** 2).sum(-1)).min(-1)
    coverage = np.maximum(np.clip(1.3 - to_line, 0, 1), np.clip(2.0 - to_dot, 0, 1))
    np.testing.assert_allclose(image / 255.0, coverage, atol=0.01)


@pytest.fixture(scope="module")
def bundle():
    return pathfinder(style=SMALL, num_train=400, num_validation=2, num_test=2, seed=3)


def test_examples(bundle):
    train = bundle.splits["train"]
    example = train[5]
    assert example["inputs"].shape == (1024, 1) and example["inputs"].dtype == np.float32
    assert example["inputs"].min() == -1.0 and example["inputs"].max() == 1.0
    again = pathfinder(style=SMALL, num_train=6, seed=3, cache=False, sequence=False)
    np.testing.assert_array_equal(
        again.splits["train"][5]["inputs"].ravel(), example["inputs"].ravel()
    )
    assert (bundle.splits["test"][1]["inputs"] != train[1]["inputs"]).any()
    with pytest.raises(ValueError, match=r"one of \[32, 128\]"):
        pathfinder(size=64)


def test_brightness_tells_nothing_about_the_balanced_label(bundle):
    batch = bundle.splits["train"].take(np.arange(400))
    labels = batch["labels"]
    assert labels.sum() == 200
    pixels = batch["inputs"][..., 0]
    histogram = np.stack([np.histogram(p, 8, (-1, 1))[0] for p in pixels]) / 100
    features = np.concatenate([pixels.mean(1, keepdims=True) * 10, histogram], 1)
    model = LogisticRegression().fit(features[:200], labels[:200])
    # Chance is 0.5 with a standard deviation of 0.035 on 200 held-out images.
    assert abs(model.score(features[200:], labels[200:]) - 0.5) < 0.14


def test_reads_the_published_folder(tmp_path):
    from PIL import Image

    root = tmp_path / "pathfinder32" / "curv_contour_length_14"
    (root / "imgs" / "0").mkdir(parents=True)
    (root / "metadata").mkdir()
    lines = []
    for i in range(21):
        name = f"sample_{i}.png"
        pixels = np.full((4, 4), i, np.uint8)
        Image.fromarray(pixels).save(root / "imgs" / "0" / name)
        lines.append(f"imgs/0 {name} {i} {i % 2} 1.0 14 4 2 0.5 1 1")
    (root / "imgs" / "0" / "sample_20.png").write_bytes(b"")  # skipped
    (root / "metadata" / "0.npy").write_text("\n".join(lines) + "\n")
    splits = pathfinder_files(tmp_path / "pathfinder32").splits
    assert [len(s) for s in splits.values()] == [16, 2, 2]
    seen = set()
    for source in splits.values():
        for i in range(len(source)):
            example = source[i]
            value = round(float((example["inputs"][3, 0] + 1) * 127.5))
            assert example["labels"] == value % 2
            seen.add(value)
    assert seen == set(range(20))
    with pytest.raises(FileNotFoundError, match="lra_release"):
        pathfinder_files(tmp_path / "pathfinder64")
