"""Fisher information: its diagonal, elastic weight consolidation, Kronecker factors.

The Fisher information of a model with log-likelihood ``l(theta; x, y)`` is the mean over inputs
``x`` and over labels ``y`` *drawn from the model* of ``g g^T`` with ``g`` the gradient of ``l``.
Estimators differ in the labels and in what they square (Kunstner et al. 2019, van de Ven 2025):

=============  ==================================================================================
kind           what is averaged over the examples
=============  ==================================================================================
``exact``      ``sum_y p(y|x) g(x, y)^2``: the Fisher information itself, K backward passes
``mc``         ``g(x, y)^2`` for ``num_samples`` labels drawn from the model: unbiased for exact
``argmax``     ``g(x, y)^2`` for the most likely label
``empirical``  ``g^2`` for the label of the data set; the Fisher information only if the model's
               predictions are right as probabilities
``label_prob`` ``p(y|x) g^2`` for the label of the data set: one term of ``exact``, used by some
               continual-learning libraries
``batched``    not per example: the square of the gradient of the *batch mean*. A widespread
               shortcut, and biased: with mean gradient m and variance v of one coordinate it is
               ``v / B + m^2`` for batches of size B instead of ``v + m^2``, so it depends on B
               and on the order of the data, and near an optimum is about B times too small
=============  ==================================================================================
"""

import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from transfer_jax.trees import outer
from transfer_jax.trees.arithmetic import add, scale, sharded_like, wide
from transfer_jax.trees.blocks import expand
from transfer_jax.trees.paths import Array, PyTree, check_same, map_with_path, path_str

Kind = Literal["exact", "mc", "empirical", "argmax", "label_prob", "batched"]
Mode = Literal["separate", "sum", "online", "streaming_ema"]
Likelihood = Literal["categorical", "gaussian"]
Normalize = Literal["mean", "max", "trace"]
Batch = Any


