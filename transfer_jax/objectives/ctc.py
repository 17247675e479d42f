"""Connectionist temporal classification: labels of a sequence whose alignment is not known.

A path names one of K symbols at each of T steps, the blank among them. A labelling is what remains
of a path when repeated symbols are merged and blanks dropped; its probability is the sum over all
paths that it remains of (Graves et al. 2006).
"""

import collections
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from transfer_jax.objectives.base import Array, Aux, Batch, Mean, Variables
from transfer_jax.objectives.tasks import ModuleObjective, example_mask


def feasible(targets: Array, target_lengths: Array, lengths: Array) -> Array:
    """Whether a labelling fits into a sequence: a repeated label needs a blank in between.

    Args:
      targets: int [B, U].
      target_lengths: int [B].
      lengths: int [B], steps.

    Returns:
      bool [B].
    """
    inside = jnp.arange(1, targets.shape[1]) < target_lengths[:, None]
    repeats = ((targets[:, 1:] == targets[:, :-1]) & inside).sum(axis=1)
    return target_lengths + repeats <= lengths


class CTC(ModuleObjective):
    """The mean over sequences of ``-log p(targets | inputs)``.

    ``batch["inputs"]`` [B, T, ...] and ``batch["targets"]`` int [B, U], none of them the blank, are
    padded; ``lengths`` and ``target_lengths`` ([B]) say how far, and default to all. The module
    gives logits [B, T, K].

    Sequences too short for their targets have no probability: they do not count, and ``infeasible``
    says how many there are.

    Metrics: ``nll`` per sequence, ``infeasible`` (share of the sequences).

    Attributes:
      blank: number of the blank among the K symbols.
    """

    blank: int = flax.struct.field(pytree_node=False, default=0)

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        if "targets" not in batch:
            raise ValueError(f"CTC reads batch['targets']; the batch has {sorted(batch)}.")
        logits, state = self.apply(variables, batch, rng)
        targets = batch["targets"]
        size, steps = logits.shape[:2]
        lengths = batch.get("lengths", jnp.full(size, steps))
        target_lengths = batch.get("target_lengths", jnp.full(size, targets.shape[1]))
        fits = feasible(targets, target_lengths, lengths)
        # Without any label every sequence has a finite loss, and a gradient that is then not used.
        target_lengths = jnp.where(fits, target_lengths, 0)
        nll = optax.ctc_loss(
            logits.astype(jnp.float32),
            (jnp.arange(steps) >= lengths[:, None]).astype(jnp.float32),
            targets,
            (jnp.arange(targets.shape[1]) >= target_lengths[:, None]).astype(jnp.float32),
            blank_id=self.blank,
        )
        mask = example_mask(batch, size)
        mean = Mean.of(nll, mask * fits)
        metrics = {"nll": mean, "infeasible": Mean.of(~fits, mask)}
        return mean.value(), Aux(state, metrics, mean.weight, logits)


def best_path(
    logits: Array | np.ndarray, lengths: Array | np.ndarray | None = None, *, blank: int = 0
) -> list[list[int]]:
    """The labelling of the likeliest path: not always the likeliest labelling.

    Args:
      logits: [B, T, K].
      lengths: int [B], valid steps; None = all.
      blank: number of the blank.

    Returns:
      B lists of labels.
    """
    paths = np.asarray(jnp.argmax(jnp.asarray(logits), axis=-1))
    steps = _steps(paths, lengths)
    return [collapse(path[:valid], blank=blank) for path, valid in zip(paths, steps)]


def _steps(values: np.ndarray, lengths: Array | np.ndarray | None) -> np.ndarray:
    """``lengths``, or those of ``values`` [B, T, ...] where there are none."""
    return np.full(len(values), values.shape[1]) if lengths is None else np.asarray(lengths)


def collapse(path: Sequence[int] | np.ndarray, *, blank: int = 0) -> list[int]:
    """The labelling of a path: repeated symbols merged, blanks dropped."""
    path = np.asarray(path)
    new = np.ones(len(path), bool)
    new[1:] = path[1:] != path[:-1]
    return path[new & (path != blank)].tolist()


def prefix_beam(
    logits: Array | np.ndarray,
    lengths: Array | np.ndarray | None = None,
    *,
    beams: int = 10,
    blank: int = 0,
) -> list[list[int]]:
    """The likeliest labellings found by prefix beam search (Graves 2012; Hannun et al. 2014).

    Probabilities of paths with the same labelling are added; with enough beams the result is the
    likeliest labelling. Runs on the host.

    Args:
      logits: [B, T, K].
      lengths: int [B], valid steps; None = all.
      beams: prefixes that are kept at each step.
      blank: number of the blank.

    Returns:
      B lists of labels.
    """
    if beams < 1:
        raise ValueError(f"beams={beams}: at least one prefix must be kept.")
    log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)), np.float64)
    steps = _steps(log_p, lengths)
    return [_search(row[:valid], beams, blank) for row, valid in zip(log_p, steps)]


def _search(log_p: np.ndarray, beams: int, blank: int) -> list[int]:
    """``prefix_beam`` of one sequence [T, K] of log-probabilities."""
    # Prefix -> log-probabilities of its paths that end in a blank and in its last label; the
    # likeliest prefix first.
    prefixes: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -np.inf)}
    for step in log_p:
        after: Any = collections.defaultdict(lambda: [-np.inf, -np.inf])
        for prefix, (in_blank, in_label) in prefixes.items():
            either = np.logaddexp(in_blank, in_label)
            same = after[prefix]
            same[0] = np.logaddexp(same[0], either + step[blank])
            if prefix:
                same[1] = np.logaddexp(same[1], in_label + step[prefix[-1]])
            for label in range(len(step)):
                if label == blank:
                    continue
                # A label that comes twice is new only after a blank.
                before = in_blank if prefix and label == prefix[-1] else either
                longer = after[(*prefix, label)]
                longer[1] = np.logaddexp(longer[1], before + step[label])
        best = sorted(after, key=lambda prefix: -np.logaddexp(after[prefix][0], after[prefix][1]))
        prefixes = {prefix: (after[prefix][0], after[prefix][1]) for prefix in best[:beams]}
    return list(next(iter(prefixes)))
