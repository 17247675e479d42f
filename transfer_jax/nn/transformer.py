"""The Transformer layer and stack that every backbone is made of."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from transfer_jax.nn.attention import Attention, Implementation, KVCache
from transfer_jax.nn.blocks import FeedForward
from transfer_jax.nn.sliding_attention import SlidingAttention

Array = jax.Array
PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What distinguishes the layers of BERT, BART, T5, GPT-2, ViT, CLIP and their relatives.

    Attributes:
      features: H.
      num_layers: depth.
      num_heads: attention heads.
      head_dim: width of a head; None = H / num_heads.
      hidden: width of the feed-forward layer; None = 4 H.
      activation: see ``transfer_jax.nn.blocks.ACTIVATIONS``.
      gated: the feed-forward layer has a gate (T5 1.1).
      use_bias: in all projections.
      norm: 'layer', or 'rms' (scale only).
      norm_first: pre-norm ``x + f(norm(x))``, else post-norm ``norm(x + f(x))``.
      norm_eps: inside the norms.
      final_norm: a norm after the last layer (pre-norm stacks).
      attention_scale: of queries times keys; None = 1 / sqrt(head_dim), T5 has 1.
      causal: a decoder.
      window: positions seen on either side, see ``SlidingAttention``; one number for all layers or
        one for each; None = all positions.
      max_global: room for so many global tokens per example, where there is a window.
      cross_attention: layers attend to a context as well.
      relative_buckets: relative position bias with so many buckets (T5); None = none.
      relative_distance: beyond this all distances share a bucket.
      dropout: rate on the output of each sublayer.
      attention_dropout: rate on the attention weights.
      activation_dropout: rate inside the feed-forward layer.
      init_scale: standard deviation of the projections' initial values; None = 1 / sqrt(fan-in),
        for queries 1 / sqrt(fan-in * head_dim) (T5, whose products have no other scale).
      remat: recompute each layer in the backward pass.
      scan: one compiled layer for all, parameters stacked on a leading axis; see
        ``stack_layers``.
      implementation: of the attention, see ``Attention``.
      dtype: compute dtype; parameters stay float32.
    """

    features: int
    num_layers: int
    num_heads: int
    head_dim: int | None = None
    hidden: int | None = None
    activation: str = "gelu"
    gated: bool = False
    use_bias: bool = True
    norm: str = "layer"
    norm_first: bool = True
    norm_eps: float = 1e-5
    final_norm: bool = True
    attention_scale: float | None = None
    causal: bool = False
    window: int | tuple[int, ...] | None = None
    max_global: int = 64
    cross_attention: bool = False
    relative_buckets: int | None = None
    relative_distance: int = 128
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_scale: float | None = 0.02
    remat: bool = False
    scan: bool = False
    implementation: Implementation | None = None
    dtype: Any = None

    def __post_init__(self):
        if self.norm not in ("layer", "rms"):
            raise ValueError(f"norm={self.norm!r}; choose 'layer' or 'rms'")
        if self.head_dim is None and self.features % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide features={self.features}")
        if isinstance(self.window, tuple):
            if len(self.window) != self.num_layers:
                raise ValueError(f"window={self.window} is not one for each of {self.num_layers}")
            if self.scan and len(set(self.window)) > 1:
                raise ValueError(f"scan=True needs layers that are alike, not window={self.window}")

    def layer(self, index: int) -> "TransformerConfig":
        """The configuration of one layer."""
        if not isinstance(self.window, tuple):
            return self
        return dataclasses.replace(self, window=self.window[index])


def make_norm(config: TransformerConfig, name: str | None = None) -> nn.Module:
    """Returns the config's norm; computed in float32 and without the cancelling fast variance."""
    if config.norm == "rms":
        return nn.RMSNorm(config.norm_eps, dtype=config.dtype, name=name)
    return nn.LayerNorm(config.norm_eps, dtype=config.dtype, use_fast_variance=False, name=name)


