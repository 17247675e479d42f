"""Small networks that read the hidden states of a frozen backbone: UniPT, LST, a scalar mix.

All of them map *states*, the features of an input at every depth of a backbone, to features. States
are a sequence of arrays whose last one is the *anchor*: tokens [B, N_l, d_l], or maps
[B, H_l, W_l, C_l]. States of one shape may lie in one array [B, L + 1, N, d].

UniPT: Diao et al., "UniPT: Universal Parallel Tuning for Transfer Learning with Efficient Parameter
and Memory", CVPR 2024. LST: Sung et al., "LST: Ladder Side-Tuning", NeurIPS 2022.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from transfer_jax.nn.initializers import torch_uniform
from transfer_jax.nn.recurrent import GRU
from transfer_jax.nn.transformer import TransformerConfig, TransformerLayer

Array = jax.Array
States = Sequence[Array] | Array

_FIELDS = {
    "layer_map": ("linear_norm", "relu_linear"),
    "norm": ("layer", "batch"),
    "project": (None, "linear", "mlp"),
    "up": (None, "relu_linear", "linear", "relu_linear_norm"),
    "weights": ("relu", "softmax"),
    "confidence": ("anchor", "layer", "uniform"),
    "init": ("torch", "xavier"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniPTConfig:
    """What distinguishes the variants of UniPT; see ``unipt_config`` for those of the paper.

    Attributes:
      features: m, the width in which layers meet.
      outputs: e, width of the output; None = the width of the anchor.
      layer_map: D_l: 'linear_norm' or 'relu_linear'.
      norm: of the maps and of the projection: 'layer' or 'batch'.
      project: of the merged features: None, 'linear' (then the norm) or 'mlp' (a hidden layer as
        wide as the anchor's state, then the norm).
      up: None (the output stays in m dimensions), 'relu_linear', 'linear' or 'relu_linear_norm'.
      input_residual: ``anchor state + up(u)`` in place of ``up(z_a + project(u))``.
      identity: add I to the weights of the interaction; the anchor has as many tokens as the layer.
      own_token: add each layer's own token to what it gives (the first, or at ``positions``).
      cross: layers attend to a context first (the decoder's side of an encoder-decoder).
      weights: 'relu' (L1-normalised), or 'softmax' for the ablation.
      confidence: from 'anchor' times layer, from the 'layer' alone, or 'uniform' (ablations).
      init: of matrices: 'torch' (uniform, 1 / sqrt(fan_in)) or 'xavier'.
      dtype: compute dtype; weights and confidences are float32.
    """

    features: int
    outputs: int | None = None
    layer_map: str = "linear_norm"
    norm: str = "layer"
    project: str | None = "linear"
    up: str | None = "relu_linear"
    input_residual: bool = False
    identity: bool = True
    own_token: bool = False
    cross: bool = False
    weights: str = "relu"
    confidence: str = "anchor"
    init: str = "torch"
    dtype: Any = None

    def __post_init__(self):
        for name, allowed in _FIELDS.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={value!r}; choose one of {allowed}")
        if self.input_residual and (self.project is not None or self.up is None):
            raise ValueError("input_residual=True needs project=None and an up projection")


VARIANTS: dict[str, dict[str, Any]] = {
    # A. VSE++-infinity, text: BERT-base.
    "vse_text": {"features": 512, "outputs": 1024},
    # B. VSE++-infinity, images: the four stages of a convolutional network.
    "vse_image": {"features": 512, "outputs": 1024, "norm": "batch"},
    # C. CLIP4Clip: the anchor is the projected embedding, a single token.
    "clip4clip": {
        "features": 512, "layer_map": "relu_linear", "project": None, "up": "relu_linear",
        "input_residual": True, "identity": False, "own_token": True,
    },
    # D. CLIP-ViL.
    "clip_vil": {"features": 384, "outputs": 768, "project": "mlp", "up": "linear"},
    # E. MDETR, the encoder's and the decoder's side.
    "mdetr_encoder": {"features": 128, "project": "mlp", "up": None, "init": "xavier"},
    "mdetr_decoder": {
        "features": 128, "project": "mlp", "up": "relu_linear_norm", "init": "xavier",
        "cross": True,
    },
}  # fmt: skip


def unipt_config(variant: str, **changes: Any) -> UniPTConfig:
    """The configuration of one of the paper's hosts, with ``changes``.

    Args:
      variant: one of ``VARIANTS``. For other encoders take 'vse_text' or 'clip_vil'.

    Raises:
      ValueError: no such variant.
    """
    if variant not in VARIANTS:
        near = difflib.get_close_matches(variant, VARIANTS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"variant={variant!r}; {hint}there are {sorted(VARIANTS)}")
    return UniPTConfig(**{**VARIANTS[variant], **changes})


# -- parts ------------------------------------------------------------------------------------


def l1_normalise(x: Array, axis: int = -1) -> Array:
    """``x / max(sum |x|, 1e-6)`` in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.sum(jnp.abs(x), axis=axis, keepdims=True), 1e-6)


def valid_tokens(lengths: Array | None, count: int) -> Array | None:
    """float32 [B, count], 1 before the length; None without lengths."""
    return None if lengths is None else (jnp.arange(count) < lengths[:, None]).astype(jnp.float32)


def token_mean(x: Array, mask: Array | None) -> Array:
    """Mean of [B, N, m] over the tokens at which ``mask`` [B, N] is 1: [B, m] float32, or 0."""
    x = x.astype(jnp.float32)
    if mask is None:
        return x.mean(axis=1)
    total = jnp.einsum("bnm,bn->bm", x, mask)
    return total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1.0)