def fisher_diagonal(
    log_prob_or_loss: Callable[[PyTree, Batch], Array],
    params: PyTree,
    batches: Iterable[Batch] | Batch,
    *,
    kind: Kind = "exact",
    num_samples: int = 1,
    chunk_size: int | None = None,
    key: Array | None = None,
    mask: Array | Callable[[Batch], Array] | None = None,
    normalize: Normalize | None = None,
    likelihood: Likelihood = "categorical",
) -> PyTree:
    """Returns the diagonal of the Fisher information, averaged over examples.

    Squared gradients of single examples are computed ``chunk_size`` at a time and added up in
    float32, batch after batch, so that memory holds at most ``chunk_size`` gradients. The result
    depends neither on ``chunk_size`` nor on how the data are cut into batches, padded or spread
    over devices. Batches may be sharded over a mesh with automatic axes.

    The function given must treat the rows of a batch independently (dropout off, batch
    normalisation with running statistics): it is called with batches of a single row. Arrays that
    it needs beside ``params`` belong in the batch, or in ``params`` with the parameters of
    interest split off by ``partition``. Pass the same function object to use its compilation again.

    Args:
      log_prob_or_loss: ``f(params, batch)``. For ``exact``, ``mc`` and ``argmax`` it returns the
        log-probabilities [B, K] of the K classes (unnormalised logits are normalised), or for
        ``mc`` and ``argmax`` [B, ..., K] if an example is several independent choices, such as
        tokens given their prefix. With ``likelihood="gaussian"`` it returns the means [B, D] of
        unit normals. For ``empirical``, ``label_prob`` and ``batched`` it returns one negative
        log-likelihood (the sign does not matter) per row, [B].
      params: any pytree of floating leaves. None leaves are absent.
      batches: an iterable of batches (a list, a generator, a loader); or one batch: a dictionary,
        tuple or array, or any other pytree that is no iterable. All leaves have the batch axis
        first. Batches of one size share a compilation, and smaller ones are padded to it.
      kind: which estimator, see the module.
      num_samples: labels drawn per example, for ``mc``.
      chunk_size: rows whose gradients are held at once. The gradients in matrices of dense layers
        are never held where a row goes through the layer once (see ``trees/outer.py``). By default,
        for each device that the batch is on, as many rows as have other gradients of the size of
        the model, up to 256; at least 1 on CPUs, where XLA then adds squares to the sum without
        storing gradients, and 32 on accelerators. A multiple of the number of devices keeps each
        row on its device.
      key: a typed key, for ``mc``. The i-th real example draws from ``fold_in(key, i)``.
      mask: weights [B] of the rows, 0 for padding: an array (for one batch), a function of the
        batch, or None for ``batch["mask"]`` where the batch is a mapping that has it. Padded rows
        may hold anything.
      normalize: None for the expectation itself; or divide by the mean, the maximum or the sum
        (``"trace"``) over all coordinates, which then is 1. For the precision of a Laplace
        approximation multiply the expectation by the number of examples.
      likelihood: ``categorical``, or ``gaussian`` with unit variance.

    Returns:
      A tree like ``params``, float32, sharded as the parameters are.

    Raises:
      ValueError: an unknown option, a missing key, no examples, or an output of the wrong shape.
      TypeError: a parameter is not floating.

    >>> logits = lambda params, batch: batch["inputs"] @ params["w"]
    >>> params, batch = {"w": jnp.zeros((2, 4))}, {"inputs": jnp.array([[1.0, 0.0], [3.0, 0.0]])}
    >>> fisher_diagonal(logits, params, batch)["w"][0]  # E[x^2] p (1 - p) = 5 * 3 / 16
    Array([0.9375, 0.9375, 0.9375, 0.9375], dtype=float32)
    """
    _check_option("kind", kind, Kind)
    _check_option("likelihood", likelihood, Likelihood)
    if normalize is not None:
        _check_option("normalize", normalize, Normalize, "None")
    if num_samples < 1 or (chunk_size is not None and chunk_size < 1):
        raise ValueError(
            f"chunk_size={chunk_size} and num_samples={num_samples}: both must be at least 1."
        )
    if kind == "mc" and key is None:
        raise ValueError("kind='mc' draws labels: give key=jax.random.key(...).")
    if kind == "argmax" and likelihood == "gaussian":
        raise ValueError("the score of a Gaussian is 0 at its mode: use kind='exact' or 'mc'.")
    check_same(params, names=["params"])

    key = jax.random.key(0) if key is None else key  # Unused unless kind is "mc".
    total, weight, seen = None, jnp.float32(0), _zero_beside(params)
    for batch, weights in _batches(batches, mask):
        chunk_size = chunk_size or _default_chunk_size(
            _Options(log_prob_or_loss, kind, likelihood, num_samples, 1), params, batch
        )
        options = _Options(log_prob_or_loss, kind, likelihood, num_samples, chunk_size)
        squares, counted, real = _batch_squares(options, params, batch, weights, key, seen)
        total = squares if total is None else _add_to(total, squares)
        weight, seen = weight + counted, seen + real
    if total is None or (not isinstance(weight, jax.core.Tracer) and float(weight) == 0):
        raise ValueError("no examples: batches is empty, or the mask is 0 everywhere.")
    diagonal = jax.tree.map(lambda f, p: sharded_like(f / weight, p), total, params)
    return diagonal if normalize is None else _normalized(diagonal, normalize)


def _check_option(name: str, value: Any, options: Any, *more: str) -> None:
    allowed = [repr(o) for o in get_args(options)] + list(more)
    if repr(value) not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}.")


def _zero_beside(params: PyTree) -> Array:
    """A zero on the mesh of ``params``: were it elsewhere, the second batch would recompile."""
    zero = jnp.int32(0)
    for x in jax.tree.leaves(params):
        sharding = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding):
            whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
            return jax.device_put(zero, whole)
    return zero


def _default_chunk_size(options: "_Options", params: PyTree, batch: Batch) -> int:
    """As many rows as have gradients, of those that must be formed, of the size of the model."""
    arrays = [x for x in jax.tree.leaves(batch) if isinstance(x, jax.Array)]
    devices = max(
        (len(x.sharding.device_set) for x in arrays if not isinstance(x, jax.core.Tracer)),
        default=1,
    )
    least = 1 if jax.default_backend() == "cpu" else 32
    if options.kind == "batched":
        return devices * least
    leaves, structure = jax.tree.flatten((params, jax.tree.map(lambda x: x[:1], batch)))
    shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
    return devices * min(max(least, _rows_of_the_size_of_params(options, structure, shapes)), 256)