class LayerCache(NamedTuple):
    """What a decoder layer keeps while it generates.

    Attributes:
      own: keys and values of the tokens so far; None before the first.
      context: keys and values [B, S, heads, D] of the context, or None.
    """

    own: KVCache | None
    context: tuple[Array, Array] | None


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention where configured, and a feed-forward layer, each residual.

    Submodules: ``attention``, ``attention_norm``, ``cross_attention``, ``cross_attention_norm``,
    ``mlp``, ``mlp_norm``. Dropout on the output of ``mlp`` belongs to the sublayer (see ``_mlp``).

    Attributes:
      config: of the stack.
    """

    config: TransformerConfig

    def setup(self):
        c = self.config
        if c.init_scale is None:
            head_dim = c.head_dim or c.features // c.num_heads
            init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
            query_init = nn.initializers.variance_scaling(1 / head_dim, "fan_in", "normal")
        else:
            init = query_init = nn.initializers.normal(c.init_scale)
        options: dict[str, Any] = {
            "features": c.features, "num_heads": c.num_heads, "head_dim": c.head_dim,
            "use_bias": c.use_bias, "scale": c.attention_scale, "dropout": c.attention_dropout,
            "kernel_init": init, "query_init": query_init, "implementation": c.implementation,
            "dtype": c.dtype,
        }  # fmt: skip
        if c.window is None:
            self.attention = Attention(causal=c.causal, **options)
        else:
            sliding: dict[str, Any] = {"window": c.window, "max_global": c.max_global}
            self.attention = SlidingAttention(causal=c.causal, **options, **sliding)
        self.attention_norm = make_norm(c)
        if c.cross_attention:
            self.cross_attention = Attention(**options)
            self.cross_attention_norm = make_norm(c)
        self.mlp = FeedForward(
            c.features, hidden=c.hidden, activation=c.activation, gated=c.gated,
            use_bias=c.use_bias, dropout=c.activation_dropout, tie_dropout=False,
            kernel_init=init, dtype=c.dtype,
        )  # fmt: skip
        self.mlp_norm = make_norm(c)
        self.drop = nn.Dropout(c.dropout)

    def _residual(self, x: Array, norm: nn.Module, sublayer: Callable, train: bool) -> Array:
        inputs = norm(x) if self.config.norm_first else x
        y = sublayer(inputs)
        if train:
            y = self.drop(y, deterministic=False)
        return self.residual(x, inputs, y, norm)

    def residual(self, x: Array, inputs: Array, outputs: Array, norm: nn.Module) -> Array:
        """Adds what a sublayer gives to the stream, and normalises after it where configured.

        A method of its own so that adapters can be put in with ``flax.linen.intercept_methods``.

        Args:
          x: [B, L, H], the stream.
          inputs: [B, L, H], what the sublayer read: ``norm(x)``, or ``x`` under post-norm.
          outputs: [B, L, H], what it gave, after dropout.
          norm: the sublayer's, such as ``mlp_norm``.

        Returns:
          [B, L, H].
        """
        del inputs
        x = x + outputs
        return x if self.config.norm_first else norm(x)

    def __call__(
        self,
        inputs: Array,
        layer: Array | int = 0,
        *,
        lengths: Array | None = None,
        mask: Array | None = None,
        bias: Array | None = None,
        context: Array | None = None,
        context_lengths: Array | None = None,
        global_mask: Array | None = None,
        where: Array | None = None,
        train: bool = False,
    ) -> Array:
        """Maps [B, L, H] to [B, L, H].

        Args:
          inputs: [B, L, H].
          layer: the layer's index in its stack, for interceptors; a traced scalar under ``scan``.
          lengths: int [B], valid positions of ``inputs``.
          mask: bool, broadcastable to [B, heads, L, L]; False is not seen.
          bias: broadcastable to [B, heads, L, L], added to the scores of the self-attention.
          context: [B, S, H] for the cross-attention.
          context_lengths: int [B], valid positions of ``context``.
          global_mask: bool [B, L], with a window: tokens that see and are seen by all.
          where: int [B, P], positions to compute, without a window; gives [B, P, H]. They see all.
          train: dropout on.
        """
        del layer
        options: dict[str, Any] = {"lengths": lengths, "mask": mask, "bias": bias, "train": train}
        if self.config.window is not None:
            options["global_mask"] = global_mask
        elif global_mask is not None:
            raise ValueError("global_mask is for layers with a window; here all tokens see all")

        if where is not None:
            seen = self.attention_norm(inputs) if self.config.norm_first else inputs
            options.update(mask=_rows_at(mask, where), bias=_rows_at(bias, where))
            options.update(context=seen, positions=where)
            inputs = take_at(inputs, where)

        def attend(x: Array) -> Array:
            return self.attention(x, **options)

        def cross(x: Array) -> Array:
            return self.cross_attention(x, context, lengths=context_lengths, train=train)

        x = self._residual(inputs, self.attention_norm, attend, train)
        if self.config.cross_attention:
            if context is None:
                raise ValueError("a layer with cross-attention needs a context [B, S, H]")
            x = self._residual(x, self.cross_attention_norm, cross, train)
        return self._residual(x, self.mlp_norm, lambda x: self.mlp(x, train=train), train)

    def start(self, context: Array | None, layer: Array | int = 0) -> LayerCache:
        """The cache before the first token: keys and values of the context, computed once.

        Args:
          context: [B, S, H] for the cross-attention, or None.
          layer: see ``__call__``.
        """
        del layer
        if not self.config.cross_attention:
            return LayerCache(None, None)
        if context is None:
            raise ValueError("a layer with cross-attention needs a context [B, S, H]")
        return LayerCache(None, self.cross_attention.project(context))

    def decode(
        self,
        inputs: Array,
        layer: Array | int,
        cache: LayerCache,
        *,
        bias: Array | None = None,
        context_lengths: Array | None = None,
        max_length: int = 0,
    ) -> tuple[Array, LayerCache]:
        """As ``__call__`` for the next tokens [B, L, H], with and into the cache.

        Args:
          inputs: [B, L, H].
          layer: see ``__call__``.
          cache: of the tokens before.
          bias: [1, heads, L, L] at the start, else [1, heads, L, max_length].
          context_lengths: int [B].
          max_length: how long the sequence will become; used at the start.
        """
        del layer
        own: list[KVCache] = []

        def attend(x: Array) -> Array:
            y, state = self.attention.prefill(x, None, cache.own, max_length, bias)
            own.append(state)
            return y

        def cross(x: Array) -> Array:
            assert cache.context is not None  # ``start`` has put it there
            return self.cross_attention.cross(x, *cache.context, lengths=context_lengths)

        x = self._residual(inputs, self.attention_norm, attend, False)
        if self.config.cross_attention:
            x = self._residual(x, self.cross_attention_norm, cross, False)
        x = self._residual(x, self.mlp_norm, self.mlp, False)
        return x, LayerCache(own[0], cache.context)


def take_at(x: Array, where: Array) -> Array:
    """Positions ``where``, int [B, P], of [B, L, H]: [B, P, H]."""
    return jnp.take_along_axis(x, where[..., None], axis=1)


def _rows_at(scores: Array | None, where: Array) -> Array | None:
    """Rows ``where`` [B, P] of what can be broadcast to [B, heads, L, S]."""
    if scores is None or scores.ndim < 2 or scores.shape[-2] == 1:
        return scores
    scores = scores.reshape((1,) * (4 - scores.ndim) + scores.shape)
    return jnp.take_along_axis(scores, where[:, None, :, None], axis=2)


def relative_bucket(distance: Array, num_buckets: int, max_distance: int, causal: bool) -> Array:
    """The bucket of each relative position (T5, Raffel et al. 2020, section 2.1).

    Half of the buckets are for single small distances, the others grow logarithmically up to
    ``max_distance``. Bidirectional stacks use half for each sign.

    Args:
      distance: int, position of the key minus position of the query.
      num_buckets: how many in all.
      max_distance: where the last bucket begins.
      causal: keys after the query all fall into bucket 0.
    """
    offset = jnp.zeros_like(distance)
    if causal:
        distance = jnp.maximum(-distance, 0)
    else:
        num_buckets //= 2
        offset = jnp.where(distance > 0, num_buckets, 0)
        distance = jnp.abs(distance)
    exact = num_buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    large = exact + (ratio / math.log(max_distance / exact) * (num_buckets - exact)).astype(int)
    return offset + jnp.where(distance < exact, distance, jnp.minimum(large, num_buckets - 1))


class RelativeBias(nn.Module):
    """A learned bias per head and bucket of relative positions, shared by the layers of a stack.

    Attributes:
      config: of the stack.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, queries: Array, keys: Array) -> Array:
        """[1, heads, L, S] for positions ``queries`` [L] and ``keys`` [S]."""
        c = self.config
        buckets = c.relative_buckets or 0
        init = nn.initializers.normal(c.features**-0.5)
        table = self.param("embedding", init, (buckets, c.num_heads))
        distance = keys[None, :] - queries[:, None]
        index = relative_bucket(distance, buckets, c.relative_distance, c.causal)
        return jnp.moveaxis(table[index], -1, 0)[None]


