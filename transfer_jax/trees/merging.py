"""Merging models that were fine-tuned from one base, leaf by leaf.

Every method in ``METHODS`` is a pure function of the arrays of one leaf, so a tree and a stream of
tensors from files are merged by the same code: ``merge`` for trees, ``merge_leaf`` for one tensor.
Names of methods and options are those of mergekit where it has them. Everything is computed in
float32 (or wider); the result has the dtype and the sharding of the base.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax.trees.arithmetic import (
    add,
    lerp_leaf,
    sharded_like,
    slerp_leaf,
    weighted_sum,
    wide,
)
from transfer_jax.trees.blocks import first_match, group_paths
from transfer_jax.trees.masks import (
    Difference,
    map_on_host,
    num_kept,
    order_statistics,
    smallest_kept,
)
from transfer_jax.trees.paths import Array, PyTree, check_same, leaf_key, map_with_path, path_str

# --- The methods ------------------------------------------------------------------------------
# f(base, models) or, marked so in METHODS, f(base, deltas) with deltas = models - base. All arrays
# have one shape and are float32 or wider; ``weight`` and other values per model are [n].


def soup(base: Array | None, models: list[Array], *, weight=1.0, normalize: bool = True) -> Array:
    """Weighted mean of the models (uniform soup, Wortsman et al. 2022); mergekit's ``linear``."""
    del base
    return _weighted(models, weight, normalize)


def task_arithmetic(
    base: Array, deltas: list[Array], *, weight=1.0, lambda_=1.0, normalize: bool = False
) -> Array:
    """``base + lambda sum_i weight_i delta_i`` (Ilharco et al. 2023)."""
    return base + lambda_ * _weighted(deltas, weight, normalize)


def ties(
    base: Array,
    deltas: list[Array],
    *,
    weight=1.0,
    density=0.2,
    lambda_=1.0,
    normalize: bool = True,
    scope: str = "global",
    threshold=None,
) -> Array:
    """Trim, elect signs, merge what agrees (Yadav et al. 2023, algorithm 1).

    Of each delta, the fraction ``density`` of largest magnitude stays: of the whole model
    (``scope="global"``, as the paper) or of each leaf (``"leaf"``, as mergekit). In each
    coordinate the sign of the weighted sum is elected (plus for 0), and the weighted mean taken of
    the entries that have it. ``threshold`` [n] is the smallest magnitude that stays.
    """
    del density, scope  # They determine the threshold, see _thresholds.
    trimmed = [jnp.where(jnp.abs(d) >= threshold[i], d, 0.0) for i, d in enumerate(deltas)]
    return base + lambda_ * _elected(trimmed, weight, normalize)


def breadcrumbs(
    base: Array,
    deltas: list[Array],
    *,
    weight=1.0,
    density=0.9,
    gamma=0.01,
    lambda_=1.0,
    normalize: bool = False,
    threshold=None,
) -> Array:
    """Drops the outliers and the small entries of each leaf (Davari and Belilovsky 2024).

    Of each delta the fraction ``gamma`` of largest magnitude is dropped, then small entries until
    the fraction ``density`` is left. ``threshold`` [n, 2] holds the smallest and the largest
    magnitude that stay.
    """
    del density, gamma
    kept = [
        jnp.where((jnp.abs(d) >= threshold[i, 0]) & (jnp.abs(d) <= threshold[i, 1]), d, 0.0)
        for i, d in enumerate(deltas)
    ]
    return base + lambda_ * _weighted(kept, weight, normalize)


def dare_linear(
    base: Array,
    deltas: list[Array],
    *,
    density,
    key: Array,
    weight=1.0,
    lambda_=1.0,
    normalize: bool = False,
    rescale: bool = True,
) -> Array:
    """Drops entries at random and rescales the rest by 1/density (Yu et al. 2024, equation 3)."""
    dropped = _dropped(deltas, density, key, rescale)
    return base + lambda_ * _weighted(dropped, weight, normalize)


def dare_ties(
    base: Array,
    deltas: list[Array],
    *,
    density,
    key: Array,
    weight=1.0,
    lambda_=1.0,
    normalize: bool = False,
    rescale: bool = True,
) -> Array:
    """DARE's random dropping, then the sign election of TIES."""
    dropped = _dropped(deltas, density, key, rescale)
    return base + lambda_ * _elected(dropped, weight, normalize)