@functools.lru_cache(maxsize=16)
def _rows_of_the_size_of_params(options: "_Options", structure: Any, shapes: tuple) -> int:
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    params, row = jax.tree.unflatten(structure, arrays)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    return size // max(_program(options, params, row, keys)[0].held_bytes(), 1)


class _Options(NamedTuple):
    """What a compilation of ``_batch_squares`` depends on."""

    function: Callable[..., Any]
    kind: Kind
    likelihood: Likelihood
    num_samples: int
    chunk_size: int


def _batches(
    batches: Any, mask: Array | Callable[[Batch], Array] | None
) -> Iterator[tuple[Batch, Array]]:
    """Yields batches and row weights, smaller batches padded to the size of the largest so far."""
    single = (
        isinstance(batches, (Mapping, tuple))
        or hasattr(batches, "dtype")
        or not hasattr(batches, "__iter__")
    )
    if mask is not None and not callable(mask) and not single:
        raise ValueError("an array as mask fits one batch; for several give a function of a batch.")
    largest = 0
    for batch in [batches] if single else batches:
        sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch)}
        if len(sizes) != 1 or () in sizes:
            raise ValueError(
                f"the leaves of a batch need one common batch axis first, not {sorted(sizes)}."
            )
        (size,) = sizes.pop()
        if size == 0:
            continue
        if callable(mask):
            weights = mask(batch)
        elif mask is not None:
            weights = mask
        elif isinstance(batch, Mapping) and "mask" in batch:
            weights = batch["mask"]
        else:
            weights = jnp.ones(size)
        weights = jnp.asarray(weights, jnp.float32)
        if weights.shape != (size,):
            raise ValueError(f"mask of shape {weights.shape} for a batch of {size} rows.")
        largest = max(largest, size)
        yield _pad((batch, weights), largest)


def _pad(batch_and_weights: tuple[Batch, Array], size: int) -> tuple[Batch, Array]:
    """Repeats the last row up to ``size`` rows, with weight 0."""
    batch, weights = batch_and_weights
    extra = size - weights.shape[0]
    if extra == 0:
        return batch, weights
    # Rows that exist are safe to differentiate at, which rows of zeros need not be.
    repeated = jax.tree.map(
        lambda x: jnp.concatenate([jnp.asarray(x), jnp.repeat(x[-1:], extra, axis=0)]), batch
    )
    return repeated, jnp.pad(weights, (0, extra))


def _scores(options: _Options, output: Array, key: Array) -> tuple[int, Callable[[Array], Any]]:
    """Returns n and ``i -> (cotangent, weight)`` of the normalised output of one example.

    The estimator is the sum over i < n of ``weight * (cotangent pulled back to params)^2``.
    """
    kind, size = options.kind, output.shape[-1]
    if kind == "exact":
        if output.ndim != 1:
            raise ValueError(
                f"kind='exact' needs outputs [B, K], not [B, {', '.join(map(str, output.shape))}]; "
                "sum out other axes, or use kind='mc'."
            )
        weights = jnp.ones(size) if options.likelihood == "gaussian" else jnp.exp(output)
        return size, lambda i: (jax.nn.one_hot(i, size, dtype=output.dtype), weights[i])
    if kind == "argmax":
        best = jnp.argmax(output, -1)
        return 1, lambda i: (jax.nn.one_hot(best, size, dtype=output.dtype), 1.0)

    def draw(i: Array) -> tuple[Array, float]:
        sample_key = jax.random.fold_in(key, i)
        if options.likelihood == "gaussian":
            # The score of a unit normal in its mean is the noise itself.
            cotangent = jax.random.normal(sample_key, output.shape, output.dtype)
        else:
            label = jax.random.categorical(sample_key, output)
            cotangent = jax.nn.one_hot(label, size, dtype=output.dtype)
        return cotangent, 1.0 / options.num_samples

    return options.num_samples, draw


def _square(x: Array) -> Array:
    return jnp.square(jnp.abs(x.astype(jnp.promote_types(x.dtype, jnp.float32))))


