"""Generation: greedy, sampled and beam search, over anything that steps from token to token.

The three searches are pure functions of ``step(tokens, state) -> (logits, state)``, to be called
inside a jitted function. ``generate_targets`` and ``generate_continuations`` are compiled and
choose the search by their ``Decoding``. What comes out is what ``transformers`` gives, token for
token.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from transfer_jax.nn.transformer import StackState

Array = jax.Array
PyTree = Any
Step = Callable[[Array, PyTree], tuple[Array, PyTree]]

_NEVER = -1e9  # the score of what does not exist (yet)


def _static(default: Any = None) -> Any:
    return flax.struct.field(pytree_node=False, default=default)


class Decoding(flax.struct.PyTreeNode):
    """How sequences are generated.

    Greedy, unless ``sample`` or ``num_beams`` says otherwise. Numbers that only scale something are
    leaves: changing them compiles nothing anew.

    Attributes:
      max_tokens: T, how many tokens are generated at most, the end token among them.
      min_tokens: the end token comes after at least so many others.
      start_id: the first input of a decoder that has an encoder.
      eos_id: ends a sequence; None = all have T tokens.
      pad_id: what follows the end.
      forced_bos_id: the first token that is generated, such as a language.
      forced_eos_id: the last token of a sequence that reaches T.
      no_repeat_ngram: no sequence of so many tokens occurs twice, the prompt included; 0 = any may.
      num_beams: K, hypotheses that are followed.
      early_stopping: when beams stop: True = with K finished ones; False = when the best open one,
        at its present length, is worse than the worst finished; 'never' = at the length that
        would suit it best.
      length_penalty: finished beams are ranked by log-probability / length ** penalty.
      sample: draw tokens.
      temperature: of drawing: divides the logits.
      top_k: draw among the k likeliest; None = all.
      top_p: draw among the likeliest that together have this probability; None = all.
    """

    max_tokens: int = _static()
    min_tokens: int = _static(0)
    start_id: int = _static(0)
    eos_id: int | None = _static()
    pad_id: int = _static(0)
    forced_bos_id: int | None = _static()
    forced_eos_id: int | None = _static()
    no_repeat_ngram: int = _static(0)
    num_beams: int = _static(1)
    early_stopping: bool | Literal["never"] = _static(False)
    length_penalty: float | Array = 1.0
    sample: bool = _static(False)
    temperature: float | Array = 1.0
    top_k: int | None = _static()
    top_p: float | Array | None = None

    def check(self) -> None:
        """Refuses what contradicts itself.

        Raises:
          ValueError: saying what.
        """
        if self.max_tokens is None or self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: at least one token is generated.")
        if self.num_beams < 1:
            raise ValueError(f"num_beams={self.num_beams}: at least one beam is needed.")
        if self.sample and self.num_beams > 1:
            raise ValueError("sample=True draws one sequence: it does not go with num_beams > 1.")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(
                f"early_stopping={self.early_stopping!r}; choose True, False or 'never'."
            )
        if self.eos_id is None and (self.min_tokens or self.forced_eos_id is not None):
            raise ValueError("min_tokens and forced_eos_id need an eos_id.")


class Generated(NamedTuple):
    """Generated sequences.

    Attributes:
      tokens: int32 [B, T], padded after the end token; beams [B, K, T], the best first.
      lengths: int32 [B] or [B, K], how many tokens, the end token among them.
      scores: float32 [B] or [B, K], the sum of the log-probabilities that the model (before any
        temperature) gives the tokens, forced ones not counted; for beams over length ** penalty.
    """

    tokens: Array
    lengths: Array
    scores: Array


def take_rows(state: PyTree, rows: Array) -> PyTree:
    """The state of other rows of the batch, see ``StackState.take``.

    Args:
      state: leaves [B, ...] and scalars, or ``StackState``s.
      rows: int [N].
    """

    def take(x: Any) -> Any:
        if isinstance(x, StackState):
            return x.take(rows)
        return jnp.take(x, rows, axis=0) if jnp.ndim(x) else x

    return jax.tree.map(take, state, is_leaf=lambda x: isinstance(x, StackState))


def greedy(
    step: Step, state: PyTree, prompt: Array, decoding: Decoding, *, logits: Array | None = None
) -> Generated:
    """The likeliest token, each time.

    Args:
      step: tokens [B] and the state before them -> logits [B, V] of the next ones, and the state.
      state: before the prompt's last token; after it, if ``logits`` are given.
      prompt: int [B, P], P >= 1, the tokens so far.
      decoding: the rules.
      logits: [B, V] of the first new token.
    """
    return _one_by_one(
        step, state, prompt, decoding, logits, lambda _, scores: jnp.argmax(scores, axis=-1)
    )


def sample(
    step: Step,
    state: PyTree,
    prompt: Array,
    decoding: Decoding,
    *,
    rng: Array,
    logits: Array | None = None,
) -> Generated:
    """Tokens drawn from the model's distribution, sharpened and cut off as ``decoding`` says.

    Args:
      step, state, prompt, decoding, logits: see ``greedy``.
      rng: a typed key.
    """
    keys = jax.random.split(rng, decoding.max_tokens)

    def draw(count: Array, scores: Array) -> Array:
        return jax.random.categorical(
            keys[count], _cut_off(scores / decoding.temperature, decoding)
        )

    return _one_by_one(step, state, prompt, decoding, logits, draw)


def _cut_off(scores: Array, decoding: Decoding) -> Array:
    """-inf outside the k likeliest tokens and the nucleus (Holtzman et al. 2020)."""
    if decoding.top_k is not None:
        smallest = lax.top_k(scores, min(decoding.top_k, scores.shape[-1]))[0][..., -1:]
        scores = jnp.where(scores < smallest, -jnp.inf, scores)
    if decoding.top_p is not None:
        ordered = jnp.sort(scores, axis=-1, descending=True)
        likely = nn.softmax(ordered, axis=-1)
        inside = jnp.cumsum(likely, axis=-1) - likely < decoding.top_p
        smallest = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        scores = jnp.where(scores < smallest, -jnp.inf, scores)
    return scores


class _Progress(NamedTuple):
    """Sequences under way.

    Attributes:
      new: int32 scalar, tokens generated.
      tokens: int32 [N, P + T].
      finished: bool [N].
      scores: float32 [N].
    """

    new: Array
    tokens: Array
    finished: Array
    scores: Array


def _one_by_one(
    step: Step,
    state: PyTree,
    prompt: Array,
    decoding: Decoding,
    logits: Array | None,
    choose: Callable[[Array, Array], Array],
) -> Generated:
    decoding.check()
    rows, start = prompt.shape

    def extend(now: _Progress, logits: Array) -> _Progress:
        scores = _rules(nn.log_softmax(logits), now.tokens, start, now.new, decoding)
        token = choose(now.new, scores).astype(jnp.int32)
        score = jnp.take_along_axis(scores, token[:, None], axis=-1)[:, 0]
        token = jnp.where(now.finished, decoding.pad_id, token)
        ended = now.finished if decoding.eos_id is None else token == decoding.eos_id
        return _Progress(
            now.new + 1,
            now.tokens.at[:, start + now.new].set(token),
            now.finished | ended,
            now.scores + jnp.where(now.finished, 0.0, score),
        )

    def body(carry: tuple[_Progress, PyTree]) -> tuple[_Progress, PyTree]:
        now, state = carry
        logits, state = step(now.tokens[:, start + now.new - 1], state)
        return extend(now, logits), state

    def unfinished(carry: tuple[_Progress, PyTree]) -> Array:
        return (carry[0].new < decoding.max_tokens) & ~jnp.all(carry[0].finished)

    now = _Progress(
        jnp.int32(0), _room(prompt, decoding), jnp.zeros(rows, bool), jnp.zeros(rows, jnp.float32)
    )
    if logits is not None:
        now = extend(now, logits)
    now, _ = lax.while_loop(unfinished, body, (now, state))
    return _generated(now.tokens[:, start:], now.scores, decoding)


def _room(prompt: Array, decoding: Decoding) -> Array:
    """The prompt [N, P] and place for what comes, [N, P + T]."""
    new = ((0, 0), (0, decoding.max_tokens))
    return jnp.pad(prompt.astype(jnp.int32), new, constant_values=decoding.pad_id)


def _generated(tokens: Array, scores: Array, decoding: Decoding) -> Generated:
    lengths = jnp.full(tokens.shape[:-1], decoding.max_tokens, jnp.int32)
    if decoding.eos_id is not None:
        ends = tokens == decoding.eos_id
        first = jnp.argmax(ends, axis=-1).astype(jnp.int32) + 1
        lengths = jnp.where(ends.any(-1), first, lengths)
    return Generated(tokens, lengths, scores)


def _rules(scores: Array, tokens: Array, start: int, count: Array, decoding: Decoding) -> Array:
    """The scores [N, V] of the next token, -inf where a rule forbids it, 0 where one forces it."""
    vocabulary = jnp.arange(scores.shape[-1])

    def force(scores: Array, token: int, when: Array | bool) -> Array:
        return jnp.where(when, jnp.where(vocabulary == token, 0.0, -jnp.inf), scores)

    if decoding.no_repeat_ngram:
        repeats = _repeats(tokens, start + count, decoding.no_repeat_ngram, scores.shape[-1])
        scores = jnp.where(repeats, -jnp.inf, scores)
    if decoding.min_tokens:
        too_early = (vocabulary == decoding.eos_id) & (count < decoding.min_tokens)
        scores = jnp.where(too_early, -jnp.inf, scores)
    if decoding.forced_bos_id is not None:
        scores = force(scores, decoding.forced_bos_id, count == 0)
    if decoding.forced_eos_id is not None:
        scores = force(scores, decoding.forced_eos_id, count == decoding.max_tokens - 1)
    return scores


def _repeats(tokens: Array, position: Array, size: int, vocabulary: int) -> Array:
    """Which tokens [N, V] at ``position`` would end an n-gram that tokens [N, L] already have."""
    rows, length = tokens.shape
    places = length - size + 1
    if places < 1:
        return jnp.zeros((rows, vocabulary), bool)
    same = jnp.arange(places) + size - 1 < position
    for k in range(size - 1):
        last = tokens[:, position - size + 1 + k]
        same = same & (tokens[:, k : k + places] == last[:, None])
    same = jnp.broadcast_to(same, (rows, places))
    ends = tokens[:, size - 1 :]
    return jnp.zeros((rows, vocabulary), bool).at[jnp.arange(rows)[:, None], ends].max(same)


class _Beams(NamedTuple):
    """Hypotheses under way; those that are finished stand apart.

    Attributes:
      new: int32 scalar, tokens generated.
      tokens: int32 [B, K, P + T], open ones, the best first.
      scores: float32 [B, K], their log-probabilities.
      done_tokens: int32 [B, K, P + T], finished ones, the best first.
      done_scores: float32 [B, K], after the length penalty.
      done: bool [B, K], is there one?
      open: bool [B], could an open one still become better than the finished ones?
      stuck: bool, all candidates of the last token have ended.
    """

    new: Array
    tokens: Array
    scores: Array
    done_tokens: Array
    done_scores: Array
    done: Array
    open: Array
    stuck: Array


def beam_search(
    step: Step, state: PyTree, prompt: Array, decoding: Decoding, *, logits: Array | None = None
) -> Generated:
    """The best of K hypotheses, as in ``transformers``.

    Each step ranks the 2K best continuations of the K open hypotheses; those among the first K that
    end are finished, and the best K that do not end stay open.

    Args:
      step, state, prompt, decoding, logits: see ``greedy``; ``step`` is given B * K rows, the
        beams of an example in succession, after ``take_rows`` has brought the state there.
    """
    decoding.check()
    (batch, start), beams = prompt.shape, decoding.num_beams
    penalty = jnp.asarray(decoding.length_penalty, jnp.float32)
    first = jnp.arange(batch)[:, None] * beams

    def gather(x: Array, index: Array) -> Array:
        return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)

    def extend(now: _Beams, logits: Array) -> tuple[_Beams, Array]:
        """The next beams, and which rows [B, K] of the batch they continue."""
        size = logits.shape[-1]
        flat = now.tokens.reshape(batch * beams, -1)
        scores = _rules(nn.log_softmax(logits), flat, start, now.new, decoding)
        scores = scores.reshape(batch, beams, size) + now.scores[..., None]
        # Candidates: so many that K of them do not end.
        scores, index = lax.top_k(scores.reshape(batch, -1), 2 * beams)
        parent, token = index // size, (index % size).astype(jnp.int32)
        tokens = gather(now.tokens, parent).at[:, :, start + now.new].set(token)
        count = now.new + 1
        ended = jnp.full(token.shape, count == decoding.max_tokens)
        if decoding.eos_id is not None:
            ended = ended | (token == decoding.eos_id)

        open_scores, best = lax.top_k(jnp.where(ended, scores + _NEVER, scores), beams)

        length = count.astype(jnp.float32)
        accepted = ended & (jnp.arange(2 * beams) < beams)
        full = now.done.all(-1) if decoding.early_stopping is True else jnp.zeros(batch, bool)
        accepted_scores = jnp.where(
            accepted & (now.open & ~full)[:, None], scores / length**penalty, _NEVER
        )
        done_scores, which = lax.top_k(
            jnp.concatenate([now.done_scores, accepted_scores], axis=1), beams
        )
        done = gather(jnp.concatenate([now.done, accepted], axis=1), which)
        done_tokens = gather(jnp.concatenate([now.done_tokens, tokens], axis=1), which)

        reach = length
        if decoding.early_stopping == "never":
            reach = jnp.where(penalty > 0, float(decoding.max_tokens), length)
        worst = jnp.where(done.all(-1), done_scores[:, -1], _NEVER)
        still_open = now.open & (open_scores[:, 0] / reach**penalty > worst)
        after = _Beams(
            count, gather(tokens, best), open_scores, done_tokens, done_scores, done, still_open,
            ended.all(),
        )  # fmt: skip
        return after, first + gather(parent, best)

    def body(carry: tuple[_Beams, PyTree]) -> tuple[_Beams, PyTree]:
        now, state = carry
        last = now.tokens[:, :, start + now.new - 1].reshape(-1)
        logits, state = step(last, state)
        now, rows = extend(now, logits)
        return now, take_rows(state, rows.reshape(-1))

    def unfinished(carry: tuple[_Beams, PyTree]) -> Array:
        now = carry[0]
        go_on = now.open.any() & ~now.stuck
        return go_on & ~now.done.all() if decoding.early_stopping is True else go_on

    tokens = jnp.repeat(_room(prompt, decoding)[:, None], beams, axis=1)
    # Only the first of the equal beams counts at first.
    scores = jnp.zeros((batch, beams)).at[:, 1:].set(_NEVER)
    now = _Beams(
        jnp.int32(0), tokens, scores, tokens, jnp.full((batch, beams), _NEVER),
        jnp.zeros((batch, beams), bool), jnp.ones(batch, bool), jnp.zeros((), bool),
    )  # fmt: skip
    rows = jnp.repeat(jnp.arange(batch), beams)
    state = take_rows(state, rows)
    if logits is not None:
        now, rows = extend(now, jnp.take(logits, rows, axis=0))
        state = take_rows(state, rows.reshape(-1))
    now, _ = lax.while_loop(unfinished, body, (now, state))
    return _generated(now.done_tokens[:, :, start:], now.done_scores, decoding)


def _search(
    step: Step, state: PyTree, prompt: Array, decoding: Decoding, logits: Array | None, rng: Any
) -> Generated:
    """The search that ``decoding`` describes; of beams, the best one."""
    if decoding.num_beams > 1:
        beams = beam_search(step, state, prompt, decoding, logits=logits)
        return jax.tree.map(lambda x: x[:, 0], beams)
    if decoding.sample:
        if rng is None:
            raise ValueError("decoding.sample=True draws tokens: give rng=jax.random.key(…).")
        return sample(step, state, prompt, decoding, rng=rng, logits=logits)
    return greedy(step, state, prompt, decoding, logits=logits)


@functools.partial(jax.jit, static_argnames=("module",))
def _targets(module, variables, inputs, decoding, lengths, rng) -> Generated:
    state = module.apply(
        variables, inputs, lengths=lengths, max_length=decoding.max_tokens, method="start"
    )
    prompt = jnp.full((inputs.shape[0], 1), decoding.start_id, jnp.int32)

    def step(tokens: Array, state: PyTree) -> tuple[Array, PyTree]:
        return module.apply(variables, tokens, state, method="step_logits")

    return _search(step, state, prompt, decoding, None, rng)


def generate_targets(
    module: nn.Module,
    variables: PyTree,
    inputs: Array,
    decoding: Decoding,
    *,
    lengths: Array | None = None,
    rng: Array | None = None,
) -> Generated:
    """The targets that an encoder-decoder gives to ``inputs``.

    Args:
      module: ``T5``, ``Bart`` or another one with ``start`` and ``step_logits``.
      variables: its variables.
      inputs: int [B, S].
      decoding: how.
      lengths: int [B], valid tokens of ``inputs``.
      rng: a typed key, for sampling.

    Returns:
      See ``Generated``; the start token is not among the tokens.
    """
    return _targets(module, variables, inputs, decoding, lengths, rng)


@functools.partial(jax.jit, static_argnames=("module",))
def _continuations(module, variables, prompt, systems, decoding, rng) -> Generated:
    if systems is None:
        systems = module.apply(variables, method="discretise")
    logits, state = module.apply(
        variables, prompt, systems, prompt.shape[1] + decoding.max_tokens, method="prefill_logits"
    )

    def step(tokens: Array, state: PyTree) -> tuple[Array, PyTree]:
        return module.apply(variables, tokens, state, systems, method="step_logits")

    return _search(step, state, prompt, decoding, logits, rng)


def generate_continuations(
    module: nn.Module,
    variables: PyTree,
    prompt: Array,
    decoding: Decoding,
    *,
    rng: Array | None = None,
    mode: str | None = None,
) -> Generated:
    """Continues prompts: one pass over the prompt, then token by token.

    Args:
      module: ``GPT2``, ``LanguageModel`` or another one with ``discretise``, ``prefill_logits`` and
        ``step_logits``.
      variables: its variables.
      prompt: int [B, P], P >= 1, without padding.
      decoding: how.
      rng: a typed key, for sampling.
      mode: see ``SequenceModel.discretise``.

    Returns:
      See ``Generated``; the prompt is not among the tokens.

    Raises:
      ValueError: the prompt is empty, or ``decoding`` contradicts itself.
    """
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt must be [B, P] with P >= 1, got {prompt.shape}")
    systems = None
    if mode is not None:  # an eigendecomposition on the host
        systems = module.apply(variables, mode, method="discretise")
    return _continuations(module, variables, prompt, systems, decoding, rng)