def della(
    base: Array,
    deltas: list[Array],
    *,
    density,
    key: Array,
    epsilon=0.15,
    weight=1.0,
    lambda_=1.0,
    normalize: bool = True,
    rescale: bool = True,
) -> Array:
    """Drops small entries with a higher probability, then elects signs (Deep et al. 2024).

    Entries are ranked by magnitude along the last axis; from the smallest to the largest, the
    probability to stay rises linearly from ``density - epsilon`` to ``density + epsilon``. What
    stays is divided by its probability.
    """
    kept = []
    for i, d in enumerate(deltas):
        ranks = jnp.argsort(jnp.argsort(jnp.abs(d), axis=-1), axis=-1) if d.ndim else jnp.zeros(())
        size = d.shape[-1] if d.ndim else 1
        position = ranks / (size - 1) if size > 1 else jnp.full(d.shape, 0.5)
        stays = density[i] + epsilon[i] * (2 * position - 1)
        kept.append(_drop(d, stays, jax.random.fold_in(key, i), rescale))
    return base + lambda_ * _elected(kept, weight, normalize)


def slerp(base: Array | None, models: list[Array], *, t) -> Array:
    """Spherical interpolation: from the base to the model, or between two models without a base."""
    start, end = models if base is None else (base, models[0])
    return slerp_leaf(start, end, t)


def lerp(base: Array | None, models: list[Array], *, t) -> Array:
    """Linear interpolation, with the ends of ``slerp``."""
    start, end = models if base is None else (base, models[0])
    return lerp_leaf(start, end, t)


def fisher(
    base: Array | None, models: list[Array], *, fishers, weight=1.0, fisher_floor=1e-6
) -> Array:
    """Mean weighted by Fisher information, ``sum w F theta / sum w F`` (Matena and Raffel 2022).

    ``fishers`` are the diagonals of the models; values below ``fisher_floor`` count as that.
    """
    del base
    importance = [weight[i] * jnp.maximum(wide(f), fisher_floor) for i, f in enumerate(fishers)]
    return sum(f * x for f, x in zip(importance, models)) / sum(importance)


def regmean(base: Array | None, models: list[Array], *, grams, alpha=0.9, weight=1.0) -> Array:
    """Least-squares fit of what the models' linear layers output (Jin et al. 2023, equation 4).

    ``(sum_i w_i G_i)^-1 sum_i w_i G_i W_i`` for kernels W [..., in, out] with the Gram matrix
    ``G_i`` [..., in, in] of the layer's inputs, whose off-diagonal entries are multiplied by
    ``alpha``. A leaf without Gram matrices (None) is averaged. So is the row of an input that was
    always zero.
    """
    del base
    if all(g is None for g in grams):
        return _weighted(models, weight, normalize=True)
    identity = jnp.eye(models[0].shape[-2])
    scaled = [weight[i] * wide(g) * (alpha + (1 - alpha) * identity) for i, g in enumerate(grams)]
    total = sum(scaled, start=jnp.zeros_like(scaled[0]))
    outputs = sum(
        (jnp.matmul(g, x, precision="highest") for g, x in zip(scaled, models)),
        start=jnp.zeros_like(models[0]),
    )
    unused = jnp.diagonal(total, axis1=-2, axis2=-1) == 0
    total = total + unused[..., None] * identity
    outputs = jnp.where(unused[..., None], _weighted(models, weight, normalize=True), outputs)
    return jnp.linalg.solve(total, outputs)


def delta_guided(
    base: Array, deltas: list[Array], *, p=1.0, granularity: str = "row", lambda_=1.0
) -> Array:
    """Weights each delta by its size: ``a_k = |delta_k|^p / sum_j |delta_j|^p`` (CoDiEmb, fusion).

    Sizes are norms of a whole ``tensor``, of each ``row`` (along the last axis) or of each
    ``element``. ``p=0`` is the uniform soup. Where all deltas are zero the weights are equal. To
    merge in a hierarchy, merge the checkpoints of each run, then the results.
    """
    stacked = jnp.stack(deltas)
    squares = jnp.square(jnp.abs(stacked))
    if granularity == "tensor":
        squares = jnp.sum(squares, axis=tuple(range(1, stacked.ndim)), keepdims=True)
    elif granularity == "row" and stacked.ndim > 1:
        squares = jnp.sum(squares, axis=-1, keepdims=True)
    sizes = jnp.sqrt(squares)
    largest = jnp.max(sizes, axis=0)
    powers = jnp.power(sizes / jnp.where(largest == 0, 1.0, largest), p)
    # A zero delta to a negative power takes all the weight.
    infinite = jnp.isinf(powers)
    powers = jnp.where(jnp.any(infinite, axis=0), infinite.astype(powers.dtype), powers)
    total = jnp.sum(powers, axis=0)
    weights = jnp.where(total == 0, 1 / len(deltas), powers / jnp.where(total == 0, 1.0, total))
    return base + lambda_ * jnp.sum(weights * stacked, axis=0)