def _outputs(options: _Options, params: PyTree, batch: Batch, size: int) -> Array:
    """Returns losses [B], means or normalised log-probabilities [B, ..., K]."""
    out = options.function(params, batch)
    shape, scalar = jnp.shape(out), options.kind in ("empirical", "label_prob", "batched")
    if shape[:1] != (size,) or (len(shape) == 1) != scalar:
        wanted = "one loss per row, [B]" if scalar else "log-probabilities or means, [B, ..., K]"
        raise ValueError(
            f"kind={options.kind!r} needs a function that returns {wanted}; for a batch with B = "
            f"{size} it returned shape {shape}."
        )
    categorical = not scalar and options.likelihood == "categorical"
    return jax.nn.log_softmax(out) if categorical else out


def _row_gradients(
    options: _Options, params: PyTree, rows: Batch, keys: Array, i: Array
) -> tuple[PyTree, Array]:
    """Returns the i-th gradient of each row, a tree of [B, ...], and its weight [B]."""

    def gradient(row: Batch, key: Array) -> tuple[PyTree, Array | float]:
        def output(p: PyTree) -> Array:
            return _outputs(options, p, jax.tree.map(lambda x: x[None], row), 1)[0]

        if options.kind == "empirical":
            return jax.grad(output)(params), 1.0
        if options.kind == "label_prob":
            value, found = jax.value_and_grad(output)(params)
            # Log-probabilities of labels are not positive, so the sign convention does not matter.
            return found, jnp.exp(-jnp.abs(value))
        out, pull_back = jax.vjp(output, params)
        cotangent, weight = _scores(options, out, key)[1](i)
        return pull_back(cotangent)[0], weight

    gradients, weights = jax.vmap(gradient)(rows, keys)
    return gradients, jnp.asarray(weights, jnp.float32)


def _program(
    options: _Options, params: PyTree, rows: Batch, keys: Array
) -> tuple[outer.Program, int]:
    """Returns the program of ``_row_gradients``, and how many i there are."""
    count = 1
    if options.kind not in ("empirical", "label_prob"):
        first = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), rows)
        out = jax.eval_shape(lambda p, r: _outputs(options, p, r, 1)[0], params, first)
        key = jax.eval_shape(lambda: jax.random.key(0))
        counts: list[int] = []
        jax.eval_shape(lambda o, k: counts.append(_scores(options, o, k)[0]), out, key)
        count = counts[0]
    function = functools.partial(_row_gradients, options)
    return outer.trace(function, params, rows, keys, jnp.int32(0)), count


def _zeros(params: PyTree) -> PyTree:
    return jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.float32), params)


