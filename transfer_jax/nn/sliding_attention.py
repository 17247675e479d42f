"""Attention within a window, and of a few global tokens: linear in the length (Longformer)."""

import jax
import jax.numpy as jnp

from transfer_jax.nn.attention import Attention

Array = jax.Array


class SlidingAttention(Attention):
    """Self-attention of Longformer (Beltagy et al. 2020, section 3).

    Position i sees the ``window`` positions on either side of it, itself, and the global tokens.
    Global tokens see everything, through projections of their own (``query_global``, …). The
    sequence is cut into chunks as long as the window; a chunk scores itself, its two neighbours and
    the global tokens in one call of ``attend``.

    Attributes:
      window: positions on either side.
      max_global: room for so many global tokens per example.
      Others: see ``Attention``; neither causal nor rotary.
    """

    window: int = 256
    max_global: int = 64

    def setup(self):
        super().setup()
        if self.window < 1 or self.causal or self.rotary:
            raise ValueError(
                f"attention within a window is neither causal nor rotary, and sees 1 position or "
                f"more on either side: causal={self.causal}, rotary={self.rotary}, "
                f"window={self.window}"
            )
        self.query_global, self.key_global, self.value_global = self._projections()

    def __call__(
        self,
        inputs: Array,
        context: Array | None = None,
        *,
        lengths: Array | None = None,
        bias: Array | None = None,
        mask: Array | None = None,
        positions: Array | None = None,
        global_mask: Array | None = None,
        train: bool = False,
    ) -> Array:
        """Attends within ``inputs``.

        Args:
          inputs: [B, L, H].
          context: None.
          lengths: int [B], valid positions.
          bias: None.
          mask: None.
          positions: None.
          global_mask: bool [B, L], which tokens are global; None = none.
          train: dropout on.

        Returns:
          [B, L, H]. Where an example has more than ``max_global`` global tokens, NaN.

        Raises:
          ValueError: one of what must be None is not; or there are more global tokens than
            ``max_global``, where that can be seen before the computation runs.
        """
        if any(given is not None for given in (context, bias, mask, positions)):
            raise ValueError("attention within a window takes no context, bias, mask or positions")
        query, (key, value) = self.query(inputs), self.project(inputs)
        batch, length = inputs.shape[:2]
        valid = jnp.ones((batch, length), bool)
        if lengths is not None:
            valid = jnp.arange(length) < lengths[:, None]
        if global_mask is None and not self.is_initializing():
            return self.out(self._local(query, key, value, valid, None, None, train))

        chosen = valid & (False if global_mask is None else jnp.asarray(global_mask, bool))
        count = chosen.sum(1)
        room = min(self.max_global, length)
        if not isinstance(count, jax.core.Tracer) and int(count.max()) > room:
            raise ValueError(
                f"an example has {int(count.max())} global tokens: there is room for "
                f"max_global={self.max_global}"
            )
        # The global tokens' positions first, each in its order.
        where = jnp.argsort(~chosen, axis=1, stable=True)[:, :room]
        present = jnp.arange(room) < count[:, None]

        def take(x: Array) -> Array:
            return jnp.take_along_axis(x, where.reshape(*where.shape, *[1] * (x.ndim - 2)), axis=1)

        y = self._local(
            query, key, value, valid & ~chosen, (take(key), take(value)), present, train
        )
        everywhere = self.attend(
            self.query_global(take(inputs)), self.key_global(inputs), self.value_global(inputs),
            lengths=lengths, train=train,
        )  # fmt: skip
        target = jnp.where(present, where, length)  # beyond the end = dropped
        y = y.at[jnp.arange(batch)[:, None], target].set(everywhere, mode="drop")
        y = jnp.where((count <= room)[:, None, None, None], y, jnp.nan)
        return self.out(y)

    def _local(
        self,
        query: Array,
        key: Array,
        value: Array,
        seen: Array,
        others: tuple[Array, Array] | None,
        present: Array | None,
        train: bool,
    ) -> Array:
        """Attention [B, L, heads, D] to neighbours that are ``seen`` [B, L], and to ``others``.

        Args:
          query, key, value: [B, L, heads, D].
          seen: bool [B, L].
          others: keys and values [B, G, heads, D] that every position sees where ``present``.
          present: bool [B, G].
          train: dropout on.
        """
        batch, length, heads, width = query.shape
        size = min(self.window, length)
        count = -(-length // size)
        end = count * size - length

        def chunks(x: Array) -> Array:
            """[B, L, ...] to [B, count, 3 size, ...]: each chunk between its neighbours."""
            x = jnp.pad(x, ((0, 0), (size, end + size), *[(0, 0)] * (x.ndim - 2)))
            x = x.reshape(batch, count + 2, size, *x.shape[2:])
            return jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=2)

        distance = jnp.arange(3 * size) - size - jnp.arange(size)[:, None]
        band = jnp.abs(distance) <= self.window
        mask = chunks(seen)[:, :, None] & band  # [B, count, size, 3 size]
        keys, values = chunks(key), chunks(value)
        if others is not None and present is not None:
            shape = (batch, count, *others[0].shape[1:])
            keys, values = (
                jnp.concatenate([x, jnp.broadcast_to(y[:, None], shape)], axis=2)
                for x, y in zip((keys, values), others)
            )
            columns = jnp.broadcast_to(present[:, None, None], (*mask.shape[:3], present.shape[1]))
            mask = jnp.concatenate([mask, columns], axis=-1)
        query = jnp.pad(query, ((0, 0), (0, end), (0, 0), (0, 0)))
        y = self.attend(
            query.reshape(batch * count, size, heads, width),
            keys.reshape(batch * count, -1, heads, width),
            values.reshape(batch * count, -1, heads, width),
            mask=mask.reshape(batch * count, 1, size, -1), train=train,
        )  # fmt: skip
        return y.reshape(batch, count * size, heads, width)[:, :length]