def model_stock(base: Array, deltas: list[Array], *, filter_wise: bool = False) -> Array:
    """Interpolates between base and mean by the angle of the deltas (Jang et al. 2024, eq. 5).

    ``t = n c / (1 + (n - 1) c)`` with ``c`` the mean cosine between two deltas, of the whole leaf
    or, ``filter_wise``, along its last axis. Where that has a pole, t = 0.
    """
    n = len(deltas)
    axis = -1 if filter_wise and deltas[0].ndim else None
    norms = [jnp.sqrt(jnp.sum(d * d, axis=axis, keepdims=True)) for d in deltas]
    cosines = []
    for i in range(n):
        for j in range(i + 1, n):
            product = jnp.sum(deltas[i] * deltas[j], axis=axis, keepdims=True)
            scale = norms[i] * norms[j]
            cosines.append(jnp.where(scale == 0, 0.0, product / jnp.where(scale == 0, 1.0, scale)))
    cosine = jnp.clip(sum(cosines) / len(cosines), -1, 1)
    pole = 1 + (n - 1) * cosine
    singular = jnp.abs(pole) < 1e-6
    t = jnp.where(singular, 0.0, n * cosine / jnp.where(singular, 1.0, pole))
    return base + t * sum(deltas) / n


def _weighted(xs: list[Array], weight: Array, normalize: bool) -> Array:
    total = sum((weight[i] * x for i, x in enumerate(xs)), start=jnp.zeros_like(xs[0]))
    if not normalize:
        return total
    divisor = jnp.sum(weight)
    return total / jnp.where(jnp.abs(divisor) < 1e-8, 1.0, divisor)


def _elected(deltas: list[Array], weight: Array, normalize: bool) -> Array:
    """Sums, or averages, the weighted deltas that have the sign of their sum."""
    weighted = [weight[i] * d for i, d in enumerate(deltas)]
    positive = sum(weighted, start=jnp.zeros_like(deltas[0])) >= 0
    agrees = [jnp.where(positive, w > 0, w < 0) for w in weighted]
    total = sum(
        (jnp.where(a, w, 0.0) for a, w in zip(agrees, weighted)), start=jnp.zeros_like(deltas[0])
    )
    if not normalize:
        return total
    divisor = sum(
        (jnp.where(a, weight[i], 0.0) for i, a in enumerate(agrees)),
        start=jnp.zeros_like(deltas[0]),
    )
    return total / jnp.where(divisor == 0, 1.0, divisor)


def _dropped(deltas: list[Array], density: Array, key: Array, rescale: bool) -> list[Array]:
    return [_drop(d, density[i], jax.random.fold_in(key, i), rescale) for i, d in enumerate(deltas)]


def _drop(delta: Array, stays: Array, key: Array, rescale: bool) -> Array:
    kept = jnp.where(jax.random.uniform(key, delta.shape) < stays, delta, 0.0)
    return kept / stays if rescale else kept