class StackState(NamedTuple):
    """What a decoder keeps while it generates.

    Attributes:
      position: int32 scalar, tokens so far.
      layers: a ``LayerCache`` per layer; one with stacked leaves under ``scan``.
      context_lengths: int [B] or None.
    """

    position: Array
    layers: Any
    context_lengths: Array | None

    def take(self, rows: Array) -> "StackState":
        """The state of other rows of the batch: examples repeated, beams in another order.

        Args:
          rows: int [B * K], which rows; the first K of the first example, and so on. Contexts stay
            [B, S, ...], as all rows of an example share its context.
        """
        scanned = isinstance(self.layers, LayerCache)
        axis = 1 if scanned else 0

        def take(cache: LayerCache) -> LayerCache:
            if cache.own is None:
                return cache
            key, value = (jnp.take(x, rows, axis=axis) for x in cache.own[:2])
            return cache._replace(own=cache.own._replace(key=key, value=value))

        layers = take(self.layers) if scanned else tuple(take(layer) for layer in self.layers)
        return self._replace(layers=layers)


class TransformerStack(nn.Module):
    """``num_layers`` layers and the final norm.

    Attributes:
      config: see ``TransformerConfig``. Layers are called ``layers_0``, ``layers_1``, …; under
        ``scan`` there is one ``layers`` whose parameters have a leading layer axis.
    """

    config: TransformerConfig

    def setup(self):
        c = self.config
        if c.scan:
            self.layers: Any = TransformerLayer(c.layer(0))
        else:
            self.layers = [TransformerLayer(c.layer(i)) for i in range(c.num_layers)]
        if c.relative_buckets is not None:
            self.relative_bias = RelativeBias(c)
        if c.final_norm:
            self.norm = make_norm(c)

    def __call__(
        self,
        inputs: Array,
        *,
        lengths: Array | None = None,
        mask: Array | None = None,
        bias: Array | None = None,
        context: Array | None = None,
        context_lengths: Array | None = None,
        global_mask: Array | None = None,
        where: Array | None = None,
        hidden_states: bool = False,
        train: bool = False,
    ) -> Any:
        """Maps [B, L, H] to [B, L, H].

        Args:
          inputs, lengths, mask, context, context_lengths, global_mask, train: see
            ``TransformerLayer``.
          bias: see there; it replaces the relative position bias.
          where: int [B, P], the positions whose outputs are wanted, [B, P, H]; None = all. Of the
            last layer the others are not computed, unless it has a window or is scanned.
          hidden_states: return ``(outputs, states)`` with ``num_layers + 1`` states: the inputs,
            then what each layer gives, the last one after the final norm.
        """
        c = self.config
        if bias is None and c.relative_buckets is not None:
            positions = jnp.arange(inputs.shape[1])
            bias = self.relative_bias(positions, positions)
        given = {
            "lengths": lengths, "mask": mask, "bias": bias, "context": context,
            "context_lengths": context_lengths, "global_mask": global_mask, "train": train,
        }  # fmt: skip

        if where is not None and hidden_states:
            raise ValueError("hidden states are of all positions: where=None")
        early = None if c.scan or c.layer(c.num_layers - 1).window is not None else where

        def run(
            layer: nn.Module, x: Array, index: Array | int, where: Array | None = None
        ) -> Array:
            return layer(x, index, where=where, **given)

        if c.remat:
            run = nn.remat(run, prevent_cse=not c.scan)
        states = [inputs]
        x = inputs
        if c.scan:

            def body(layer: nn.Module, x: Array, index: Array) -> tuple[Array, Array | None]:
                x = run(layer, x, index)
                return x, x if hidden_states else None

            x, outputs = _scanned(body, c)(self.layers, x, jnp.arange(c.num_layers))
            if hidden_states:
                states += list(outputs)
        else:
            for index, layer in enumerate(self.layers):
                x = run(layer, x, index, early if index == c.num_layers - 1 else None)
                states.append(x)
        if where is not None and early is None:
            x = take_at(x, where)
        if c.final_norm:
            x = self.norm(x)
            states[-1] = x
        return (x, tuple(states)) if hidden_states else x

    def decode(
        self,
        inputs: Array,
        state: StackState | None = None,
        *,
        max_length: int = 0,
        context: Array | None = None,
        context_lengths: Array | None = None,
    ) -> tuple[Array, StackState]:
        """The next L positions of a causal stack.

        Args:
          inputs: [B, L, H], embedded tokens; L may be 0 at the start.
          state: after the tokens before; None at the start.
          max_length: how long the sequence will become, at least L; at the start.
          context: [B, S, H] for cross-attention; at the start.
          context_lengths: int [B]; at the start.

        Returns:
          Features [B, L, H] and the next state.
        """
        c = self.config
        if not c.causal:
            raise ValueError("a stack that is not causal cannot decode step by step")
        length = inputs.shape[1]
        first = state is None
        max_length = max(max_length, length)
        if state is None:
            state = StackState(jnp.int32(0), None, context_lengths)
        else:
            own = state.layers.own if c.scan else state.layers[0].own
            max_length = own.key.shape[-3]
        bias = None
        if c.relative_buckets is not None:
            queries = state.position + jnp.arange(length)
            bias = self.relative_bias(queries, jnp.arange(length if first else max_length))
        options = {
            "bias": bias, "context_lengths": state.context_lengths, "max_length": max_length,
        }  # fmt: skip

        def run(
            layer: nn.Module, x: Array, cache: LayerCache | None, index: Array | int
        ) -> tuple[Array, LayerCache]:
            if cache is None:
                cache = layer.start(context, index)
            return layer.decode(x, index, cache, **options)

        if c.scan:
            x, layers = _scanned(lambda layer, x, slices: run(layer, x, *slices), c)(
                self.layers, inputs, (state.layers, jnp.arange(c.num_layers))
            )
        else:
            x, caches = inputs, []
            old = state.layers or [None] * c.num_layers
            for index, (layer, cache) in enumerate(zip(self.layers, old)):
                x, cache = run(layer, x, cache, index)
                caches.append(cache)
            layers = tuple(caches)
        if c.final_norm:
            x = self.norm(x)
        return x, StackState(state.position + length, layers, state.context_lengths)


