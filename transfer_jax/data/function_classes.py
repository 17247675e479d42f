"""Prompts of in-context learning: examples of a hidden function, drawn on the device.

A prompt is ``x_1, y_1, ..., x_n, y_n``, 2n vectors of d coordinates. In the classes of Garg et al.
(2022, arXiv 2208.01066) the x are independent and ``y_i = f(x_i)`` is a number, widened to
``(y_i, 0, ..., 0)``. In the sequential classes (arXiv 2312.12655) the hidden functions make the x
themselves, through a sliding window of the last w vectors,

    s_t = sum_{i < w} f_i(x_{t-1-i}),    x_t = s_t / ||s_t||,    y_t = x_{t+1},

where ``x_1 ~ N(0, I)`` and terms before the first vector are dropped.

A prompt is a pure function of two keys, one of its function and one of the rest, so that several
prompts can have one function; ``FunctionClass`` says how. Nothing here reads the host.
"""

import dataclasses
import difflib
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any

INDEPENDENT = (
    "linear", "sparse_linear", "noisy_linear", "classification", "quadratic", "relu_2nn", "tree"
)  # fmt: skip
SEQUENTIAL = ("seq_relu_2nn", "seq_rec_linear", "seq_linear")
LINEAR_INITS = ("gaussian", "orthogonal", "authors")
INPUTS = ("gaussian", "half_subspace", "skewed")
QUERIES = ("same", "fresh", "quadrants", "orthogonal", "overlapping")
MAX_WINDOW = 4

# Shorter sums than this are no direction: all ReLUs of the window are dead.
_SHORTEST = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionClass:
    """A distribution of prompts.

    Attributes:
      name: one of ``INDEPENDENT`` or ``SEQUENTIAL``.
      dims: d.
      points: n, examples in a prompt.
      window: w in 1 .. 4, for ``seq_relu_2nn`` and ``seq_rec_linear``.
      tie_window: one function at all places of the window, as the published code has by a slip.
      hidden: h, width of the ReLU networks.
      depth: of the trees.
      sparsity: coordinates that count in ``sparse_linear``.
      noise: standard deviation of the label noise of ``noisy_linear``, whose labels are then scaled
        back to variance d.
      linear_init: of the sequential linear maps: 'gaussian' N(0, 1/d), 'orthogonal', or 'authors',
        ``E diag(l) E'`` of the real parts of the eigenvalues and eigenvectors of a Gaussian matrix
        with l clipped (no spectral reconstruction: E is not orthogonal). The last one needs a
        backend with ``jnp.linalg.eig``.
      pool: the number of different functions; 0 = a new one every time.
      pool_seed: of the pool.
      inputs: the independent x: 'gaussian'; in a random 'half_subspace'; 'skewed', with standard
        deviations falling as 1/i along random axes. All have E ||x||^2 = d.
      query: what stands at the position that is asked: 'same' as in the prompt; or, with one prompt
        for every position, whose context is that of the first: a 'fresh' unit vector in place of
        the sequence's own (sequential classes), 'quadrants' (the context in a random orthant, the
        query in any), 'orthogonal' to the context (only the first d positions count), or
        'overlapping', one of the context's x.
      scale_x, scale_y: factors of the independent x and of their y.

    Raises:
      ValueError: an unknown name, or options that do not belong together.
    """

    name: str
    dims: int
    points: int
    window: int = 1
    tie_window: bool = False
    hidden: int = 100
    depth: int = 4
    sparsity: int = 3
    noise: float = 1.0
    linear_init: str = "gaussian"
    pool: int = 0
    pool_seed: int = 0
    inputs: str = "gaussian"
    query: str = "same"
    scale_x: float = 1.0
    scale_y: float = 1.0

    def __post_init__(self):
        names = (*INDEPENDENT, *SEQUENTIAL)
        for field, allowed in (
            ("name", names), ("linear_init", LINEAR_INITS), ("inputs", INPUTS), ("query", QUERIES)
        ):  # fmt: skip
            value = getattr(self, field)
            if value not in allowed:
                near = difflib.get_close_matches(value, allowed, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"{field}={value!r}: {hint}choose one of {', '.join(allowed)}")
        if self.dims < 1 or self.points < 1:
            raise ValueError(f"dims={self.dims} and points={self.points} must be at least 1")
        windowed = self.name in ("seq_relu_2nn", "seq_rec_linear")
        if not 1 <= self.window <= (MAX_WINDOW if windowed else 1):
            raise ValueError(
                f"window={self.window}: {self.name} takes "
                + (f"1 to {MAX_WINDOW}" if windowed else "no other than 1")
            )
        if self.name == "sparse_linear" and self.sparsity > self.dims:
            raise ValueError(f"sparsity={self.sparsity} of dims={self.dims} coordinates")
        changed = self.inputs != "gaussian" or (self.scale_x, self.scale_y) != (1.0, 1.0)
        if self.sequential and (changed or self.query not in ("same", "fresh")):
            raise ValueError(
                f"{self.name} makes its own inputs: inputs, scale_x and scale_y are for "
                "independent ones, and query is 'same' or 'fresh'"
            )
        if not self.sequential and self.query == "fresh":
            raise ValueError(f"the inputs of {self.name} are fresh already; query='same'")

    def __call__(self, keys: Array, settings: dict[str, Array]) -> dict[str, Array]:
        """As ``draw_prompt``."""
        return draw_prompt(self, keys, settings)

    @property
    def sequential(self) -> bool:
        """Whether the functions make the x too; y is then a vector."""
        return self.name in SEQUENTIAL

    @property
    def normalised(self) -> bool:
        """Whether the targets are unit vectors."""
        return self.name in ("seq_relu_2nn", "seq_rec_linear")


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """Narrow and short prompts first: ``min(end, start + increment * (step // every))``.

    A schedule for ``objectives.Generated``; the ends are those of the settings.

    Attributes:
      dims: (start, increment), non-zero coordinates of the x.
      points: (start, increment), examples that count.
      every: steps.
    """

    dims: tuple[int, int]
    points: tuple[int, int]
    every: int

    def __call__(self, settings: dict[str, Array], step: Array) -> dict[str, Array]:
        stages = step // self.every
        now = {
            name: jnp.minimum(settings[name], start + increment * stages)
            for name, (start, increment) in (("dims", self.dims), ("points", self.points))
        }
        return {**settings, **now}


