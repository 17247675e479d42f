"""Adaptive input embedding and adaptive softmax for large vocabularies.

Grave et al. (2017), Baevski and Auli (2019). Tokens are sorted by frequency and cut into clusters;
cluster i is embedded in ``features // div_val^i`` dimensions and projected to ``features``. The
softmax is hierarchical: the head scores the tokens of cluster 0 and one entry per further cluster.
One module is both, so that weights and projections are tied by construction.
"""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array


class AdaptiveSoftmax(nn.Module):
    """Embedding and output distribution over ``vocab_size`` tokens sorted by falling frequency.

    Attributes:
      vocab_size: V.
      features: H.
      cutoffs: increasing first tokens of clusters 1, 2, ...; all below V.
      div_val: each cluster is ``div_val`` times narrower than the one before.
      tie_weights: the softmax uses the embedding's token vectors.
      tie_projections: the softmax uses the embedding's projections (cluster 0 has none: it is
        already ``features`` wide).
      use_bias: one output bias per token and cluster.
      chunk_tokens: ``nll`` scores this many tokens at once and recomputes them in the backward
        pass, so that no [tokens, V] array exists.
      dtype: of the products; the log-probabilities are float32.
    """

    vocab_size: int
    features: int
    cutoffs: tuple[int, ...]
    div_val: int = 4
    tie_weights: bool = True
    tie_projections: bool = True
    use_bias: bool = True
    chunk_tokens: int = 256
    dtype: Any = None

    def setup(self):
        edges = (0, *self.cutoffs, self.vocab_size)
        if any(a >= b for a, b in itertools.pairwise(edges)):
            raise ValueError(
                f"cutoffs must increase strictly between 0 and vocab_size={self.vocab_size}, "
                f"got {self.cutoffs}"
            )
        widths = [self.features // self.div_val**i for i in range(len(edges) - 1)]
        if widths[-1] < 1:
            raise ValueError(
                f"{len(widths)} clusters with div_val={self.div_val} leave the last one no "
                f"dimension of features={self.features}"
            )
        self.edges, self.widths = edges, tuple(widths)
        deviation = self.features**-0.5

        def weights(name):
            init = nn.initializers.normal(deviation)
            return tuple(
                self.param(f"{name}_{i}", init, (edges[i + 1] - edges[i], width))
                for i, width in enumerate(widths)
            )

        def projections(name):
            init = nn.initializers.normal(deviation)
            return tuple(
                self.param(f"{name}_{i}", init, (width, self.features))
                for i, width in enumerate(widths)
                if i
            )

        self.embedding = weights("embedding")
        self.projection = projections("projection")
        self.output = self.embedding if self.tie_weights else weights("output")
        self.output_projection = (
            self.projection if self.tie_projections else projections("output_projection")
        )
        clusters = len(self.cutoffs)
        init = nn.initializers.normal(deviation)
        self.cluster = self.param("cluster", init, (clusters, self.features))
        if self.use_bias:
            zeros = nn.initializers.zeros
            self.bias = self.param("bias", zeros, (self.vocab_size,))
            self.cluster_bias = self.param("cluster_bias", zeros, (clusters,))

    def embed(self, tokens: Array) -> Array:
        """Token vectors [..., H], scaled by sqrt(H), of int tokens [...]."""
        result = jnp.zeros((*tokens.shape, self.features), self.dtype or jnp.float32)
        for i, table in enumerate(self.embedding):
            start, stop = self.edges[i : i + 2]
            inside = (tokens >= start) & (tokens < stop)
            vectors = table[jnp.where(inside, tokens - start, 0)].astype(result.dtype)
            if i:
                vectors = vectors @ self.projection[i - 1].astype(result.dtype)
            result = jnp.where(inside[..., None], vectors, result)
        return result * np.asarray(np.sqrt(self.features), result.dtype)

    def __call__(self, tokens: Array) -> Array:
        """As ``embed``."""
        return self.embed(tokens)

    def _parts(self, hidden: Array) -> list[Array]:
        """Normalised log-probabilities of the head and within each further cluster, float32."""
        dtype = self.dtype or hidden.dtype
        hidden = hidden.astype(dtype)
        parts = []
        for i, table in enumerate(self.output):
            x = hidden if i == 0 else hidden @ self.output_projection[i - 1].T.astype(dtype)
            logits = x @ table.T.astype(dtype)
            if self.use_bias:
                logits = logits + self.bias[self.edges[i] : self.edges[i + 1]].astype(dtype)
            if i == 0:
                clusters = hidden @ self.cluster.T.astype(dtype)
                if self.use_bias:
                    clusters = clusters + self.cluster_bias.astype(dtype)
                logits = jnp.concatenate([logits, clusters], axis=-1)
            parts.append(nn.log_softmax(logits.astype(jnp.float32)))
        return parts

    def log_probs(self, hidden: Array) -> Array:
        """Exact log-probabilities, float32 [..., V], of hidden states [..., H]."""
        head, *tails = self._parts(hidden)
        shortlist = self.edges[1]
        whole = [head[..., :shortlist]]
        whole += [head[..., shortlist + i, None] + tail for i, tail in enumerate(tails)]
        return jnp.concatenate(whole, axis=-1)

    def nll(self, hidden: Array, targets: Array) -> Array:
        """Negative log-likelihood of each target.

        Args:
          hidden: [..., H].
          targets: int [...].

        Returns:
          float32 [...].
        """
        shape = targets.shape
        hidden, targets = hidden.reshape(-1, self.features), targets.reshape(-1)
        count = len(targets)
        size = min(self.chunk_tokens, count)
        padding = -count % size
        hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, size, self.features)
        chunks = jnp.pad(targets, (0, padding)).reshape(-1, size)

        @jax.checkpoint
        def score(hidden, targets):
            head, *tails = self._parts(hidden)
            shortlist = self.edges[1]

            def pick(log_probs, index):
                return jnp.take_along_axis(log_probs, index[:, None], axis=-1)[:, 0]

            result = pick(head, jnp.minimum(targets, shortlist - 1))
            for i, tail in enumerate(tails):
                start, stop = self.edges[i + 1 : i + 3]
                inside = (targets >= start) & (targets < stop)
                value = head[:, shortlist + i] + pick(tail, jnp.where(inside, targets - start, 0))
                result = jnp.where(inside, value, result)
            return -result

        return lax.map(lambda x: score(*x), (hidden, chunks)).reshape(-1)[:count].reshape(shape)