def _scanned(body: Callable, config: TransformerConfig) -> Callable:
    return nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=config.num_layers,
    )


_UNROLLED = re.compile(r"layers_(\d+)$")


def stack_layers(params: PyTree) -> PyTree:
    """Turns the parameters of unrolled stacks into those of scanned ones.

    Args:
      params: nested dictionaries; wherever there are ``layers_0`` … ``layers_{n-1}``, they become
        one ``layers`` with leaves [n, ...].
    """
    if not isinstance(params, dict):
        return params
    layers = {int(m[1]): v for k, v in params.items() if (m := _UNROLLED.match(k))}
    rest = {k: stack_layers(v) for k, v in params.items() if not _UNROLLED.match(k)}
    if layers:
        ordered = [layers[i] for i in range(len(layers))]
        rest["layers"] = jax.tree.map(lambda *x: jnp.stack(x), *ordered)
    return rest


def unstack_layers(params: PyTree) -> PyTree:
    """The inverse of ``stack_layers``."""
    if not isinstance(params, dict):
        return params
    result: dict[str, Any] = {}
    for key, value in params.items():
        if key == "layers":
            count = jax.tree.leaves(value)[0].shape[0]
            for i in range(count):
                result[f"layers_{i}"] = jax.tree.map(lambda x, i=i: x[i], value)
        else:
            result[key] = unstack_layers(value)
    return result