def settings(
    task: FunctionClass, *, dims: int = 0, random_x: int = 0, random_y: int = 0
) -> dict[str, Array]:
    """Returns what may change between prompts of one program, int32 scalars.

    Args:
      task: the class.
      dims: non-zero coordinates of the independent x, or of x_1; 0 = all.
      random_x: so many first x are replaced by U[0, 1) vectors.
      random_y: so many first y are replaced by U[0, 1) values. Targets stay as they are.
    """
    values = {
        "dims": dims or task.dims, "points": task.points, "random_x": random_x, "random_y": random_y
    }  # fmt: skip
    return {name: jnp.int32(value) for name, value in values.items()}


# -- functions ------------------------------------------------------------------------------------


def draw_function(task: FunctionClass, key: Array) -> PyTree:
    """Draws a function, or the w functions of a window with a leading axis."""
    if task.pool:
        number = jax.random.randint(key, (), 0, task.pool)
        key = jax.random.fold_in(jax.random.key(task.pool_seed), number)
    if not task.sequential:
        return _draw_scalar(task, key)
    keys = jax.random.split(key, task.window)
    if task.tie_window:
        keys = jnp.broadcast_to(keys[:1], keys.shape)
    return jax.vmap(lambda key: _draw_vector(task, key))(keys)


def _draw_scalar(task: FunctionClass, key: Array) -> PyTree:
    d, first, second = task.dims, *jax.random.split(key)
    if task.name == "relu_2nn":
        return {
            "w1": jax.random.normal(first, (d, task.hidden)),
            "w2": jax.random.normal(second, (task.hidden,)),
        }
    if task.name == "tree":
        nodes = 2**task.depth
        return {
            "coordinate": jax.random.randint(first, (nodes - 1,), 0, d),
            "leaf": jax.random.normal(second, (nodes,)),
        }
    w = jax.random.normal(first, (d,))
    if task.name == "sparse_linear":
        w = w * (jax.random.permutation(second, d) < task.sparsity)
    return {"w": w}


def _draw_vector(task: FunctionClass, key: Array) -> PyTree:
    d, first, second = task.dims, *jax.random.split(key)
    if task.name == "seq_relu_2nn":
        return {
            "w1": jax.random.normal(first, (d, task.hidden)),
            "w2": jax.random.normal(second, (task.hidden, d)),
        }
    if task.linear_init == "orthogonal":
        return {"w": jax.random.orthogonal(first, d)}
    w = jax.random.normal(first, (d, d))
    if task.linear_init == "gaussian":
        return {"w": w / jnp.sqrt(d)}
    limit = 0.8 if task.name == "seq_linear" else 1.0
    values, vectors = (part.real for part in jnp.linalg.eig(w))
    w = (vectors * jnp.clip(values, -limit, limit)) @ vectors.T
    return {"w": w if task.name == "seq_linear" else jnp.clip(w, -0.5, 0.5)}