class Method(NamedTuple):
    """A method and what it needs.

    Attributes:
      function: ``f(base, models_or_deltas, **options)``; its keyword arguments are its options.
      deltas: whether it works on differences to the base, and so needs one.
      num_models: the least, and the largest, number of models.
    """

    function: Callable[..., Array]
    deltas: bool
    num_models: tuple[int, int | None] = (1, None)

    @property
    def options(self) -> dict[str, Any]:
        """Option name -> default, ``inspect.Parameter.empty`` if it must be given."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


METHODS: dict[str, Method] = {
    "soup": Method(soup, deltas=False),
    "task_arithmetic": Method(task_arithmetic, deltas=True),
    "ties": Method(ties, deltas=True),
    "dare_linear": Method(dare_linear, deltas=True),
    "dare_ties": Method(dare_ties, deltas=True),
    "breadcrumbs": Method(breadcrumbs, deltas=True),
    "della": Method(della, deltas=True),
    "lerp": Method(lerp, deltas=False, num_models=(1, 2)),
    "slerp": Method(slerp, deltas=False, num_models=(1, 2)),
    "fisher": Method(fisher, deltas=False),
    "regmean": Method(regmean, deltas=False),
    "delta_guided": Method(delta_guided, deltas=True),
    "model_stock": Method(model_stock, deltas=True, num_models=(2, None)),
}
_PER_MODEL = ("weight", "density", "gamma", "epsilon")
_CHOICES = {"granularity": ("tensor", "row", "element"), "scope": ("leaf", "global")}
_TREES = ("fishers", "grams")

# --- Applying them ----------------------------------------------------------------------------


def merge(
    base: PyTree | None,
    models_or_vectors: Sequence[PyTree],
    method: str = "task_arithmetic",
    *,
    vectors: bool = False,
    **options: Any,
) -> PyTree:
    """Merges models, or task vectors, into one model.

    Args:
      base: the model that the others were fine-tuned from; None for methods that need none (soup,
        greedy_soup, fisher, regmean, and lerp and slerp between two models).
      models_or_vectors: n trees with the paths and shapes of the base.
      method: a name in ``METHODS``, whose functions document the options, or ``greedy_soup``.
      vectors: the trees are task vectors, not models.
      **options: ``weight``, ``density``, ``gamma`` and ``epsilon`` are scalars or [n]; they,
        ``lambda`` (``lambda_`` in Python code) and ``t`` may also be mappings from path patterns
        to such values, of which the first that is found in a leaf's path counts. ``fishers`` and
        ``grams`` are n trees. Random methods need ``key``, a typed key. ``greedy_soup`` needs
        ``score``, a function of a model that is higher for better models: models are tried from
        best to worst, and stay in the average if the score does not fall (Wortsman et al. 2022,
        recipe 1).

    Returns:
      A tree with the structure, dtypes and shardings of the base (or of the first model).

    Raises:
      ValueError: an unknown or missing method, option or value; trees that differ; a wrong number
        of models.

    >>> base, models = {"w": 1.0}, [{"w": 2.0}, {"w": 5.0}]
    >>> merge(base, models, "task_arithmetic", weight=[1.0, 0.5])
    {'w': Array(4., dtype=float32)}
    >>> merge(base, models, "tie")
    Traceback (most recent call last):
      ...
    ValueError: method='tie' is not known. Did you mean ties?
    """
    models = list(models_or_vectors)
    _require_models(models)
    names = [f"model {i}" for i in range(len(models))]
    if base is None:
        check_same(*models, names=names)
    else:
        check_same(base, *models, names=["base", *names])
    if method == "greedy_soup":
        if vectors:
            models = [add(base, v) for v in models]
        return _greedy_soup(models, **options)
    options = _checked_options(method, options)
    if METHODS[method].deltas and base is None:
        raise ValueError(f"method {method!r} needs a base.")
    template = models[0] if base is None else base
    for value in options.values():
        if isinstance(value, Mapping):
            group_paths(template, value)  # Every leaf has a group, and every group a leaf.

    if options.get("scope") == "global" and options["threshold"] is None:
        options["threshold"] = _global_thresholds(base, models, vectors, options["density"])
    by_path = {
        name: [_leaves_by_path(tree, template, f"{name}[{i}]", full=name == "fishers")
               for i, tree in enumerate(_one_per_model(name, options[name], len(models)))]
        for name in _TREES if name in options
    }  # fmt: skip

    def leaf(path: str, x: Array, *leaves: Array) -> Array:
        own = {name: [tree.get(path) for tree in trees] for name, trees in by_path.items()}
        return _merge_leaf(
            path, None if base is None else x, leaves, method, vectors, {**options, **own}
        )

    return map_with_path(leaf, template, *models)


def merge_leaf(
    path: str,
    base: Array | None,
    models_or_vectors: Sequence[Array],
    method: str = "task_arithmetic",
    *,
    vectors: bool = False,
    **options: Any,
) -> Array:
    """Merges one tensor exactly as ``merge`` merges the leaf at ``path``.

    Args:
      path: the leaf's path, ``a/b`` or ``a.b``. Random masks depend on it.
      base: the tensor of the base, or None.
      models_or_vectors: n tensors of its shape.
      method: a name in ``METHODS``.
      vectors: the tensors are task vectors, not models.
      **options: as for ``merge``, but ``fishers`` and ``grams`` are n arrays, and ``ties`` with
        ``scope="global"`` needs ``threshold``, [n], as one tensor does not determine it.

    Raises:
      ValueError: as for ``merge``.

    >>> merge_leaf("w", jnp.float32(1), [jnp.float32(3)], "task_arithmetic", weight=0.5)
    Array(2., dtype=float32)
    """
    _require_models(models_or_vectors)
    options = _checked_options(method, options)
    if options.get("scope") == "global" and options["threshold"] is None:
        raise ValueError("scope='global' needs threshold, [n], to merge one tensor; or use 'leaf'.")
    shapes = {jnp.shape(x) for x in [*models_or_vectors, *([] if base is None else [base])]}
    if len(shapes) > 1:
        raise ValueError(f"the tensors of {path!r} have different shapes: {sorted(shapes)}.")
    return _merge_leaf(path, base, models_or_vectors, method, vectors, options)


def _require_models(models: Sequence[Any]) -> None:
    if not models:
        raise ValueError("nothing to merge: give at least one model.")


def _checked_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all options of the method, defaults filled in."""
    if method == "greedy_soup":
        raise ValueError("method 'greedy_soup' scores whole models; use merge.")
    if method not in METHODS:
        raise ValueError(_unknown("method", method, [*METHODS, "greedy_soup"]))
    options = {"lambda_" if name == "lambda" else name: value for name, value in options.items()}
    known = METHODS[method].options
    for name, value in options.items():
        if name not in known:
            shown = [n.rstrip("_") for n in known]
            raise ValueError(_unknown(f"option of {method}", name, shown))
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(_unknown(name, value, _CHOICES[name]))
    missing = [
        n for n, d in known.items() if d is inspect.Parameter.empty and options.get(n) is None
    ]
    if missing:
        raise ValueError(f"method {method!r} needs {', '.join(f'{n}=...' for n in missing)}.")
    return {**known, **options}