@functools.partial(jax.jit, static_argnums=0)
def _batch_squares(
    options: _Options, params: PyTree, batch: Batch, weights: Array, key: Array, seen: Array
) -> tuple[PyTree, Array, Array]:
    """Returns the weighted sum of squares over a batch, its weight and its number of real rows."""
    size = weights.shape[0]
    real = weights > 0
    first = jnp.argmax(real)
    # Padded rows may hold anything; a real row in their place keeps every gradient finite.
    batch = jax.tree.map(
        lambda x: jnp.where(expand(real, jnp.ndim(x)), x, jnp.asarray(x)[first]), batch
    )
    index = seen + jnp.cumsum(real, dtype=jnp.int32) - 1

    chunk = min(options.chunk_size, size)
    num_chunks = -(-size // chunk)
    padded = _pad(((batch, index), weights), num_chunks * chunk)

    def chunks(x: Array) -> Array:
        # Rows go to chunks with a stride, so that each chunk has rows of every data shard.
        x = jnp.asarray(x)
        return jnp.moveaxis(x.reshape(chunk, num_chunks, *x.shape[1:]), 1, 0)

    def add_squares(total: PyTree, rows_and_weights: Any) -> tuple[PyTree, None]:
        (rows, index), w = rows_and_weights
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
        program, count = _program(options, params, rows, keys)
        squares = outer.sum_of_squares(program, (params, rows, keys), count, w)
        return jax.tree.map(jnp.add, total, squares), None

    def add_gradient(total: PyTree, rows_and_weights: Any) -> tuple[PyTree, None]:
        (rows, _), w = rows_and_weights

        def loss(p: PyTree) -> Array:
            return jnp.sum(w * _outputs(options, p, rows, chunk))

        return jax.tree.map(lambda f, g: f + g.astype(f.dtype), total, jax.grad(loss)(params)), None

    batched = options.kind == "batched"
    total = jax.lax.scan(
        add_gradient if batched else add_squares, _zeros(params), jax.tree.map(chunks, padded)
    )[0]
    num_real, weight = real.sum(dtype=jnp.int32), weights.sum()
    if not batched:
        return total, weight, num_real
    any_real = weight > 0
    mean_weight = jnp.where(any_real, weight, 1.0)
    squares = jax.tree.map(lambda g: jnp.where(any_real, _square(g / mean_weight), 0.0), total)
    return squares, any_real.astype(jnp.float32), num_real


@functools.partial(jax.jit, donate_argnums=0)
def _add_to(total: PyTree, more: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, total, more)


def _normalized(diagonal: PyTree, normalize: Normalize) -> PyTree:
    leaves = jax.tree.leaves(diagonal)
    if normalize == "max":
        unit = jnp.max(jnp.stack([x.max() for x in leaves]))
    else:
        unit = jnp.sum(jnp.stack([x.sum() for x in leaves]))
        if normalize == "mean":
            unit = unit / sum(x.size for x in leaves)
    return scale(diagonal, 1.0 / jnp.where(unit == 0, 1.0, unit))


def merge_fisher(old: PyTree | None, new: PyTree, *, decay: float = 1.0) -> PyTree:
    """Returns ``decay * old + new``: the diagonal that stands for all tasks so far.

    With ``decay=1`` and the latest parameters as the anchor this is the corrected penalty of
    Huszar (2018), below 1 online EWC (Schwarz et al. 2018, section 3.2). Tasks weigh equally if
    each diagonal was computed with ``normalize="trace"``.

    Args:
      old: the diagonal of the tasks before, or None for the first task.
      new: the diagonal of the latest task.
      decay: in [0, 1].

    Raises:
      ValueError: ``decay`` is out of range, or the trees differ in paths or shapes.

    >>> merge_fisher({"w": 2.0}, {"w": 1.0}, decay=0.5)
    {'w': Array(2., dtype=float32)}
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay}: give a number from 0 to 1.")
    if old is None:
        return new
    check_same(old, new, names=("old", "new"))
    return add(scale(old, decay), new)


class Consolidated(NamedTuple):
    """What elastic weight consolidation keeps of the tasks so far.

    The penalty is the sum of ``ewc_penalty(params, anchor, fisher)`` over the pairs.

    Attributes:
      anchors: parameters after a task; of every task (``separate``) or of the latest.
      fishers: a diagonal for each anchor.
    """

    anchors: tuple[PyTree, ...]
    fishers: tuple[PyTree, ...]


def consolidate(
    old: Consolidated | None,
    params: PyTree,
    fisher: PyTree,
    *,
    mode: Mode = "sum",
    decay: float = 1.0,
) -> Consolidated:
    """Adds a task to what is consolidated.

    Args:
      old: of the tasks before, or None.
      params: the parameters after the task.
      fisher: the diagonal at ``params`` on its data.
      mode: ``separate``: keep every pair (Kirkpatrick et al. 2017), memory grows with the tasks;
        ``sum``: one anchor, the latest, and the sum of the diagonals (Huszar 2018); ``online``: the
        same with ``decay * old + new`` (Schwarz et al. 2018); ``streaming_ema``:
        ``decay * old + (1 - decay) * new``, for diagonals of batches where no task ends.
      decay: in [0, 1], for ``online`` and ``streaming_ema``.

    Raises:
      ValueError: an unknown mode, or an impossible decay.

    >>> state = consolidate(None, {"w": 1.0}, {"w": 2.0})
    >>> consolidate(state, {"w": 3.0}, {"w": 1.0}, mode="online", decay=0.5)
    Consolidated(anchors=({'w': 3.0},), fishers=({'w': Array(2., dtype=float32)},))
    """
    _check_option("mode", mode, Mode)
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay}: give a number from 0 to 1.")
    if old is None:
        return Consolidated((params,), (fisher,))
    if mode == "separate":
        return Consolidated((*old.anchors, params), (*old.fishers, fisher))
    if len(old.fishers) != 1:
        raise ValueError(f"mode={mode!r} continues one diagonal, not {len(old.fishers)}.")
    if mode == "streaming_ema":
        fisher = scale(fisher, 1 - decay)
    kept = 1.0 if mode == "sum" else decay
    return Consolidated((params,), (merge_fisher(old.fishers[0], fisher, decay=kept),))


def ewc_penalty(params: PyTree, anchor: PyTree, fisher: PyTree) -> Array:
    """Returns ``1/2 sum_i F_i (theta_i - anchor_i)^2``, a float32 scalar.

    Elastic weight consolidation (Kirkpatrick et al. 2017, equation 3) without its strength lambda,
    which the caller multiplies by. Note that several implementations leave the factor 1/2 out.

    Leaves are matched by path. A leaf without Fisher values (a new head, a frozen leaf) adds
    nothing; a leaf that has grown since the anchor is penalised in its old slice.

    Args:
      params: the parameters.
      anchor: the parameters to stay close to.
      fisher: the diagonal at the anchor; None at leaves that are not penalised.

    Raises:
      ValueError: a leaf of ``fisher`` that the other trees lack or have in an impossible shape.

    >>> ewc_penalty({"w": 3.0, "head": 1.0}, {"w": 1.0}, {"w": 2.0})
    Array(4., dtype=float32)
    """
    total = jnp.float32(0)
    for theta, theta_0, f in _matched(params, anchor, fisher).values():
        old = theta[tuple(slice(n) for n in theta_0.shape)]
        total = total + 0.5 * jnp.sum(wide(f) * jnp.square(jnp.abs(wide(old) - wide(theta_0))))
    return total


def ewc_proximal(params: PyTree, anchor: PyTree, fisher: PyTree, strength: Array | float) -> PyTree:
    """Returns the exact minimiser of ``|theta - params|^2 / 2 + strength * ewc_penalty(theta)``.

    ``(params + strength F anchor) / (1 + strength F)``. A step on the penalty that is stable for
    any strength, where plain gradient steps diverge beyond ``strength * max(F) = 2``: take the
    optimiser's step on the task's loss, then this with ``strength = learning_rate * lambda``.

    Args:
      params: the parameters after the step on the task's loss.
      anchor: as for ``ewc_penalty``.
      fisher: as for ``ewc_penalty``.
      strength: a scalar of at least 0.

    >>> ewc_proximal({"w": jnp.float32(3)}, {"w": 1.0}, {"w": 1.0}, 1.0)
    {'w': Array(2., dtype=float32)}
    """
    matched = _matched(params, anchor, fisher)

    def leaf(path: str, x: Array) -> Array:
        if path not in matched:
            return x
        theta, theta_0, f = matched[path]
        old = tuple(slice(n) for n in theta_0.shape)
        pull = strength * wide(f)
        moved = (wide(theta[old]) + pull * wide(theta_0)) / (1 + pull)
        return theta.at[old].set(moved.astype(theta.dtype))

    return map_with_path(leaf, params)


def _matched(
    params: PyTree, anchor: PyTree, fisher: PyTree
) -> dict[str, tuple[Array, Array, Array]]:
    """Returns path -> (parameter, anchor, Fisher) for the leaves of ``fisher``."""
    flat_params, flat_anchor, flat_fisher = (
        {path_str(kp): jnp.asarray(x) for kp, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, anchor, fisher)
    )
    for path, f in flat_fisher.items():
        for name, tree in (("params", flat_params), ("anchor", flat_anchor)):
            if path not in tree:
                near = difflib.get_close_matches(path, tree, n=3) or list(tree)[:3]
                raise ValueError(
                    f"{name} has no leaf {path!r}, which fisher has. Nearest: {', '.join(near)}."
                )
        old, now = flat_anchor[path].shape, flat_params[path].shape
        if f.shape != old or len(old) != len(now) or any(a > b for a, b in zip(old, now)):
            raise ValueError(
                f"shapes at {path!r}: fisher {f.shape}, anchor {old}, params {now}; fisher and "
                "anchor must agree, and params be as large or larger along each axis."
            )
    return {p: (flat_params[p], flat_anchor[p], f) for p, f in flat_fisher.items()}


class KroneckerBlock(NamedTuple):
    """The Fisher information of one dense layer, approximated by ``a`` kron ``g``.

    Attributes:
      a: [in, in], float32, second moment of the layer's inputs (with a 1 appended for a bias).
      g: [out, out], float32, second moment of the gradient in its pre-activations.
    """

    a: Array
    g: Array


def kfac_blocks(
    tapped: Callable[[PyTree, Mapping[str, Array], Batch], tuple[Array, Mapping[str, Array]]],
    params: PyTree,
    batches: Iterable[Batch] | Batch,
    taps: Mapping[str, int],
    *,
    kind: Kind = "exact",
    num_samples: int = 1,
    key: Array | None = None,
    mask: Array | Callable[[Batch], Array] | None = None,
    likelihood: Likelihood = "categorical",
) -> dict[str, KroneckerBlock]:
    """Returns Kronecker-factored Fisher blocks of dense layers (Martens and Grosse 2015).

    The structured alternative to the diagonal: ``F(W) ~ E[a a^T] kron E[g g^T]`` for a layer with
    inputs ``a`` and gradient ``g`` of the log-likelihood in its pre-activations.

    Args:
      tapped: ``f(params, taps, batch)``, which adds ``taps[name]`` to the pre-activations of the
        dense layer of that name (so that the gradient in the tap is g), and returns the output
        that ``fisher_diagonal`` wants, and the inputs of each layer, name -> [B, in]. Append a
        column of ones to the inputs to cover the bias.
      params: any pytree.
      batches: as for ``fisher_diagonal``.
      taps: name -> number of outputs of the layer.
      kind: as for ``fisher_diagonal``, but not ``batched``.
      num_samples: as for ``fisher_diagonal``.
      key: as for ``fisher_diagonal``.
      mask: as for ``fisher_diagonal``.
      likelihood: as for ``fisher_diagonal``.

    Returns:
      Layer name -> ``KroneckerBlock``. The diagonal of a block is ``outer(diag(a), diag(g))``, in
      the layout [in, out].

    >>> def tapped(params, taps, batch):
    ...     return batch["inputs"] @ params["w"] + taps["w"], {"w": batch["inputs"]}
    >>> params, batch = {"w": jnp.zeros((1, 2))}, {"inputs": jnp.array([[1.0], [3.0]])}
    >>> kfac_blocks(tapped, params, batch, {"w": 2})["w"].a
    Array([[5.]], dtype=float32)
    """
    _check_option("kind", kind, Literal["exact", "mc", "empirical", "argmax"])
    _check_option("likelihood", likelihood, Likelihood)
    if kind == "mc" and key is None:
        raise ValueError("kind='mc' draws labels: give key=jax.random.key(...).")
    key = jax.random.key(0) if key is None else key
    options = _Options(tapped, kind, likelihood, num_samples, 1)
    total, weight, seen = None, jnp.float32(0), _zero_beside(params)
    for batch, weights in _batches(batches, mask):
        zeros = {name: jnp.zeros((weights.shape[0], n)) for name, n in taps.items()}
        blocks, counted, real = _batch_blocks(options, params, zeros, batch, weights, key, seen)
        total = blocks if total is None else _add_to(total, blocks)
        weight, seen = weight + counted, seen + real
    if total is None:
        raise ValueError("no examples: batches is empty.")
    return jax.tree.map(lambda x: x / weight, total)


@functools.partial(jax.jit, static_argnums=0)
def _batch_blocks(
    options: _Options,
    params: PyTree,
    taps: dict[str, Array],
    batch: Batch,
    weights: Array,
    key: Array,
    seen: Array,
) -> tuple[dict[str, KroneckerBlock], Array, Array]:
    """Returns weighted sums of ``a a^T`` and ``g g^T`` over a batch, as ``_batch_squares`` does."""
    size, real = weights.shape[0], weights > 0
    first = jnp.argmax(real)
    batch = jax.tree.map(
        lambda x: jnp.where(expand(real, jnp.ndim(x)), x, jnp.asarray(x)[first]), batch
    )
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        key, seen + jnp.cumsum(real, dtype=jnp.int32) - 1
    )

    def outputs(t: dict[str, Array]) -> tuple[Array, Mapping[str, Array]]:
        kept: dict[str, Any] = {}

        def function(p: PyTree, b: Batch) -> Array:
            out, kept["inputs"] = options.function(p, t, b)
            return out

        return _outputs(options._replace(function=function), params, batch, size), kept["inputs"]

    out, pull_back, inputs = jax.vjp(outputs, taps, has_aux=True)
    if set(inputs) != set(taps):
        raise ValueError(f"the function returned inputs of {sorted(inputs)}, not {sorted(taps)}.")

    # Rows are independent, so one backward pass gives every row's gradient at once.
    if options.kind == "empirical":
        num = 1
    else:
        num = _scores(options, out[0], keys[0])[0]

    def second_moments(i: Array) -> dict[str, Array]:
        if options.kind == "empirical":
            cotangents, w = jnp.ones_like(out), weights
        else:
            cotangents, score_weights = jax.vmap(
                lambda o, k: _scores(options, o, k)[1](i), out_axes=0
            )(out, keys)
            w = weights * score_weights
        g = pull_back(cotangents)[0]
        return {name: _second_moment(x, w) for name, x in g.items()}

    def accumulate(sums: Any, i: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, second_moments(i)), None

    zeros = {name: jnp.zeros((x.shape[-1],) * 2) for name, x in taps.items()}
    g_moments = jax.lax.scan(accumulate, zeros, jnp.arange(num))[0]
    blocks = {
        name: KroneckerBlock(_second_moment(inputs[name], weights), g_moments[name])
        for name in taps
    }
    return blocks, weights.sum(), real.sum(dtype=jnp.int32)


def _second_moment(x: Array, weights: Array) -> Array:
    """Returns ``sum_n weights_n x_n x_n^T`` for ``x`` [B, d]."""
    x = wide(x)
    return jnp.einsum("n,ni,nj->ij", weights, x, x, precision="highest")


def merge_kronecker(first: KroneckerBlock, second: KroneckerBlock) -> KroneckerBlock:
    """Returns the Kronecker product nearest to the sum of two (Van Loan and Pitsianis 1993).

    The sum of Kronecker products is none, so blocks of several tasks are added approximately: this
    is the best one in the Frobenius norm, and exact where either factor is proportional. Both
    factors of the result are positive semi-definite if those given are.

    Args:
      first: a block.
      second: a block of the same layer.

    >>> block = KroneckerBlock(a=jnp.eye(2), g=jnp.eye(3))
    >>> merged = merge_kronecker(block, block)
    >>> float(jnp.kron(merged.a, merged.g)[0, 0].round(4))
    2.0
    """

    def basis(x: Array, y: Array) -> tuple[Array, Array]:
        return jnp.linalg.qr(jnp.stack([wide(x).ravel(), wide(y).ravel()], axis=1))

    # Rearranged, the sum is a matrix of rank 2, and Kronecker products are those of rank 1.
    (q_a, r_a), (q_g, r_g) = basis(first.a, second.a), basis(first.g, second.g)
    u, s, v = jnp.linalg.svd(r_a @ r_g.T)
    a = (q_a @ u[:, 0]).reshape(first.a.shape)
    g = (q_g @ v[0]).reshape(first.g.shape)
    size = jnp.sqrt(s[0]) * jnp.where(jnp.trace(a) < 0, -1.0, 1.0)
    return KroneckerBlock(size * a, size * g)


def kfac_penalty(changes: Mapping[str, Array], blocks: Mapping[str, KroneckerBlock]) -> Array:
    """Returns ``1/2 sum_layers <dW, a dW g>``, a float32 scalar.

    Args:
      changes: layer name -> change of its kernel since the anchor, [in, out] (with the bias as a
        last row, if the inputs had a column of ones).
      blocks: from ``kfac_blocks``.

    >>> block = KroneckerBlock(a=jnp.eye(2), g=2 * jnp.eye(3))
    >>> kfac_penalty({"w": jnp.ones((2, 3))}, {"w": block})
    Array(6., dtype=float32)
    """
    total = jnp.float32(0)
    for name, block in blocks.items():
        if name not in changes:
            raise ValueError(f"no change for layer {name!r}; there are {', '.join(changes)}.")
        change = wide(changes[name])
        total = total + 0.5 * jnp.sum(change * (block.a @ change @ block.g))
    return total