def interaction_weights(
    query: Array, context: Array, mask: Array | None = None, kind: str = "relu"
) -> Array:
    """The weights of the parallel interaction, without I.

    Args:
      query: [B, Q, m].
      context: [B, N, m].
      mask: [B, N], 0 at tokens that are not seen; None = all are.
      kind: 'relu': positive products divided by their sum (rows sum to 1, or to 0 where no product
        is positive), with no scale; 'softmax': of the products over sqrt(m).

    Returns:
      [B, Q, N] float32.
    """
    scores = jnp.einsum("bqm,bnm->bqn", query, context, preferred_element_type=jnp.float32)
    if kind == "softmax":
        scores = scores * context.shape[-1] ** -0.5
        if mask is not None:
            scores = jnp.where(mask[:, None] > 0, scores, -1e9)
        return jax.nn.softmax(scores)
    if mask is not None:
        scores = scores * mask[:, None]
    return l1_normalise(nn.relu(scores))


def attend(query: Array, context: Array, mask: Array | None = None, kind: str = "relu") -> Array:
    """The averages of the context itself under ``interaction_weights``: [B, Q, m]."""
    weights = interaction_weights(query, context, mask, kind)
    return jnp.einsum("bqn,bnm->bqm", weights.astype(context.dtype), context)


def pooling_weights(scores: Array, ratio: int) -> Array:
    """The weights of pixels within each block, ``l1(relu(scores)) + 1 / ratio^2``.

    Args:
      scores: [B, h, ratio, w, ratio], pixels by block.
      ratio: side of a block.

    Returns:
      float32, as ``scores``; a block's weights sum to 2, or to 1 where no score is positive.
    """
    positive = nn.relu(scores.astype(jnp.float32))
    total = jnp.sum(positive, axis=(2, 4), keepdims=True)
    return positive / jnp.maximum(total, 1e-6) + ratio**-2


def pool_to_anchor(stage: Array, anchor: Array) -> Array:
    """Brings a stage of a convolutional network to the anchor's grid by weighted sums of blocks.

    Pixels that resemble the anchor's pixel of their block, in the products over channels, weigh
    more.

    Args:
      stage: [B, R h, R w, C].
      anchor: [B, h, w, C], mapped to the stage's channels, not negative.

    Returns:
      [B, h, w, C].

    Raises:
      ValueError: the sides of the stage are not one multiple of those of the anchor.
    """
    batch, height, width, channels = anchor.shape
    ratio = stage.shape[1] // height
    if (ratio * height, ratio * width) != stage.shape[1:3] or ratio < 1:
        raise ValueError(
            f"a stage of {stage.shape[1]} x {stage.shape[2]} pixels cannot be pooled to the grid "
            f"{height} x {width} of the anchor: both sides must be the same multiple."
        )
    blocks = stage.reshape(batch, height, ratio, width, ratio, channels)
    scores = jnp.einsum("bhiwjc,bhwc->bhiwj", blocks, anchor, preferred_element_type=jnp.float32)
    weights = pooling_weights(scores, ratio).astype(stage.dtype)
    return jnp.einsum("bhiwj,bhiwjc->bhwc", weights, blocks)