def _unknown(what: str, value: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), known, n=3)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(known)}."
    return f"{what}={value!r} is not known. {hint}"


def _one_per_model(name: str, trees: Any, num: int) -> Sequence[Any]:
    if not isinstance(trees, (list, tuple)) or len(trees) != num:
        raise ValueError(f"{name} must be a list of {num}, one for each model.")
    return trees


def _leaves_by_path(tree: PyTree, like: PyTree, name: str, full: bool) -> dict[str, Array]:
    if full:
        check_same(like, tree, names=("the models", name))
    leaves = {path_str(kp): x for kp, x in jax.tree_util.tree_leaves_with_path(tree)}
    known = {path_str(kp) for kp, _ in jax.tree_util.tree_leaves_with_path(like)}
    for path in leaves:
        if path not in known:
            near = difflib.get_close_matches(path, known, n=3)
            raise ValueError(f"{name} has a leaf {path!r}, which the models lack. Nearest: {near}.")
    return leaves


def _merge_leaf(
    path: str,
    base: Array | None,
    models: Sequence[Array],
    method: str,
    vectors: bool,
    options: dict[str, Any],
) -> Array:
    least, most = METHODS[method].num_models
    needed = 2 if base is None and most == 2 else least
    if len(models) < needed or (most == 2 and len(models) != needed):
        raise ValueError(
            f"method {method!r} got {len(models)} models; it merges "
            + ("the base and one model, or two models without a base." if most == 2 else
               f"at least {needed}.")
        )  # fmt: skip
    if METHODS[method].deltas and base is None:
        raise ValueError(f"method {method!r} needs a base.")
    if vectors and base is None:
        raise ValueError("task vectors need a base.")
    arrays: dict[str, Any] = {}
    static: dict[str, Any] = {}
    for name, value in options.items():
        if name == "key":
            arrays[name] = leaf_key(value, path)
        elif name in _TREES:
            arrays[name] = list(_one_per_model(name, value, len(models)))
        elif name == "threshold":
            if value is None:
                value = _leaf_thresholds(path, base, models, vectors, options)
            arrays[name] = value
        elif isinstance(value, (bool, str)):
            static[name] = value
        else:
            arrays[name] = _number(name, value, path, len(models))
    if "density" in arrays and "epsilon" in arrays:
        _check_della(path, options, len(models))
    # Density and gamma only determine thresholds where there are thresholds; those are arrays.
    merged = _compiled(method, vectors, tuple(sorted(static.items())), base, list(models), arrays)
    return sharded_like(merged, models[0] if base is None else base)


def _number(name: str, value: Any, path: str, num: int) -> Array:
    """Returns an option's value for a leaf: [num] if it is one per model, else a scalar."""
    if isinstance(value, Mapping):
        value = value[first_match(value, path)]
    number = jnp.asarray(value, jnp.float32)
    shape = (num,) if name in _PER_MODEL else ()
    if number.shape not in ((), shape):
        wanted = f"a scalar or {num} values, one for each model" if shape else "a scalar"
        raise ValueError(f"{name} of shape {number.shape} for leaf {path!r}; give {wanted}.")
    return jnp.broadcast_to(number, shape)