def transformer_rules(
    model: str = "model", fsdp: str = "fsdp", *, scan: bool = False
) -> tuple[tuple[str, PartitionSpec], ...]:
    """Partition rules of Transformer backbones: tensor parallel within layers, FSDP across.

    Heads and hidden units are split over ``model`` (Shoeybi et al. 2019), the other dimension of
    each matrix over ``fsdp``, so that a layer needs one sum over ``model`` per sublayer. The rules
    of the embeddings split the vocabulary over ``model``.

    Args:
      model: mesh axis of heads and hidden units.
      fsdp: mesh axis of the remaining dimension.
      scan: the layers' parameters have a leading layer axis.
    """
    lead = (None,) if scan else ()

    def spec(*axes: str | None) -> PartitionSpec:
        return PartitionSpec(*lead, *axes)

    inside = r"attention/(query|key|value)(_global)?"
    return (
        (rf"{inside}/kernel$", spec(fsdp, model, None)),
        (rf"{inside}/bias$", spec(model, None)),
        (r"attention/out/kernel$", spec(model, None, fsdp)),
        (r"mlp/(up|gate)/kernel$", spec(fsdp, model)),
        (r"mlp/(up|gate)/bias$", spec(model)),
        (r"mlp/down/kernel$", spec(model, fsdp)),
        (r"(^|/)(tokens|embedding|lm_head)/embedding$", PartitionSpec(model, fsdp)),
    )