def linear(
    fan_in: int, features: int, *, name: str, init: str = "torch", dtype: Any = None
) -> nn.Dense:
    """A dense layer for inputs of width ``fan_in``, initialised as PyTorch does, or by Xavier."""
    uniform = torch_uniform(fan_in)
    kernel_init = nn.initializers.xavier_uniform() if init == "xavier" else uniform
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, bias_init=uniform, name=name)


def split_states(inputs: States) -> list[Array]:
    """The list of states, the anchor last; of one array [B, L + 1, ...] its slices."""
    if isinstance(inputs, Sequence):
        return list(inputs)
    return [inputs[:, i] for i in range(inputs.shape[1])]


# -- UniPT ------------------------------------------------------------------------------------


class UniPT(nn.Module):
    """One parallel network over all states: no layer waits for another (section 3).

    Every layer is mapped to m dimensions, ``z_l = D_l(h_l)``. The anchor asks each of them,
    ``u_l = (l1(relu(z_a z_l^T)) + I) z_l``; confidences, a softmax over the layers of one shared
    linear form of ``mean(z_a) * mean(z_l)``, add them up; and ``up(z_a + project(sum c_l u_l))`` is
    the output. All states but the last are merged. Nothing starts at zero: the first step is not
    the frozen model.

    Attributes:
      config: see ``UniPTConfig``.
    """

    config: UniPTConfig

    @nn.compact
    def __call__(
        self,
        inputs: States,
        *,
        lengths: Array | None = None,
        positions: Array | None = None,
        context: Array | None = None,
        context_lengths: Array | None = None,
        train: bool = False,
    ) -> Array:
        """Maps states to features.

        The confidences [B, L] are sown as ``intermediates/confidence``.

        Args:
          inputs: states, the anchor last; see the module's docstring.
          lengths: int [B], valid tokens of the layers.
          positions: int [B], where each layer's own token is; None = the first.
          context: [B, S, m] for ``cross``: the output of the encoder's side, without ``up``.
          context_lengths: int [B], valid tokens of the context.
          train: norm by the statistics of this batch, where there are batch norms.

        Returns:
          [B, N_a, e], maps flattened. With ``cross`` [L + 1, B, N_a, e]: what each merged layer
          gives alone, for deep supervision, and the output last.

        Raises:
          ValueError: no layer besides the anchor, or a context is missing.
        """
        c = self.config
        states = split_states(inputs)
        if len(states) < 2:
            raise ValueError(f"{len(states)} states: the anchor and a layer to merge are needed.")
        if c.cross and context is None:
            raise ValueError("a side network with cross=True needs a context [B, S, m].")
        if states[-1].ndim == 4:
            states = self._pooled(states)
        anchor_state = states[-1]
        outputs = c.outputs or anchor_state.shape[-1]

        def dense(x: Array, features: int, name: str) -> Array:
            return linear(x.shape[-1], features, name=name, init=c.init, dtype=c.dtype)(x)

        def norm(x: Array, name: str) -> Array:
            if c.norm == "batch":
                return nn.BatchNorm(
                    not train, momentum=0.9, epsilon=1e-5, dtype=c.dtype, name=name
                )(x)
            return nn.LayerNorm(1e-5, dtype=c.dtype, use_fast_variance=False, name=name)(x)

        def map_layer(state: Array, name: str) -> Array:
            if c.layer_map == "relu_linear":
                return dense(nn.relu(state), c.features, f"map_{name}")
            return norm(dense(state, c.features, f"map_{name}"), f"map_norm_{name}")

        anchor = map_layer(anchor_state, "anchor")
        # Where the anchor has the layers' tokens, it has their padding too.
        shared = lengths if c.identity else None
        anchor_mean = token_mean(anchor, valid_tokens(shared, anchor.shape[1]))
        gate = linear(c.features, 1, name="gate", init=c.init)

        merged, scores, alone = [], [], []
        for i, state in enumerate(states[:-1]):
            z = map_layer(state, str(i))
            mask = valid_tokens(lengths, z.shape[1])
            if c.cross:
                assert context is not None
                seen = attend(z, context, valid_tokens(context_lengths, context.shape[1]))
                z = z + norm(dense(seen, c.features, f"cross_{i}"), f"cross_norm_{i}")
                alone.append(z)
            merged.append(_interact(anchor, z, mask, positions, c))
            if c.confidence != "uniform":
                mean = token_mean(z, mask)
                scores.append(gate(anchor_mean * mean if c.confidence == "anchor" else mean)[:, 0])
        if scores:
            confidence = jax.nn.softmax(jnp.stack(scores, axis=1), axis=1)
        else:
            confidence = jnp.full((len(anchor), len(merged)), 1 / len(merged))
        self.sow("intermediates", "confidence", confidence)
        u = sum(w[:, None, None].astype(x.dtype) * x for w, x in zip(confidence.T, merged))

        if c.input_residual:
            return anchor_state + dense(nn.relu(u), outputs, "up").astype(anchor_state.dtype)
        if c.project == "mlp":
            u = nn.relu(dense(u, anchor_state.shape[-1], "project_hidden"))
        if c.project is not None:
            u = norm(dense(u, c.features, "project"), "project_norm")
        results = jnp.stack([*alone, anchor + u])
        if c.up is not None:
            results = results if c.up == "linear" else nn.relu(results)
            results = dense(results, outputs, "up")
        if c.up == "relu_linear_norm":
            results = norm(results, "up_norm")
        return results if c.cross else results[0]

    def _pooled(self, states: Sequence[Array]) -> list[Array]:
        """Maps [B, H_l, W_l, C_l] as tokens [B, H_a W_a, C_l] on the anchor's grid."""
        c, anchor = self.config, states[-1]
        tokens = []
        for i, stage in enumerate(states[:-1]):
            channels = stage.shape[-1]
            identity = linear(
                anchor.shape[-1], channels, name=f"identity_{i}", init=c.init, dtype=c.dtype
            )
            pooled = pool_to_anchor(stage, nn.relu(identity(anchor)))
            tokens.append(pooled.reshape(len(pooled), -1, channels))
        return [*tokens, anchor.reshape(len(anchor), -1, anchor.shape[-1])]


