"""Pathfinder: are the two dots ends of one dashed curve? Pixel sequences, two classes.

After Linsley et al. 2018 and the Long Range Arena (Tay et al. 2021), whose settings for contours of
14 dashes the defaults follow, 32 x 32 (Pathfinder) and 128 x 128 (Path-X). Every image shows two
long dashed curves that start near each other, shorter distractors, and two dots: one at the start
of the first curve, the other at the end of the same curve (label 1) or of the other (label 0). The
classes differ in nothing else, so that brightness and counts tell nothing. The drawing is our own,
not the published one: use ``pathfinder_files`` for numbers to be compared with the Arena's.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from transfer_jax.data.bundle import DataBundle, DatasetInfo
from transfer_jax.data.paths import require_file
from transfer_jax.data.sources import CachedSource, Example, GeneratedSource, Source
from transfer_jax.data.splits import Mapped, split

_CANDIDATES = 12  # directions tried for a dash
_BACKTRACK = 6  # most dashes taken back at a dead end
_STEPS_PER_DASH = 5  # dashes tried per dash needed, before the image is begun anew
_STARTS_PER_DISTRACTOR = 30
_TRIES = 2_000  # images begun before giving up


@dataclasses.dataclass(frozen=True)
class PathfinderStyle:
    """How images are drawn; lengths in pixels.

    Attributes:
      size: height and width.
      contour_length: dashes in each of the two curves.
      distractor_length: dashes in a distractor.
      num_distractors: see above.
      dash_length: see above.
      gap: between the ends of consecutive dashes of a curve.
      clearance: least distance between the centre lines of any other two dashes; above ``gap``.
      thickness: of a dash.
      marker_radius: of a dot.
      start_distance: between the starts of the two curves.
      max_turn: largest change of direction from dash to dash, radians.
    """

    size: int = 32
    contour_length: int = 14
    distractor_length: int = 4
    num_distractors: int = 5
    dash_length: float = 2.0
    gap: float = 1.2
    clearance: float = 2.0
    thickness: float = 0.6
    marker_radius: float = 1.5
    start_distance: float = 7.0
    max_turn: float = 0.9


STYLES = {
    32: PathfinderStyle(),
    128: PathfinderStyle(
        size=128,
        num_distractors=8,
        dash_length=5.0,
        gap=2.5,
        clearance=5.0,
        thickness=1.5,
        marker_radius=3.0,
        start_distance=20.0,
    ),
}


class Geometry(NamedTuple):
    """What an image shows; points are (row, column), dashes run from [..., 0, :] to [..., 1, :].

    Attributes:
      curves: [2, contour_length, 2, 2] the two long curves.
      distractors: [K, distractor_length, 2, 2] the short ones.
      markers: [2, 2] centres of the dots.
    """

    curves: np.ndarray
    distractors: np.ndarray
    markers: np.ndarray


class _Canvas:
    """The dashes drawn so far: curves 0 and 1, then the distractors.

    Attributes:
      dashes: for each curve the list of its dashes, [2, 2] each.
      angles: for each curve the directions of its dashes.
      points: [curves, contour_length, S, 2] points along the dashes; infinite where none is drawn.
      dots: [2, 2, 2] starts and ends of curves 0 and 1, which are left room for dots; infinite
        until drawn.
    """

    def __init__(self, style: PathfinderStyle):
        self.style = style
        count = 2 + style.num_distractors
        self.dashes: list[list[np.ndarray]] = [[] for _ in range(count)]
        self.angles: list[list[float]] = [[] for _ in range(count)]
        self.along = np.linspace(0.0, 1.0, int(np.ceil(style.dash_length / 2)) + 1)[:, None]
        self.points = np.full((count, style.contour_length, len(self.along), 2), np.inf)
        self.dots = np.full((2, 2, 2), np.inf)

    def place(self, curve: int, starts: np.ndarray, angles: np.ndarray) -> bool:
        """Draws the next dash of ``curve`` from the first of the candidates that is free.

        Free is a dash that lies inside and keeps its distance from all but the dash before.

        Args:
          curve: its number.
          starts: [T, 2] where candidates start.
          angles: [T] their directions.

        Returns:
          Whether there was one.
        """
        style, number = self.style, len(self.dashes[curve])
        ends = _towards(starts, angles, style.dash_length)
        samples = starts[:, None] + self.along * (ends - starts)[:, None]  # [T, S, 2]
        border = style.thickness / 2 + 0.5
        free = (np.abs(samples - (style.size - 1) / 2) < (style.size - 1) / 2 - border).all((1, 2))
        points, dots = self.points.copy(), self.dots.copy()
        if number:
            points[curve, number - 1] = np.inf
        if curve < 2 and number < 2:
            dots[0, curve] = np.inf  # its own
        free &= _apart(samples, points, style.clearance)
        free &= _apart(samples, dots, style.marker_radius + style.clearance)
        if not free.any():
            return False
        chosen = int(free.argmax())
        self.points[curve, number] = samples[chosen]
        self.dashes[curve].append(np.stack([starts[chosen], ends[chosen]]))
        self.angles[curve].append(float(angles[chosen]))
        return True

    def extend(self, rng: np.random.Generator, curve: int) -> bool:
        """Continues a curve by a dash in about its direction; returns whether that was possible."""
        style = self.style
        turns = rng.uniform(-style.max_turn, style.max_turn, _CANDIDATES)
        angle = self.angles[curve][-1]
        # Half of the turn is taken before the gap, so that curves are smooth.
        starts = _towards(self.dashes[curve][-1][1], angle + turns / 2, style.gap)
        return self.place(curve, starts, angle + turns)

    def shorten(self, curve: int, length: int) -> None:
        """Takes back the dashes of a curve from number ``length`` on."""
        self.points[curve, length:] = np.inf
        del self.dashes[curve][length:], self.angles[curve][length:]


def _towards(start: np.ndarray, angle: np.ndarray, length: float) -> np.ndarray:
    return start + length * np.stack([np.sin(angle), np.cos(angle)], -1)


def _apart(samples: np.ndarray, others: np.ndarray, distance: float) -> np.ndarray:
    """Whether all of samples [T, S, 2] are ``distance`` away from all of others [..., 2]: [T]."""
    others = others.reshape(-1, 2)
    low, high = samples.min((0, 1)) - distance, samples.max((0, 1)) + distance
    others = others[((others > low) & (others < high)).all(-1)]
    if len(others) == 0:
        return np.ones(len(samples), bool)
    square = ((samples[:, :, None] - others) ** 2).sum(-1)
    return square.min((1, 2)) >= distance**2


def _draw_curves(rng: np.random.Generator, canvas: _Canvas) -> bool:
    """Grows curves 0 and 1 in turn, leaving room for dots; returns whether they came to an end."""
    style = canvas.style
    first = rng.uniform(0, style.size, 2)
    second = _towards(first, rng.uniform(0, 2 * np.pi, ()), style.start_distance)
    for curve, start in enumerate((first, second)):
        starts = np.tile(start, (_CANDIDATES, 1))
        if not canvas.place(curve, starts, rng.uniform(0, 2 * np.pi, _CANDIDATES)):
            return False
        canvas.dots[0, curve] = start
    for _ in range(_STEPS_PER_DASH * 2 * style.contour_length):
        curve = int(len(canvas.dashes[0]) > len(canvas.dashes[1]))
        length = len(canvas.dashes[curve])
        if length == style.contour_length:
            return True
        grown = canvas.extend(rng, curve)
        if grown and length + 1 == style.contour_length:
            end = canvas.dashes[curve][-1][1]
            others = np.concatenate([canvas.points[[0, 1]].reshape(-1, 2), canvas.dots[1]])
            own = np.zeros(canvas.points[[0, 1]].shape[:3], bool)
            own[curve, -2:] = True
            others[: own.size][own.ravel()] = np.inf
            room = style.marker_radius + style.clearance
            grown = bool(_apart(end[None, None], others, room)[0])
            canvas.dots[1, curve] = end if grown else np.inf
        if not grown:
            canvas.dots[1, curve] = np.inf
            canvas.shorten(curve, max(1, length - int(rng.integers(1, _BACKTRACK + 1))))
    return False


def _draw_distractors(rng: np.random.Generator, canvas: _Canvas) -> bool:
    """Grows the distractors around the curves; returns whether all found room."""
    style = canvas.style
    curve = 2
    for _ in range(_STARTS_PER_DISTRACTOR * style.num_distractors):
        if curve == len(canvas.dashes):
            break
        starts = rng.uniform(0, style.size, (_CANDIDATES, 2))
        if not canvas.place(curve, starts, rng.uniform(0, 2 * np.pi, _CANDIDATES)):
            continue
        while len(canvas.dashes[curve]) < style.distractor_length and canvas.extend(rng, curve):
            pass
        if len(canvas.dashes[curve]) == style.distractor_length:
            curve += 1
        else:
            canvas.shorten(curve, 0)
    return curve == len(canvas.dashes)


def geometry(rng: np.random.Generator, label: int, style: PathfinderStyle) -> Geometry:
    """Draws what an image shows.

    Args:
      rng: where the draws come from.
      label: 1 if the dots are to mark the two ends of one curve, else 0.
      style: see ``PathfinderStyle``.

    Raises:
      RuntimeError: ``style`` is so crowded that no image comes about.
    """
    for _ in range(_TRIES):
        canvas = _Canvas(style)
        if _draw_curves(rng, canvas) and _draw_distractors(rng, canvas):
            curves = np.array(canvas.dashes[:2])
            distractors = np.array(canvas.dashes[2:]).reshape(-1, style.distractor_length, 2, 2)
            end = curves[0 if label else 1, -1, 1]
            return Geometry(curves, distractors, np.stack([curves[0, 0, 0], end]))
    raise RuntimeError(f"no room for the curves in {_TRIES} tries; make {style} less crowded")


def rasterise(shown: Geometry, style: PathfinderStyle) -> np.ndarray:
    """Draws a geometry as an anti-aliased image [size, size] uint8."""
    image = np.zeros((style.size, style.size))
    dashes = np.concatenate([shown.curves.reshape(-1, 2, 2), shown.distractors.reshape(-1, 2, 2)])
    dots = np.stack([shown.markers, shown.markers], axis=1)
    for segments, radius in ((dashes, style.thickness / 2), (dots, style.marker_radius)):
        # Each segment colours a square patch around its centre only.
        reach = int(np.ceil(style.dash_length / 2 + radius + 1))
        offsets = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1).T
        pixels = np.rint(segments.mean(1)).astype(int)[:, None] + offsets
        start, along = segments[:, None, 0], (segments[:, 1] - segments[:, 0])[:, None]
        length = (along**2).sum(-1)
        position = ((pixels - start) * along).sum(-1) / np.where(length == 0, 1, length)
        nearest = start + np.clip(position, 0, 1)[..., None] * along
        distance = np.sqrt(((pixels - nearest) ** 2).sum(-1))
        coverage = np.clip(radius + 0.5 - distance, 0, 1)
        inside = ((pixels >= 0) & (pixels < style.size)).all(-1)
        rows, columns = pixels[inside].T
        np.maximum.at(image, (rows, columns), coverage[inside])
    return np.rint(255 * image).astype(np.uint8)


def _normalise(example: Example) -> Example:
    inputs = example["inputs"].astype(np.float32) / np.float32(127.5) - np.float32(1)
    return {**example, "inputs": inputs}


def _bundle(splits: Mapping[str, Source], size: int, sequence: bool) -> DataBundle:
    info = DatasetInfo(num_classes=2, length=size * size if sequence else None, features=1)
    return DataBundle(
        {name: Mapped(source, _normalise, batched=True) for name, source in splits.items()}, info
    )


def pathfinder(
    *,
    size: int = 32,
    num_train: int = 160_000,
    num_validation: int = 20_000,
    num_test: int = 20_000,
    sequence: bool = True,
    seed: int = 0,
    cache: bool = True,
    style: PathfinderStyle | None = None,
) -> DataBundle:
    """Returns generated Pathfinder; example i of a split is a pure function of (seed, split, i).

    Args:
      size: 32 (Pathfinder) or 128 (Path-X), where no ``style`` is given.
      num_train: examples in "train"; likewise "validation" and "test". Labels alternate.
      num_validation: see above.
      num_test: see above.
      sequence: ``inputs`` as pixel sequences [size * size, 1] in raster order, else images.
      seed: of everything.
      cache: keep images in memory once drawn (1 byte per pixel).
      style: how to draw, instead of ``STYLES[size]``.

    Returns:
      Examples with ``inputs`` float32, (x - 0.5) / 0.5 of pixels x in [0, 1], and ``labels`` int32,
      1 = the dots are ends of one curve.

    Raises:
      ValueError: no style for ``size``.
    """
    if style is None:
        if size not in STYLES:
            raise ValueError(f"size must be one of {sorted(STYLES)}, or give a style; got {size}")
        style = STYLES[size]
    chosen = style
    shape = (style.size**2, 1) if sequence else (style.size, style.size, 1)

    def make(rng: np.random.Generator, index: int) -> Example:
        label = index % 2
        image = rasterise(geometry(rng, label, chosen), chosen)
        return {"inputs": image.reshape(shape), "labels": np.int32(label)}

    sizes = {"train": num_train, "validation": num_validation, "test": num_test}
    splits: dict[str, Source] = {}
    for i, (name, count) in enumerate(sizes.items()):
        source = GeneratedSource(make, count, (seed, i))
        splits[name] = CachedSource(source) if cache else source
    return _bundle(splits, style.size, sequence)


def pathfinder_files(
    directory: str | os.PathLike[str],
    *,
    difficulty: str = "curv_contour_length_14",
    sequence: bool = True,
    seed: int = 42,
) -> DataBundle:
    """Returns the published Pathfinder of the Long Range Arena, split 80/10/10 by ``seed``.

    Args:
      directory: a folder ``pathfinder32`` or ``pathfinder128`` of ``lra_release.gz``.
      difficulty: its sub-folder, with ``metadata/*.npy`` (text files) and ``imgs``.
      sequence: as in ``pathfinder``.
      seed: of the split.

    Returns:
      As ``pathfinder``. Empty image files (there is one in the release) are skipped.

    Raises:
      FileNotFoundError: the folder or its metadata are missing.
    """
    how = (
        "Download lra_release.gz from the releases of github.com/google-research/long-range-arena, "
        "unpack it, and give the folder pathfinder32 or pathfinder128 as directory."
    )
    root = Path(directory).expanduser() / difficulty
    metadata = require_file(root / "metadata", how)
    files = sorted(metadata.glob("*.npy"), key=lambda path: int(path.stem))
    if not files:
        raise FileNotFoundError(f"{metadata} has no *.npy files. {how}")
    rows = []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            words = line.split()
            image = root / words[0] / words[1]
            if require_file(image, how).stat().st_size:
                rows.append((image, int(words[3])))

    def make(row: tuple[Path, int]) -> Example:
        import PIL.Image

        with PIL.Image.open(row[0]) as file:
            pixels = np.asarray(file.convert("L"))
        shape = (-1, 1) if sequence else (*pixels.shape, 1)
        return {"inputs": pixels.reshape(shape), "labels": np.int32(row[1])}

    images = Mapped(rows, make)
    size = round(images[0]["inputs"].size ** 0.5)
    parts = split(images, {"train": 0.8, "validation": 0.1, "test": 0.1}, seed=seed)
    return _bundle(parts, size, sequence)
