"""Banks of bottleneck adapters and what combines them: scales, attention, an average of weights.

An adapter is a dictionary ``{"down": {"kernel", "bias"}, "up": {"kernel", "bias"}}`` of arrays
[..., d, r], [..., r], [..., r, d] and [..., d]; its output ``e = relu(v D + b) U + c`` is without
any residual. A *bank* holds n of them, stacked on the axis before the last two (or, for biases,
the last) axes: [n, d, r] at one site, [L, n, d, r] over the L sites of a backbone. Only
``average_adapters`` and ``fold`` leave that form: they return one adapter.

In a network, ``Sources`` puts a bank where an adapter would be.

ScaLearn (Frohmann et al. 2024) learns one array of *scales* [1 or L, n, 1 or d], without softmax
and without any constraint; ``o = u + sum_s w_s * e_s``. AdapterFusion (Pfeiffer et al. 2021)
attends over the sources instead.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from transfer_jax.nn import petl
from transfer_jax.nn.petl import Dropout, Site

Array = jax.Array
PyTree = Any

# Which axes of the scales are shared: by the sites, by the d entries of an output.
VARIANTS: dict[str, tuple[bool, bool]] = {
    "scalearn": (False, False),
    "uniform": (False, True),
    "scalearn++": (True, False),
    "uniform++": (True, True),
}
NORMALISATIONS = ("none", "mean", "softmax")


# -- banks ------------------------------------------------------------------------------------


def init_adapter(
    key: Array, sites: int, features: int, width: int, *, stddev: float = 0.02
) -> PyTree:
    """Draws one adapter for every site: kernels N(0, stddev^2), biases 0.

    Args:
      key: a typed key.
      sites: L.
      features: d.
      width: r, of the bottleneck.

    Returns:
      float32 leaves [L, ...].
    """
    down, up = jax.random.split(key)
    return {
        "down": {
            "kernel": stddev * jax.random.normal(down, (sites, features, width)),
            "bias": jnp.zeros((sites, width)),
        },
        "up": {
            "kernel": stddev * jax.random.normal(up, (sites, width, features)),
            "bias": jnp.zeros((sites, features)),
        },
    }


def stack_adapters(adapters: Sequence[PyTree]) -> PyTree:
    """Makes a bank [L, n, ...] of n adapters [L, ...] of one width, in the order given.

    Raises:
      ValueError: no adapters, or shapes that differ.
    """
    shapes = [jax.tree.map(jnp.shape, adapter) for adapter in adapters]
    if not shapes or any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            "a bank holds at least one adapter, and all of one shape; got the down projections "
            f"{[shape['down']['kernel'] for shape in shapes]}."
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *adapters)


def at_site(tree: PyTree, site: Array | int) -> PyTree:
    """Returns what belongs to one site: leaves [...] of [L, ...]; ``site`` may be traced."""
    return jax.tree.map(lambda x: jnp.asarray(x)[site], tree)


def hidden(bank: PyTree, v: Array) -> Array:
    """Bottlenecks ``relu(v D_s + b_s)`` of all sources: [..., d] to [..., n, r], in one product."""
    kernel, bias = bank["down"]["kernel"], bank["down"]["bias"]
    return jax.nn.relu(jnp.einsum("...d,ndr->...nr", v, _like(kernel, v)) + _like(bias, v))


def source_outputs(bank: PyTree, v: Array) -> Array:
    """Outputs e_s of all sources.

    Args:
      bank: of one site, n adapters.
      v: [..., d].

    Returns:
      [..., n, d]: n times the activations. ``scaled_sum`` does without.
    """
    kernel, bias = bank["up"]["kernel"], bank["up"]["bias"]
    return jnp.einsum("...nr,nrd->...nd", hidden(bank, v), _like(kernel, v)) + _like(bias, v)


def _like(x: Array, v: Array) -> Array:
    return jnp.asarray(x).astype(v.dtype)


# -- ScaLearn ---------------------------------------------------------------------------------


def scale_shape(variant: str, sites: int, sources: int, features: int) -> tuple[int, int, int]:
    """Returns the shape [1 or L, n, 1 or d] of a variant's scales.

    Raises:
      ValueError: an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r}; choose one of {', '.join(VARIANTS)}.")
    shared, uniform = VARIANTS[variant]
    return 1 if shared else sites, sources, 1 if uniform else features


def init_scales(
    key: Array,
    variant: str,
    sites: int,
    sources: int,
    features: int,
    *,
    total: float = 2.0,
    stddev: float = 1e-3,
) -> Array:
    """Draws scales from ``N(total / n, stddev^2)``: they sum to ``total`` over the sources.

    Returns:
      float32 of ``scale_shape``.
    """
    shape = scale_shape(variant, sites, sources, features)
    return total / sources + stddev * jax.random.normal(key, shape)


