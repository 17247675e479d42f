"""Classic tasks for recurrent networks, made on the device.

Each task is a frozen dataclass that is called as ``task(key, settings) -> example``, the form that
``objectives.Generated`` takes: an example is a pure function of its key, all shapes are static, and
equal tasks are one static argument. ``settings`` is not used. Per-step ``labels`` come with
``weights`` [T] float32, 1 where a step counts.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Example = dict[str, Array]


def _at_least(name: str, value: int, smallest: int) -> None:
    if value < smallest:
        raise ValueError(f"{name}={value} is too small: the task needs at least {smallest}.")


@dataclasses.dataclass(frozen=True)
class Adding:
    """The sum of two marked numbers in a stream (Hochreiter and Schmidhuber 1997, experiment 4).

    ``inputs`` [T, 2] float32: numbers uniform in [0, 1), and marks, one in each half; ``labels``
    [1] float32. The best constant, 1, has mean squared error 1/6.

    Attributes:
      length: T.
    """

    length: int = 100

    def __post_init__(self):
        _at_least("length", self.length, 2)

    def __call__(self, key: Array, settings: Any = None) -> Example:
        keys = jax.random.split(key, 3)
        half = self.length // 2
        values = jax.random.uniform(keys[0], (self.length,))
        first = jax.random.randint(keys[1], (), 0, half)
        second = jax.random.randint(keys[2], (), half, self.length)
        steps = jnp.arange(self.length)
        marks = ((steps == first) | (steps == second)).astype(jnp.float32)
        labels = (values * marks).sum(keepdims=True)
        return {"inputs": jnp.stack([values, marks], axis=-1), "labels": labels}


@dataclasses.dataclass(frozen=True)
class Copy:
    """Say a sequence of bits again after its end (Graves et al. 2014, section 4.1).

    ``inputs`` [2 N + 1, D + 1] float32: n vectors of D bits, n uniform in ``shortest`` .. N, then
    the end mark in channel D, then n steps of zeros; ``lengths`` = 2 n + 1. ``labels``
    [2 N + 1, D] float32: the bits in the last n steps, which alone have weight.

    Attributes:
      longest: N.
      shortest: smallest n.
      width: D.
    """

    longest: int = 20
    shortest: int = 1
    width: int = 8

    def __post_init__(self):
        _at_least("shortest", self.shortest, 1)
        _at_least("longest", self.longest, self.shortest)

    def __call__(self, key: Array, settings: Any = None) -> Example:
        keys = jax.random.split(key)
        n = jax.random.randint(keys[0], (), self.shortest, self.longest + 1)
        bits = jax.random.bernoulli(keys[1], 0.5, (self.longest, self.width)).astype(jnp.float32)
        bits = bits * (jnp.arange(self.longest) < n)[:, None]
        steps = jnp.arange(2 * self.longest + 1)
        shown = jnp.pad(bits, ((0, self.longest + 1), (0, 0)))
        end = (steps == n).astype(jnp.float32)[:, None]
        said = (steps > n) & (steps <= 2 * n)
        labels = jnp.where(said[:, None], bits[jnp.clip(steps - n - 1, 0, self.longest - 1)], 0.0)
        return {
            "inputs": jnp.concatenate([shown, end], axis=-1),
            "labels": labels,
            "weights": said.astype(jnp.float32),
            "lengths": (2 * n + 1).astype(jnp.int32),
        }


@dataclasses.dataclass(frozen=True)
class TemporalOrder:
    """In which order did two symbols come? (Hochreiter and Schmidhuber 1997, experiment 6a).

    ``inputs`` [T] int32: distractors 2 .. 5, and at one step of the second tenth and one of the
    fifth tenth (Pascanu et al. 2013) a 0 or a 1; ``labels`` int32, twice the first of these plus
    the second.

    Attributes:
      length: T.
    """

    length: int = 100
    vocab_size = 6

    def __post_init__(self):
        _at_least("length", self.length, 10)

    def __call__(self, key: Array, settings: Any = None) -> Example:
        keys = jax.random.split(key, 4)
        tokens = jax.random.randint(keys[0], (self.length,), 2, self.vocab_size)
        symbols = jax.random.randint(keys[1], (2,), 0, 2)
        tenth = self.length // 10
        for i, (start, key) in enumerate(((1, keys[2]), (4, keys[3]))):
            place = jax.random.randint(key, (), start * tenth, (start + 1) * tenth)
            tokens = tokens.at[place].set(symbols[i])
        return {"inputs": tokens, "labels": 2 * symbols[0] + symbols[1]}


@dataclasses.dataclass(frozen=True)
class Parity:
    """Is the number of ones odd? ``inputs`` [T, 1] float32 bits, ``labels`` int32.

    Attributes:
      length: T.
    """

    length: int = 50

    def __call__(self, key: Array, settings: Any = None) -> Example:
        bits = jax.random.bernoulli(key, 0.5, (self.length,)).astype(jnp.int32)
        return {"inputs": bits[:, None].astype(jnp.float32), "labels": bits.sum() % 2}


@dataclasses.dataclass(frozen=True)
class DelayedXor:
    """Each bit XOR the one ``delay`` steps later, which only a look ahead can know.

    ``inputs`` [T, 1] float32 bits; ``labels`` [T] int32, ``x_t XOR x_{t + delay}``; ``weights``
    [T], 0 in the last ``delay`` steps. Without the future every guess is right half the time.

    Attributes:
      length: T.
      delay: steps; negative = the past.
    """

    length: int = 40
    delay: int = 5

    def __post_init__(self):
        _at_least("length", self.length, abs(self.delay) + 1)

    def __call__(self, key: Array, settings: Any = None) -> Example:
        bits = jax.random.bernoulli(key, 0.5, (self.length,)).astype(jnp.int32)
        other = jnp.arange(self.length) + self.delay
        known = (other >= 0) & (other < self.length)
        labels = jnp.where(known, bits ^ jnp.roll(bits, -self.delay), 0)
        return {
            "inputs": bits[:, None].astype(jnp.float32),
            "labels": labels,
            "weights": known.astype(jnp.float32),
        }


# The Reber grammar (Reber 1967): from each state two arcs (symbol, next state), the last state has
# one. ``_TO_END`` counts the symbols still needed, E included.
REBER_SYMBOLS = "BTPSXVE"
_B, _T, _P, _S, _X, _V, _E = range(7)
_ARCS = np.array(
    [
        [[_T, 1], [_P, 2]],
        [[_S, 1], [_X, 3]],
        [[_T, 2], [_V, 4]],
        [[_X, 2], [_S, 5]],
        [[_P, 3], [_V, 5]],
        [[_E, 6], [_E, 6]],
        [[_E, 6], [_E, 6]],
    ]
)
_TO_END = np.array([4, 3, 3, 2, 2, 1, 0])


def _next_symbols() -> np.ndarray:
    """Which symbols may follow in each state, bool [7, 7]."""
    allowed = np.zeros((len(_ARCS), len(REBER_SYMBOLS)), bool)
    for state, arcs in enumerate(_ARCS[:-1]):
        allowed[state, arcs[:, 0]] = True
    return allowed


@dataclasses.dataclass(frozen=True)
class Reber:
    """Strings of the embedded Reber grammar (Hochreiter and Schmidhuber 1997, experiment 1).

    ``B (T|P) B ... E (the same T|P) E`` around a string of the Reber grammar: the last symbol but
    one must be remembered from the second. ``inputs`` [L] int32, positions in ``REBER_SYMBOLS``,
    0 beyond ``lengths``; ``labels`` [L, 7] float32, 1 for each symbol that may come next;
    ``weights`` [L], 0 from the last symbol on.

    Arcs are equally likely, until only the shortest way to the end still fits.

    Attributes:
      longest: L, at least 9.
    """

    longest: int = 30
    vocab_size = len(REBER_SYMBOLS)

    def __post_init__(self):
        _at_least("longest", self.longest, 9)

    def __call__(self, key: Array, settings: Any = None) -> Example:
        keys = jax.random.split(key)
        arcs, to_end = jnp.asarray(_ARCS, jnp.int32), jnp.asarray(_TO_END)
        inner = self.longest - 5  # without B, T or P and B before, T or P and E after

        def walk(state: Array, step: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
            choice, left = step
            following = arcs[state, :, 1]
            shortest = jnp.argmin(to_end[following])
            fits = to_end[following[choice]] < left
            symbol, after = arcs[state, jnp.where(fits, choice, shortest)]
            return after, (symbol, state)

        choices = jax.random.randint(keys[0], (inner,), 0, 2)
        _, (symbols, states) = jax.lax.scan(
            walk, jnp.int32(0), (choices, inner - jnp.arange(inner))
        )
        count = (states < 6).sum()  # symbols up to E
        outer = jnp.where(jax.random.bernoulli(keys[1]), _T, _P)

        one = jnp.eye(self.vocab_size)
        position = jnp.arange(self.longest)
        inside = jnp.clip(position - 3, 0, inner - 1)
        tokens = jnp.where(position < 3 + count, symbols[inside], _E)
        tokens = jnp.where(position == 3 + count, outer, tokens)
        tokens = jnp.where((position == 0) | (position == 2), _B, tokens)
        tokens = jnp.where(position == 1, outer, tokens)
        length = count + 5
        # What may follow the symbol at each position.
        state = states[jnp.clip(position - 2, 0, inner - 1)]
        labels = jnp.asarray(_next_symbols(), jnp.float32)[state]
        labels = jnp.where((position == 0)[:, None], one[_T] + one[_P], labels)
        labels = jnp.where((position == 1)[:, None], one[_B], labels)
        labels = jnp.where((position == 2 + count)[:, None], one[outer], labels)
        labels = jnp.where((position == 3 + count)[:, None], one[_E], labels)
        counts = position < length - 1
        return {
            "inputs": jnp.where(position < length, tokens, 0).astype(jnp.int32),
            "labels": jnp.where(counts[:, None], labels, 0.0),
            "weights": counts.astype(jnp.float32),
            "lengths": length.astype(jnp.int32),
        }