def _relu_network(function: PyTree, x: Array) -> Array:
    hidden = function["w1"].shape[-1]
    return jnp.sqrt(2 / hidden) * (jax.nn.relu(x @ function["w1"]) @ function["w2"])


def evaluate(task: FunctionClass, function: PyTree, x: Array) -> Array:
    """Applies a function of an independent class: [..., d] to [...], without noise."""
    if task.name == "relu_2nn":
        y = _relu_network(function, x)
    elif task.name == "tree":
        node = jnp.zeros(x.shape[:-1], jnp.int32)
        for _ in range(task.depth):
            coordinate = function["coordinate"][node]
            positive = jnp.take_along_axis(x, coordinate[..., None], axis=-1)[..., 0] > 0
            node = 2 * node + 1 + positive
        y = function["leaf"][node - (2**task.depth - 1)]
    elif task.name == "quadratic":
        y = jnp.square(x) @ function["w"] / jnp.sqrt(3.0)
    else:
        y = x @ function["w"]
    y = task.scale_y * y
    return jnp.sign(y) if task.name == "classification" else y


def follow(task: FunctionClass, functions: PyTree, window: Array) -> tuple[Array, Array]:
    """The vector after a window.

    Args:
      task: a sequential class.
      functions: of ``draw_function``.
      window: [w, d], the newest first; zeros before the first vector, which the functions (without
        biases) map to zeros.

    Returns:
      The next vector [d] and whether there is one, bool: it is zero and False where all ReLUs are
      dead. (Of k weight pairs that see a non-zero vector, that happens with probability 2^(-k h);
      x_2 has only one. Divided by its length, it would be NaN.)
    """
    if task.name == "seq_relu_2nn":
        total = jax.vmap(_relu_network)(functions, window).sum(0)
    else:
        total = jnp.einsum("wd,wde->e", window, functions["w"])
    if not task.normalised:
        return total, jnp.bool_(True)
    length = jnp.linalg.norm(total)
    alive = length > _SHORTEST
    return jnp.where(alive, total / jnp.where(alive, length, 1.0), 0.0), alive