def _fractions(name: str, value: Any, path: str, num: int) -> list[float]:
    """Returns an option that must be known before compilation, one number per model."""
    if isinstance(value, Mapping):
        value = value[first_match(value, path)]
    numbers = np.broadcast_to(np.asarray(value, float), (num,)).tolist()
    if any(not 0 <= x <= 1 for x in numbers):
        raise ValueError(f"{name}={value} for leaf {path!r}: give fractions from 0 to 1.")
    return numbers


def _check_della(path: str, options: Mapping[str, Any], num: int) -> None:
    density = _fractions("density", options["density"], path, num)
    epsilon = _fractions("epsilon", options["epsilon"], path, num)
    for d, e in zip(density, epsilon):
        if d - e <= 0 or d + e > 1:
            raise ValueError(
                f"density={d} with epsilon={e}: density - epsilon must be above 0 and density + "
                "epsilon at most 1, as they are probabilities."
            )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _compiled(
    method: str,
    vectors: bool,
    static: tuple[tuple[str, Any], ...],
    base: Any,
    models: list[Array],
    arrays: dict[str, Any],
) -> Array:
    dtype = jnp.result_type(models[0] if base is None else base)
    wide_base: Any = None if base is None else wide(base)
    xs = [wide(x) for x in models]
    if METHODS[method].deltas and not vectors:
        xs = [x - wide_base for x in xs]
    elif vectors and not METHODS[method].deltas:
        xs = [x + wide_base for x in xs]
    merged = METHODS[method].function(wide_base, xs, **dict(static), **arrays)
    return merged.astype(dtype)


def _leaf_thresholds(
    path: str, base: Any, models: Sequence[Array], vectors: bool, options: Mapping[str, Any]
) -> Array:
    """Returns ``threshold`` of ties, [n], or of breadcrumbs, [n, 2], from one leaf."""
    num = len(models)
    density = _fractions("density", options["density"], path, num)

    def of_ties(i: int) -> Array:
        return smallest_kept([models[i] if vectors else Difference(base, models[i])], density[i])

    if "gamma" not in options:
        return jnp.stack(map_on_host(of_ties, num, models))
    gamma = _fractions("gamma", options["gamma"], path, num)

    def of_breadcrumbs(i: int) -> Array:
        delta = models[i] if vectors else Difference(base, models[i])
        size = jnp.size(models[i])
        if density[i] >= 1:
            return jnp.array([0.0, jnp.inf])
        kept = num_kept(density[i], size)
        # As many outliers as leave room for the fraction to be kept.
        first = max(0, size - kept - int(gamma[i] * size))
        return jnp.stack(order_statistics([delta], [first, first + kept - 1]))

    return jnp.stack(map_on_host(of_breadcrumbs, num, models))


def _global_thresholds(
    base: PyTree, models: Sequence[PyTree], vectors: bool, density: Any
) -> Array:
    """Returns ``threshold`` of ties, [n], from all leaves together."""
    if isinstance(density, Mapping):
        raise ValueError("density per path group needs scope='leaf'.")
    fractions = _fractions("density", density, "", len(models))

    def of_model(i: int) -> Array:
        leaves = jax.tree.leaves(models[i])
        if not vectors:
            leaves = list(map(Difference, jax.tree.leaves(base), leaves))
        return smallest_kept(leaves, fractions[i])

    return jnp.stack(map_on_host(of_model, len(models), jax.tree.leaves(models)))


def _greedy_soup(
    models: Sequence[PyTree], score: Callable[[PyTree], float] | None = None, **unknown: Any
) -> PyTree:
    if unknown:
        raise ValueError(_unknown("option of greedy_soup", next(iter(unknown)), ["score"]))
    if score is None:
        raise ValueError("method 'greedy_soup' needs score=..., a function of a model.")
    scores = [float(score(model)) for model in models]
    order = sorted(range(len(models)), key=lambda i: -scores[i])
    chosen, best = [models[order[0]]], scores[order[0]]
    for i in order[1:]:
        candidate = [*chosen, models[i]]
        value = float(score(_mean(candidate)))
        if value >= best:
            chosen, best = candidate, value
    return _mean(chosen)


def _mean(trees: Sequence[PyTree]) -> PyTree:
    return weighted_sum(trees, jnp.full(len(trees), 1 / len(trees)))