def normalise_scales(scales: Array, normalisation: str = "none") -> Array:
    """The ablations: scales that sum to one over the sources.

    Args:
      scales: [.., n, 1 or d].
      normalisation: one of ``NORMALISATIONS``; "mean" divides by the sum, for every dimension.

    Raises:
      ValueError: an unknown normalisation.
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(
            f"normalisation={normalisation!r}; choose one of {', '.join(NORMALISATIONS)}."
        )
    if normalisation == "mean":
        return scales / scales.sum(axis=-2, keepdims=True)
    return jax.nn.softmax(scales, axis=-2) if normalisation == "softmax" else scales


def scaled_sum(bank: PyTree, scales: Array, v: Array) -> Array:
    """``sum_s w_s * e_s`` at one site, without the [..., n, d] outputs.

    The sum is linear in U, so the scales are multiplied into it (``fold``, done on the fly): one
    product over sources and bottlenecks. The gradient with respect to the scales is the same.

    Args:
      bank: of one site, n adapters.
      scales: [n, 1 or d].
      v: [..., d].

    Returns:
      [..., d].
    """
    kernel = bank["up"]["kernel"] * scales[:, None, :]
    bias = jnp.sum(bank["up"]["bias"] * scales, axis=0)
    return jnp.einsum("...nr,nrd->...d", hidden(bank, v), _like(kernel, v)) + _like(bias, v)


def fold(bank: PyTree, scales: Array) -> PyTree:
    """Writes scales into the adapters: one adapter of width n r with the same output.

    ``U_s <- U_s diag(w_s)``, ``c <- sum_s w_s * c_s``; bottlenecks stand side by side.

    Args:
      bank: [L, n, ...].
      scales: [1 or L, n, 1 or d].

    Returns:
      An adapter [L, d, n r], ....
    """
    down, up = bank["down"]["kernel"], bank["up"]["kernel"]
    sites, sources, features, width = down.shape
    return {
        "down": {
            "kernel": jnp.swapaxes(down, 1, 2).reshape(sites, features, sources * width),
            "bias": bank["down"]["bias"].reshape(sites, sources * width),
        },
        "up": {
            "kernel": (up * scales[:, :, None, :]).reshape(sites, sources * width, features),
            "bias": jnp.sum(bank["up"]["bias"] * scales, axis=1),
        },
    }


# -- AdapterFusion ----------------------------------------------------------------------------


def init_fusion(
    key: Array, sites: int, features: int, *, value: bool = True, stddev: float = 0.02
) -> PyTree:
    """Draws AdapterFusion's projections: query and key N(0, stddev^2), the value near identity.

    Args:
      key: a typed key.
      sites: L.
      features: d.
      value: with a value projection ("dynamic"); without ("static") there is none.

    Returns:
      ``{"query": {"kernel", "bias"}, "key": {...}, "value": {"kernel"}}``, kernels [L, d, d]:
      ``3 d^2 L + 2 d L`` numbers.
    """
    shape = (sites, features, features)
    fusion: dict[str, Any] = {
        name: {"kernel": stddev * jax.random.normal(k, shape), "bias": jnp.zeros((sites, features))}
        for name, k in zip(("query", "key"), jax.random.split(key))
    }
    if value:
        near = jnp.where(jnp.eye(features, dtype=bool), 1.0, 1e-6)
        fusion["value"] = {"kernel": jnp.broadcast_to(near, shape)}
    return fusion


def fused(bank: PyTree, fusion: PyTree, v: Array, dropout: Dropout = lambda x: x) -> Array:
    """``sum_s a_s e_s W_v`` with ``a = softmax_s(dropout((v W_q + b_q) . (e_s W_k + b_k)))``.

    Scores are not divided by sqrt(d). The [..., n, d] outputs are keys and values, so memory grows
    n-fold over ``scaled_sum``.

    Args:
      bank: of one site, n adapters.
      fusion: of one site, see ``init_fusion``; without "value" the outputs themselves are averaged.
      v: [..., d].
      dropout: applied to the scores.

    Returns:
      [..., d].
    """
    outputs = source_outputs(bank, v)
    weights = fusion_weights(outputs, fusion, v, dropout)
    if "value" in fusion:
        outputs = outputs @ _like(fusion["value"]["kernel"], v)
    return jnp.einsum("...n,...nd->...d", weights, outputs)


def fusion_weights(
    outputs: Array, fusion: PyTree, v: Array, dropout: Dropout = lambda x: x
) -> Array:
    """The weights a of ``fused``: [..., n] of outputs [..., n, d] and v [..., d]."""

    def project(name: str, x: Array) -> Array:
        return x @ _like(fusion[name]["kernel"], v) + _like(fusion[name]["bias"], v)

    scores = jnp.einsum("...d,...nd->...n", project("query", v), project("key", outputs))
    scores = dropout(scores)
    return jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(v.dtype)


def fusion_penalty(fusion: PyTree) -> Array:
    """``sum over sites ||I - W_v||_F^2``, 0 without a value projection; to be weighted by 0.01."""
    if "value" not in fusion:
        return jnp.float32(0)
    kernel = fusion["value"]["kernel"]
    return jnp.sum(jnp.square(jnp.eye(kernel.shape[-1]) - kernel))


# -- AdapterSoup ------------------------------------------------------------------------------


def soup_weights(similarity: Array, top: int = 5) -> Array:
    """AdapterSoup's weights (Chronopoulou et al. 2023): those of the ``top`` most similar sources.

    Args:
      similarity: [n] cosines of source and target; below zero counts as zero.
      top: how many sources are averaged, at most n.

    Returns:
      [n], summing to one; zero for the other sources.

    Raises:
      ValueError: no source resembles the target.
    """
    similarity = jnp.asarray(similarity, jnp.float32)
    order = jnp.argsort(-similarity, stable=True)[:top]
    kept = jnp.zeros_like(similarity).at[order].set(jnp.maximum(similarity[order], 0.0))
    if not kept.sum() > 0:
        raise ValueError(f"no source resembles the target: similarities {similarity.tolist()}.")
    return kept / kept.sum()


def average_adapters(bank: PyTree, weights: Array) -> PyTree:
    """One adapter [L, ...] whose weights are averages over the bank [L, n, ...] by ``weights``."""
    return jax.tree.map(lambda x: jnp.einsum("ln...,n->l...", x, weights), bank)


# -- at the sites of a network ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources(petl.Delta):
    """Several frozen adapters at every site of a network, and what combines them.

    A part of a method (see ``petl``), with the fields of the part whose adapters are combined. At
    a site it has ``{"bank": [n, ...], "scales": [n, 1 or d]}`` or ``{"bank", "fusion"}``; what
    they are is not drawn here, see ``spread``.

    ``dropout`` is on the scales themselves, entries of which become 0 or are divided by 1 - rate:
    one mask per site and forward pass, whatever the examples and positions, and for uniform scales
    of whole sources. For AdapterFusion it is on the scores.
    """

    def draw(self, key: Array, site: Site) -> PyTree:
        """Nothing."""
        del key, site
        return {}

    def delta(self, params: PyTree, z: Array, dropout: Dropout = lambda x: x) -> Array:
        """The combined change [..., d] of z [..., d]."""
        if "fusion" in params:
            return fused(params["bank"], params["fusion"], z, dropout)
        return scaled_sum(params["bank"], dropout(params["scales"]), z)


def count_sites(sites: Sequence[Site]) -> int:
    """Returns L: a scanned stack counts once for each of its layers."""
    return sum(site.layers or 1 for site in sites)


def gather(tree: PyTree, sites: Sequence[Site]) -> PyTree:
    """Stacks what a part has at its sites: nested dictionaries by path to leaves [L, ...].

    Args:
      tree: of one part, as ``petl.init`` lays it out.
      sites: in their order in the network, see ``petl.find_sites``.
    """
    parts = []
    for site in sites:
        node = tree
        for key in site.path.split("/"):
            node = node[key]
        parts.append(node if site.layers else jax.tree.map(lambda x: x[None], node))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def spread(stacked: PyTree, sites: Sequence[Site]) -> PyTree:
    """The inverse of ``gather``: leaves [L, ...] to the layout in which ``petl.adapted`` reads."""
    tree: dict[str, Any] = {}
    start = 0
    for site in sites:
        at = slice(start, start + site.layers) if site.layers else start
        start += site.layers or 1
        *parents, last = site.path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = jax.tree.map(lambda x, at=at: x[at], stacked)
    return tree


# -- counts -----------------------------------------------------------------------------------


def transfer_parameters(sites: int, sources: int, features: int) -> Mapping[str, int]:
    """How many numbers each method learns for a target, besides the head, by shapes."""
    counts = {
        variant: math.prod(scale_shape(variant, sites, sources, features)) for variant in VARIANTS
    }
    for name, value in (("fusion", True), ("static fusion", False)):
        shapes = jax.eval_shape(
            lambda key, value=value: init_fusion(key, sites, features, value=value),
            jax.random.key(0),
        )
        counts[name] = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    return counts