def trajectory(task: FunctionClass, functions: PyTree, first: Array) -> tuple[Array, Array, Array]:
    """Follows the functions from x_1.

    Args:
      task: a sequential class.
      functions: of ``draw_function``.
      first: [d], x_1.

    Returns:
      x_1 .. x_n and x_2 .. x_{n+1}, both [n, d], and whether all of them exist, bool.
    """

    def step(window: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        following, alive = follow(task, functions, window)
        return jnp.concatenate([following[None], window[:-1]]), (following, alive)

    window = jnp.zeros((task.window, task.dims)).at[0].set(first)
    _, (ys, alive) = jax.lax.scan(step, window, None, length=task.points)
    return jnp.concatenate([first[None], ys[:-1]]), ys, alive.all()


# -- prompts --------------------------------------------------------------------------------------


def interleave(xs: Array, ys: Array) -> Array:
    """Stacks [..., n, d] and [..., n, d] (or [..., n], widened by zeros) to [..., 2n, d]."""
    if ys.ndim < xs.ndim:
        ys = jnp.zeros_like(xs).at[..., 0].set(ys)
    pairs = jnp.stack([xs, ys], axis=-2)
    return pairs.reshape(*xs.shape[:-2], 2 * xs.shape[-2], xs.shape[-1])


def draw_prompt(task: FunctionClass, keys: Array, settings: dict[str, Array]) -> dict[str, Array]:
    """Draws one prompt.

    Args:
      task: the class.
      keys: [2] typed keys, of the function and of everything else.
      settings: see ``settings``.

    Returns:
      ``inputs`` [2n, d], or [n, 2n, d] with one prompt for each queried position; ``labels`` [n] or
      [n, d], the true y at every position; ``weights`` [n], 1 where a position counts: within
      ``settings["points"]``, and in no prompt with dead ReLUs; ``dead``, 1 for such a prompt;
      ``xs`` [n, d] and ``ys`` [n] or [n, d], the context before anything is randomised; ``queries``
      [n, d], the x that are asked. All float32.
    """
    function = draw_function(task, keys[0])
    keys = jax.random.split(keys[1], 5)
    active = jnp.arange(task.dims) < settings["dims"]
    weights = jnp.ones(task.points)
    alive = jnp.bool_(True)
    if task.sequential:
        first = jax.random.normal(keys[0], (task.dims,)) * active
        xs, ys, alive = trajectory(task, function, first)
        queries, labels = xs, ys
        if task.query == "fresh":
            queries = _unit_vectors(keys[1], xs.shape)
            labels, counts = jax.vmap(lambda w: follow(task, function, w))(
                windows(xs, task.window).at[:, 0].set(queries)
            )
            weights = weights * counts
    else:
        xs = _independent_inputs(task, keys[0], active)
        xs, queries, weights = _queries(task, keys[1], xs)
        ys, labels = _labels(task, function, keys[2], xs, queries)

    in_points = jnp.arange(task.points) < settings["points"]
    weights = weights * in_points * alive
    position = jnp.arange(task.points)
    random_x = jax.random.uniform(keys[3], xs.shape)
    random_y = jax.random.uniform(keys[4], ys.shape)
    shown_y = jnp.where(_column(position < settings["random_y"], ys), random_y, ys)
    corrupted = _column(position < settings["random_x"], xs)
    shown_x = jnp.where(corrupted, random_x, xs)
    if task.query == "same":
        inputs = interleave(shown_x, shown_y)
    else:
        asked = jnp.eye(task.points, dtype=bool)[..., None]
        inputs = interleave(
            jnp.where(asked, queries, shown_x), jnp.broadcast_to(shown_y, (task.points, *ys.shape))
        )
    return {
        "inputs": inputs, "labels": labels, "weights": weights, "xs": xs, "ys": ys,
        "queries": queries, "dead": 1.0 - alive,
    }  # fmt: skip


def windows(xs: Array, size: int) -> Array:
    """``[x_t, x_{t-1}, ...]`` at every t, zeros before the first: [n, d] to [n, size, d]."""
    padded = jnp.concatenate([jnp.zeros((size - 1, xs.shape[1])), xs])
    count = xs.shape[0]
    return jnp.stack([padded[size - 1 - i : size - 1 - i + count] for i in range(size)], axis=1)


def _column(mask: Array, values: Array) -> Array:
    return mask.reshape(mask.shape + (1,) * (values.ndim - 1))


def _unit_vectors(key: Array, shape: tuple[int, ...]) -> Array:
    x = jax.random.normal(key, shape)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _independent_inputs(task: FunctionClass, key: Array, active: Array) -> Array:
    gaussian, axes = jax.random.split(key)
    xs = jax.random.normal(gaussian, (task.points, task.dims))
    if task.inputs != "gaussian":
        deviations = 1.0 / (jnp.arange(task.dims) + 1)
        if task.inputs == "half_subspace":
            deviations = (jnp.arange(task.dims) < max(task.dims // 2, 1)).astype(jnp.float32)
        deviations = deviations * jnp.sqrt(task.dims / jnp.square(deviations).sum())
        turn = jax.random.orthogonal(axes, task.dims)
        xs = xs @ ((turn * deviations) @ turn.T)
    return task.scale_x * xs * active


def _queries(task: FunctionClass, key: Array, xs: Array) -> tuple[Array, Array, Array]:
    """The context, the x that are asked, and which positions count."""
    everywhere = jnp.ones(task.points)
    if task.query == "quadrants":
        orthant = jnp.sign(jax.random.normal(key, (task.dims,)))
        return jnp.abs(xs) * orthant, xs, everywhere
    if task.query == "orthogonal":
        # Column i of Q is x_i without its part in the span of x_1 .. x_{i-1}.
        q, r = jnp.linalg.qr(xs.T)
        count = min(task.points, task.dims)
        lengths = jnp.linalg.norm(xs, axis=-1)[:count] * jnp.sign(jnp.diagonal(r))
        queries = jnp.zeros_like(xs).at[:count].set(lengths[:, None] * q.T[:count])
        return xs, queries, (jnp.arange(task.points) < task.dims).astype(jnp.float32)
    if task.query == "overlapping":
        before = jnp.maximum(jnp.arange(task.points), 1)
        return xs, xs[jax.random.randint(key, (task.points,), 0, before)], everywhere
    return xs, xs, everywhere


def _labels(
    task: FunctionClass, function: PyTree, key: Array, xs: Array, queries: Array
) -> tuple[Array, Array]:
    ys, labels = evaluate(task, function, xs), evaluate(task, function, queries)
    if task.name != "noisy_linear":
        return ys, labels
    # One noise for both: where the prompt's own x is asked, the target is the prompt's own y.
    noise = task.noise * jax.random.normal(key, ys.shape)
    scale = jnp.sqrt(task.dims / (task.dims + task.noise**2))
    return scale * (ys + noise), scale * (labels + noise)