def _interact(
    anchor: Array, z: Array, mask: Array | None, positions: Array | None, config: UniPTConfig
) -> Array:
    """u_l [B, N_a, m] of one layer."""
    u = attend(anchor, z, mask, config.weights)
    if config.identity:
        if anchor.shape != z.shape:
            raise ValueError(
                "identity=True adds each token of a layer to the anchor's: a layer of shape "
                f"{z.shape} and an anchor of shape {anchor.shape} must agree."
            )
        u = u + z
    if config.own_token:
        at = jnp.zeros(len(z), jnp.int32) if positions is None else positions
        u = u + jnp.take_along_axis(z, at[:, None, None], axis=1)
    return u


# -- other readers of states ------------------------------------------------------------------


class ScalarMix(nn.Module):
    """``sum_l softmax(w)_l h_l`` of states of one shape, with one learned number per state."""

    @nn.compact
    def __call__(
        self, inputs: States, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """Maps states, each [B, N, d], to [B, N, d]."""
        del lengths, train
        states = split_states(inputs)
        weights = self.param("weights", nn.initializers.zeros, (len(states),))
        return sum(w.astype(x.dtype) * x for w, x in zip(jax.nn.softmax(weights), states))


class LadderSide(nn.Module):
    """LST: a narrow Transformer beside the backbone, one layer after the other.

    ``s_l = Block_l(mu_l Down_l(h_l) + (1 - mu_l) s_{l-1})`` with ``mu_l = sigmoid(alpha_l / T)``,
    ``s_0 = Down_0(h_0)``; then a norm and a projection to the backbone's width.

    Attributes:
      features: width of the side network.
      num_heads: of its layers.
      temperature: T.
      dtype: compute dtype.
    """

    features: int
    num_heads: int = 4
    temperature: float = 0.1
    dtype: Any = None

    @nn.compact
    def __call__(
        self, inputs: States, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """Maps states, each [B, N, d], to [B, N, d]."""
        states = split_states(inputs)
        config = TransformerConfig(
            features=self.features, num_layers=len(states) - 1, num_heads=self.num_heads,
            dtype=self.dtype,
        )  # fmt: skip

        def dense(x: Array, features: int, name: str) -> Array:
            return linear(x.shape[-1], features, name=name, dtype=self.dtype)(x)

        alpha = self.param("alpha", nn.initializers.zeros, (config.num_layers,))
        mu = jax.nn.sigmoid(alpha / self.temperature)
        side = dense(states[0], self.features, "down_0")
        for i, state in enumerate(states[1:], 1):
            gate = mu[i - 1].astype(side.dtype)
            side = gate * dense(state, self.features, f"down_{i}") + (1 - gate) * side
            layer = TransformerLayer(config, name=f"layers_{i - 1}")
            side = layer(side, lengths=lengths, train=train)
        side = nn.LayerNorm(1e-5, dtype=self.dtype, use_fast_variance=False, name="norm")(side)
        return dense(side, states[-1].shape[-1], "up")


class GeneralisedPooling(nn.Module):
    """GPO: tokens to one vector by learned weights of sorted features (Chen et al. 2021).

    Every feature is sorted over the tokens, largest first, and averaged with weights that a
    bidirectional GRU computes from the ranks alone.

    Attributes:
      features: of the ranks' sinusoidal encodings and of the GRU, even.
      temperature: of the softmax of the weights.
    """

    features: int = 32
    temperature: float = 0.1

    @nn.compact
    def __call__(self, inputs: Array, mask: Array | None = None) -> Array:
        """Maps [B, N, D] to float32 [B, D].

        Args:
          inputs: tokens.
          mask: [B, N], 0 at tokens that do not count; None = all count.
        """
        x = inputs.astype(jnp.float32)
        batch, count, _ = x.shape
        mask = jnp.ones((batch, count)) if mask is None else mask
        lengths = mask.sum(axis=1).astype(jnp.int32)
        ranks = jnp.arange(count)
        # Tokens that do not count are sorted to the end, where the weights are 0.
        ordered = -jnp.sort(jnp.where(mask[..., None] > 0, -x, jnp.inf), axis=1)
        valid = ranks < lengths[:, None]
        ordered = jnp.where(valid[..., None], ordered, 0.0)

        wavelengths = 10_000.0 ** (jnp.arange(0, self.features, 2) / self.features)
        angle = ranks[:, None] / wavelengths
        codes = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(count, -1)
        codes = jnp.broadcast_to(codes, (batch, *codes.shape))
        forward = GRU(self.features, name="forward")(codes, lengths=lengths)
        backward = GRU(self.features, name="backward")(_flip(codes, lengths), lengths=lengths)
        hidden = (forward + _flip(backward, lengths)) / 2
        scores = nn.Dense(1, use_bias=False, name="score")(hidden)[..., 0]
        scores = jnp.where(valid, scores / self.temperature, -1e9)
        weights = jnp.where(valid, jax.nn.softmax(scores, axis=1), 0.0)
        return jnp.einsum("bn,bnd->bd", weights, ordered)


def _flip(x: Array, lengths: Array) -> Array:
    """Reverses the first ``lengths`` [B] of the positions of [B, N, D]."""
    ranks = jnp.arange(x.shape[1])
    index = jnp.where(ranks < lengths[:, None], lengths[:, None] - 1 - ranks, ranks)
    return jnp.take_along_axis(x, index[..., None], axis=1)
