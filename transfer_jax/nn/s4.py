"""The structured state space sequence layer (S4) and its diagonal variant (S4D).

Gu, Goel and Re (2021), "Efficiently Modeling Long Sequences with Structured State Spaces". The
layer is trained as a long convolution and generates as a recurrence; both, and convolution in
chunks with a carried state, are methods of one module and agree.

Parameters are stored real (complex ones with real and imaginary part in a last axis of size 2).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from transfer_jax.ops import fft_convolve, hippo, ssm

Array = jax.Array

# Parameters that the paper trains with a small learning rate and without weight decay.
SSM_PARAMETERS = r"(^|/)ssm/(log_dt|lambda_re|lambda_im|a|b|p|q)$"

_CHOICES: dict[str, tuple[str, ...]] = {
    "kernel": ("dplr", "diag", "dense", "free"),
    "real_transform": ("exp", "none", "relu", "clip"),
    "dt_transform": ("exp", "softplus"),
    "discretisation": ("bilinear", "zoh"),
}
_INITS: dict[str, tuple[str, ...]] = {
    "dplr": (*hippo.MEASURES, "random_nplr"),
    "diag": ("lin", "inv", "real", "legs-diag"),
    "dense": (*hippo.MEASURES, "random_nplr", "random_dense"),
    "free": ("normal",),
}
_SMALLEST_DECAY = 1e-4  # some measures have Re(lambda) = 0, which no transform can represent


def _as_complex(x: Array) -> Array:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return lax.complex(x[..., 0], x[..., 1])


def _as_real(x: Any) -> np.ndarray:
    return np.stack([np.real(x), np.imag(x)], axis=-1).astype(np.float32)


@functools.cache
def _initial_nplr(
    name: str, size: int, rank: int | None, copies: int, seed: int
) -> tuple[hippo.NPLR, ...]:
    """One NPLR system per copy."""
    if name == "random_nplr":
        rng = np.random.default_rng(seed)
        return tuple(hippo.random_nplr(size, rank or 1, rng) for _ in range(copies))
    system = hippo.measure(name, size)
    natural = len(system.p)
    rank = natural if rank is None else rank
    if rank < natural:
        raise ValueError(f"a_init={name!r} has a correction of rank {natural}, got rank={rank}")
    p = np.concatenate([system.p, np.zeros((rank - natural, size))])
    return (system._replace(p=p),) * copies


@functools.cache
def _initial_modes(
    name: str, size: int, rank: int | None, copies: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lambda [S, n], B [S, n] and P [R, S, n]; cached, since every trace sets modules up anew."""
    if name in _INITS["diag"]:
        lam, b = hippo.diagonal(name, size)
        return np.tile(lam, (copies, 1)), np.tile(b, (copies, 1)), np.zeros((0, copies, size // 2))
    systems = _initial_nplr(name, size, rank, copies, seed)
    if name == "random_nplr":
        modes = [hippo.to_dplr(system) for system in systems]
    else:
        modes = [hippo.to_dplr(systems[0])] * copies
    b = np.stack([mode.b for mode in modes])
    return np.stack([mode.lam for mode in modes]), b, np.stack([mode.p for mode in modes], 1)


class SSMKernel(nn.Module):
    """The parameters of H single-input state space models, as kernel and as recurrence.

    Attributes:
      features: H.
      state_size: N, even.
      channels: V, how many output rows C (and kernels) each feature has.
      kernel: 'dplr' (S4), 'diag' (S4D), 'dense' (any A, slow), 'free' (a learned kernel, no SSM).
      a_init: the initial A and B, by kernel: dplr: 'legs', 'legt', 'fout', 'random_nplr'; dense:
        also 'random_dense'; diag: 'lin', 'inv', 'real', 'legs-diag'. None = 'legs', diag 'lin'.
      init_seed: seed of the random inits.
      rank: R of the low-rank part; None = that of the measure (1, LegT 2).
      n_ssm: S, independent copies of (A, B), each shared by H / S features; None = H.
      tie_pq: A = Lambda - P P^* (stable by construction), else Lambda - P Q^* as in the paper.
      real_transform: how Re(Lambda) is kept negative: -exp(x), 'none', -relu(x) - 1e-4 or
        'clip' (min(x, -1e-4)).
      dt_transform: 'exp' or 'softplus' of the stored ``log_dt``.
      dt_min: smallest initial step.
      dt_max: largest initial step (log-uniform between the two).
      discretisation: 'zoh' or 'bilinear' of the diag kernel; dplr and dense are always bilinear.
        None = 'zoh' for diag.
      b_clip: clamps Im(B) to [-b_clip, b_clip] at initialisation; None = exact HiPPO.
      freeze_a: no gradient to A (Lambda, P, Q).
      l_max: length for which C is stored truncated (dplr, required), or number of taps (free).
      length_correction: draw the true C and truncate it once at initialisation, else take the draw
        as the truncated one.
      rate: sampling interval relative to training; 2 = inputs keep every second sample.
      chunk_size: frequencies per block of the dplr kernel, see ``ssm.kernel_dplr``.
    """

    features: int
    state_size: int = 64
    channels: int = 1
    kernel: str = "dplr"
    a_init: str | None = None
    init_seed: int = 0
    rank: int | None = None
    n_ssm: int | None = None
    tie_pq: bool = True
    real_transform: str = "exp"
    dt_transform: str = "exp"
    dt_min: float = 1e-3
    dt_max: float = 0.1
    discretisation: str | None = None
    b_clip: float | None = None
    freeze_a: bool = False
    l_max: int | None = None
    length_correction: bool = True
    rate: float = 1.0
    chunk_size: int | None = None

    def _check(self) -> None:
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices and not (field == "discretisation" and value is None):
                raise ValueError(f"{field}={value!r}; choose one of {', '.join(choices)}")
        if self._init_name not in _INITS[self.kernel]:
            allowed = ", ".join(_INITS[self.kernel])
            raise ValueError(
                f"a_init={self.a_init!r} with kernel={self.kernel!r}; choose {allowed}"
            )
        if self.state_size < 2 or self.state_size % 2:
            raise ValueError(f"state_size must be even and at least 2, got {self.state_size}")
        if self.features % self._copies:
            raise ValueError(f"n_ssm={self.n_ssm} does not divide features={self.features}")
        if self.kernel in ("dplr", "free") and (self.l_max is None or self.l_max < 1):
            raise ValueError(f"kernel={self.kernel!r} needs l_max >= 1, got {self.l_max}")
        if self.kernel == "dplr" and self.discretisation == "zoh":
            raise ValueError(
                "kernel='dplr' is discretised bilinearly; 'zoh' is for 'diag', 'dense'"
            )
        if self.rate <= 0 or (self.kernel == "free" and self.rate != 1):
            raise ValueError(
                f"rate={self.rate}: must be positive, and a free kernel has no sampling rate"
            )

    @property
    def _init_name(self) -> str:
        default = {"diag": "lin", "free": "normal"}.get(self.kernel, "legs")
        return default if self.a_init is None else self.a_init

    @property
    def _copies(self) -> int:
        return self.features if self.n_ssm is None else self.n_ssm

    @property
    def _init_key(self) -> tuple[str, int, int | None, int, int]:
        return self._init_name, self.state_size, self.rank, self._copies, self.init_seed

    @property
    def _length(self) -> int:
        """The internal length at the present sampling rate."""
        return max(1, round((self.l_max or 0) / self.rate))

    def _initial_lambda_re(self, real: np.ndarray) -> np.ndarray:
        decay = np.maximum(-real, _SMALLEST_DECAY)
        stored = {
            "exp": lambda: np.log(decay),
            "none": lambda: -decay,
            "relu": lambda: np.maximum(decay - _SMALLEST_DECAY, 1e-6),
            "clip": lambda: -decay,
        }[self.real_transform]()
        return stored.astype(np.float32)

    def setup(self):
        self._check()
        channels, features, modes = self.channels, self.features, self.state_size // 2
        l_max = self.l_max or 0
        if self.kernel == "free":
            deviation = 1 / np.sqrt(l_max)
            shape = (channels, features, l_max)
            self.taps = self.param("taps", nn.initializers.normal(deviation), shape)
            return

        def initial_log_dt(key):
            low, high = np.log(self.dt_min), np.log(self.dt_max)
            log_dt = jax.random.uniform(key, (features,), minval=low, maxval=high)
            if self.dt_transform == "softplus":
                return jnp.log(jnp.expm1(jnp.exp(log_dt)))
            return log_dt

        self.log_dt = self.param("log_dt", initial_log_dt)
        if self.kernel == "dense":
            if self._init_name == "random_dense":
                rng = np.random.default_rng(self.init_seed)
                systems = [hippo.random_dense(self.state_size, rng) for _ in range(self._copies)]
            else:
                systems = [(system.a, system.b) for system in _initial_nplr(*self._init_key)]
            a, b = (np.stack(x).astype(np.float32) for x in zip(*systems))
            self.a = self.param("a", lambda key: jnp.asarray(a))
            self.b = self.param("b", lambda key: jnp.asarray(b))
            shape = (channels, features, self.state_size)
            self.c = self.param("c", nn.initializers.normal(1.0), shape)
            return

        lam, b, p = _initial_modes(*self._init_key)
        if self.b_clip is not None:
            b = b.real + 1j * np.clip(b.imag, -self.b_clip, self.b_clip)
        real, imag = self._initial_lambda_re(lam.real), lam.imag.astype(np.float32)
        self.lambda_re = self.param("lambda_re", lambda key: jnp.asarray(real))
        self.lambda_im = self.param("lambda_im", lambda key: jnp.asarray(imag))
        self.b = self.param("b", lambda key: jnp.asarray(_as_real(b)))
        if self.kernel == "dplr":
            self.p = self.param("p", lambda key: jnp.asarray(_as_real(p)))
            if not self.tie_pq:
                self.q = self.param("q", lambda key: jnp.asarray(_as_real(p)))

        def initial_c(key):
            c = jax.random.normal(key, (channels, features, modes, 2)) * np.float32(np.sqrt(0.5))
            if self.kernel == "diag" or not self.length_correction:
                return c
            system = ssm.discretise_dplr(*self._dplr(rate=1.0), _as_complex(c))
            truncated = ssm.truncate_output(system, l_max)
            return jnp.stack([truncated.real, truncated.imag], axis=-1)

        self.c = self.param("c", initial_c)

    def _per_feature(self, x: Array, axis: int = 0) -> Array:
        """Repeats the S copies along ``axis`` to H features."""
        repeats = [1] * x.ndim
        repeats[axis] = self.features // self._copies
        return jnp.tile(x, repeats)

    def _dt(self, rate: float) -> Array:
        log_dt = self.log_dt.astype(jnp.promote_types(self.log_dt.dtype, jnp.float32))
        dt = jnp.exp(log_dt) if self.dt_transform == "exp" else jax.nn.softplus(log_dt)
        return rate * dt

    def _diagonal(self) -> tuple[Array, Array]:
        """Lambda and B, complex [H, n]."""
        re = self.lambda_re
        if self.real_transform == "exp":
            re = -jnp.exp(re)
        elif self.real_transform == "relu":
            re = -nn.relu(re) - _SMALLEST_DECAY
        elif self.real_transform == "clip":
            re = jnp.minimum(re, -_SMALLEST_DECAY)
        lam = _as_complex(jnp.stack([re, self.lambda_im], axis=-1))
        if self.freeze_a:
            lam = lax.stop_gradient(lam)
        return self._per_feature(lam), self._per_feature(_as_complex(self.b))

    def _dplr(self, rate: float) -> tuple[Array, Array, Array, Array, Array]:
        """dt [H], Lambda [H, n], P and Q [R, H, n], B [H, n]."""
        lam, b = self._diagonal()
        p = self._per_feature(_as_complex(self.p), 1)
        q = p if self.tie_pq else self._per_feature(_as_complex(self.q), 1)
        if self.freeze_a:
            p, q = lax.stop_gradient((p, q))
        return self._dt(rate), lam, p, q, b

    def _dense(self) -> ssm.Dense:
        a = lax.stop_gradient(self.a) if self.freeze_a else self.a
        a, b = self._per_feature(a), self._per_feature(self.b)
        return ssm.Dense(*ssm.discretise_dense(self._dt(self.rate), a, b), self.c)

    def __call__(self, length: int) -> Array:
        """The convolution kernels.

        Args:
          length: L, how many taps.

        Returns:
          float32 [V, H, L] (a free kernel: at most ``l_max`` taps).

        Raises:
          ValueError: a dplr kernel is asked for more taps than its internal length.
        """
        if self.kernel == "free":
            return self.taps[..., :length]
        if self.kernel == "diag":
            lam, b = self._diagonal()
            method = self.discretisation or "zoh"
            dt, c = self._dt(self.rate), _as_complex(self.c)
            return ssm.kernel_diag(dt, lam, b, c, length, method=method)
        if self.kernel == "dense":
            return ssm.kernel_dense(*self._dense(), length)
        if length > self._length:
            raise ValueError(
                f"sequences of length {length} exceed the kernel's internal length {self._length} "
                f"(l_max={self.l_max}, rate={self.rate}); set l_max={length}, or grow a trained "
                f"model with double_length and l_max={2 * (self.l_max or 0)}"
            )
        kernel = ssm.kernel_dplr(
            *self._dplr(self.rate), _as_complex(self.c), self._length, chunk_size=self.chunk_size
        )
        return kernel[..., :length]

    def discretise(self, mode: str | None = None) -> ssm.System:
        """The discrete system of the recurrence, to be computed once and then stepped.

        Args:
          mode: None = the kernel's own form, with O(N) steps for dplr and diag; 'diagonal' = the
            eigenbasis of a dplr transition matrix, computed on the host (not under ``jit``), with
            elementwise steps.

        Raises:
          ValueError: unknown mode, or an eigenbasis too ill-conditioned (``ssm.diagonalise``).
        """
        if mode not in (None, "dplr", "diagonal"):
            raise ValueError(f"unknown mode {mode!r}; choose None, 'dplr' or 'diagonal'")
        if self.kernel == "free":
            return ssm.Taps(self.taps)
        if self.kernel == "dense":
            return self._dense()
        if self.kernel == "diag":
            lam, b = self._diagonal()
            method = self.discretisation or "zoh"
            return ssm.diagonal_system(self._dt(self.rate), lam, b, _as_complex(self.c), method)
        truncated = ssm.discretise_dplr(*self._dplr(self.rate), _as_complex(self.c))
        system = truncated._replace(c=2 * ssm.restore_output(truncated, self._length))
        return ssm.diagonalise(system) if mode == "diagonal" else system

    def double_length(self) -> None:
        """Rewrites the parameters for ``2 l_max``; the first ``l_max`` taps stay what they are.

        Needs ``mutable=['params']``. The module for the result has ``l_max`` doubled.
        """
        l_max = self.l_max or 0
        if self.kernel == "free":
            taps = jnp.pad(self.taps, ((0, 0), (0, 0), (0, l_max)))
            self.put_variable("params", "taps", taps)
        elif self.kernel == "dplr":
            system = ssm.discretise_dplr(*self._dplr(rate=1.0), _as_complex(self.c))
            c = ssm.double_length(system, l_max)
            self.put_variable("params", "c", jnp.stack([c.real, c.imag], axis=-1))


_SHARED_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(SSMKernel)
    if field.name not in ("parent", "name", "channels")
)


class S4Layer(nn.Module):
    """SSM convolution, skip term D, GELU, dropout, output projection.

    Attributes:
      features: H.
      channels: C, kernels per feature; their outputs are concatenated before the projection.
      bidirectional: a second kernel per channel reads the sequence from its end.
      output: 'linear' (H) or 'glu' (2H, then a sigmoid(b)).
      dropout: rate after the activation.
      tie_dropout: one mask per (example, feature), shared over time.
      dtype: of the projection; the SSM itself runs in float32.

    The other attributes are those of ``SSMKernel``.
    """

    features: int
    state_size: int = 64
    channels: int = 1
    bidirectional: bool = False
    kernel: str = "dplr"
    a_init: str | None = None
    init_seed: int = 0
    rank: int | None = None
    n_ssm: int | None = None
    tie_pq: bool = True
    real_transform: str = "exp"
    dt_transform: str = "exp"
    dt_min: float = 1e-3
    dt_max: float = 0.1
    discretisation: str | None = None
    b_clip: float | None = None
    freeze_a: bool = False
    l_max: int | None = None
    length_correction: bool = True
    rate: float = 1.0
    chunk_size: int | None = None
    output: str = "linear"
    dropout: float = 0.0
    tie_dropout: bool = True
    dtype: Any = None

    def setup(self):
        if self.output not in ("linear", "glu"):
            raise ValueError(f"output={self.output!r}; choose 'linear' or 'glu'")
        rows = self.channels * (2 if self.bidirectional else 1)
        shared = {name: getattr(self, name) for name in _SHARED_FIELDS}
        self.ssm = SSMKernel(channels=rows, **shared)
        self.d = self.param("d", nn.initializers.normal(1.0), (self.channels, self.features))
        width = self.features * (2 if self.output == "glu" else 1)
        self.out = nn.Dense(width, dtype=self.dtype)
        self.drop = nn.Dropout(self.dropout, broadcast_dims=(1,) if self.tie_dropout else ())

    def _project(self, y: Array, dtype: Any, train: bool = False) -> Array:
        """From the SSM outputs [B, ..., C, H] to the layer outputs [B, ..., H]."""
        y = y.reshape(*y.shape[:-2], -1).astype(dtype)
        y = nn.gelu(y, approximate=False)
        if train:
            y = self.drop(y, deterministic=False)
        y = self.out(y)
        return nn.glu(y) if self.output == "glu" else y

    def __call__(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """Maps [B, L, H] to [B, L, H].

        Args:
          inputs: [B, L, H].
          lengths: int [B]; what lies beyond is treated as absent. Outputs there mean nothing.
          train: apply dropout.
        """
        u = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
        if lengths is not None:
            valid = jnp.arange(u.shape[1]) < lengths[:, None]
            u = jnp.where(valid[..., None], u, 0)
        kernel = self.ssm(u.shape[1])
        reverse = None
        if self.bidirectional:
            kernel, reverse = jnp.split(kernel, 2)
        y = fft_convolve(jnp.swapaxes(u, 1, 2)[:, None], kernel, reverse)
        y = jnp.moveaxis(y, -1, 1) + self.d * u[:, :, None]
        return self._project(y, self._compute_dtype(inputs), train)

    def _compute_dtype(self, inputs: Array) -> Any:
        return self.dtype or inputs.dtype

    def discretise(self, mode: str | None = None) -> ssm.System:
        """The matrices that ``step`` and ``prefill`` need; see ``SSMKernel.discretise``."""
        if self.bidirectional:
            raise ValueError("a bidirectional layer reads the future: it has no recurrence")
        return self.ssm.discretise(mode)

    def prefill(
        self, inputs: Array, system: ssm.System, state: Array | None = None, max_length: int = 0
    ) -> tuple[Array, Array]:
        """Outputs for a whole prefix or chunk, and the state after it.

        Args:
          inputs: [B, L, H].
          system: from ``discretise``.
          state: the state before the chunk; None = start of the sequence.
          max_length: not used, the state does not grow with the sequence.

        Returns:
          [B, L, H] and the state.
        """
        del max_length
        u = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
        if state is None:
            state = ssm.zero_state(system, u.shape[0])
        y, state = ssm.chunked(system, u, state)
        return self._project(y + self.d * u[:, :, None], self._compute_dtype(inputs)), state

    def step(self, inputs: Array, state: Array, system: ssm.System) -> tuple[Array, Array]:
        """One token: [B, H] and a state to [B, H] and the next state, at constant cost."""
        u = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
        y, state = ssm.step(system, state, u)
        return self._project(y + self.d * u[:, None], self._compute_dtype(inputs)), state

    def double_length(self) -> None:
        """See ``SSMKernel.double_length``."""
        self.ssm.double_length()
