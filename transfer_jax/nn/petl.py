"""Parameter-efficient transfer: small learned changes of the activations of a frozen network.

He et al. (2022), "Towards a Unified View of Parameter-Efficient Transfer Learning": adapters,
prefix tuning and LoRA all replace a hidden state ``h`` by ``compose(h, dh)`` with
``dh = f(z W_down) W_up``. Their differences are the fields of ``Delta``; a *method* is a tuple of
parts, and the paper's methods are functions here (``pfeiffer``, ``lora``, ``mam``, ...).

The network is not changed. Its modules are met by ``flax.linen.intercept_methods``::

    method = petl.mam(prefix=16, bottleneck=16, scale=2.0)
    added = petl.init(method, key, lambda p: model.apply({"params": p}, tokens), params)
    with petl.adapted(method, added):
        logits = model.apply({"params": params}, tokens)

``adapted`` acts while a function is traced: it belongs inside what is jitted (for generation, see
``AdaptedModule``).

The added parameters are ``{part name: tree}``, where the tree has the shape of the network's own:
what modifies the module ``stack/layers_0/mlp`` lies under that path. Under a scanned stack it lies
under ``stack/layers/mlp`` with a leading layer axis, and ``stack_layers`` turns the one into the
other, as it does for the network.

Every method starts as the identity where its last factor is drawn as zeros (``init='lora'``).
"""

import contextlib
import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from transfer_jax import trees
from transfer_jax.nn.initializers import torch_uniform
from transfer_jax.nn.transformer import TransformerLayer, TransformerStack

Array = jax.Array
PyTree = Any
Dropout = Callable[[Array], Array]

FORMS = ("relu", "identity", "softmax")
INSERTIONS = ("parallel", "sequential")
MODIFIED = ("heads", "output", "sublayer", "normed")
COMPOSITIONS = ("simple", "scaled", "gated")
INITS = ("bert", "lora")
NORMS = ("none", "in", "out")

NORM_EPSILON = 1e-5


class Site(NamedTuple):
    """A place of the network where a part goes.

    Attributes:
      path: of the module that is modified.
      inputs: feature shape of what the change reads.
      outputs: feature shape of what is changed; (heads, D) at heads.
      layer: path of the layer around it, '' if there is none.
      layers: how many layers are scanned together there; None = not scanned.
    """

    path: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    layer: str = ""
    layers: int | None = None

    def unrolled(self) -> list[str]:
        """The paths of this site in the unrolled stack, one per layer."""
        if self.layers is None:
            return [self.path]
        rest = self.path.removeprefix(self.layer)
        return [f"{self.layer}_{i}{rest}" for i in range(self.layers)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """One point of the design space: ``h <- compose(h, dh)`` with ``dh = f(z W_down) W_up``.

    Attributes:
      name: of the part, unique in its method.
      where: regular expressions of the paths of modified modules.
      form: f: 'relu', 'identity', or 'softmax' (over the bottleneck; per head only).
      insertion: 'parallel': z is what the modified module reads; 'sequential': z is h.
      modified: h, one of

        * 'heads': the average under the attention weights, before the output projection;
        * 'output': what any module gives;
        * 'sublayer': what a Transformer sublayer gives, after its dropout, before the residual sum;
        * 'normed': the same, but z is the norm of the residual sum, which is then taken again with
          the change in it (Pfeiffer et al. 2021).
      composition: 'simple' ``h + dh``; 'scaled' ``h + s dh``; 'gated' ``(1 - g) h + g dh``, where g
        is the softmax weight that the bottleneck has beside the keys (prefix tuning).
      per_head: ``f(q_i P_k,i^T) P_v,i`` in each head i, with the query already scaled; P_k, P_v
        [r, heads, D]. Else one bottleneck for the whole width.
      concat: compute a gated softmax by putting P_k and P_v before keys and values.
      bottleneck: r, or the length of a prefix.
      scale: s; None = learned, from 1.
      init: 'bert': both factors N(0, 0.02^2); 'lora': W_down uniform in +-1 / sqrt(inputs), W_up 0.
      norm: a layer norm 'in' (on z), 'out' (on s dh) or 'none'.
      dropout: rate, on f's values; on z where the factors are a LoRA. None = the host layer's, for
        attention that of the attention weights.
      mlp: hidden width of the network that makes a prefix during training, see ``fold``; None =
        the prefix is learned directly.

    Subclasses may change ``draw`` and ``delta``.
    """

    name: str
    where: tuple[str, ...]
    form: str = "relu"
    insertion: str = "parallel"
    modified: str = "sublayer"
    composition: str = "simple"
    per_head: bool = False
    concat: bool = False
    bottleneck: int = 8
    scale: float | None = 1.0
    init: str = "lora"
    norm: str = "none"
    dropout: float | None = None
    mlp: int | None = None

    def __post_init__(self):
        allowed = {
            "form": FORMS, "insertion": INSERTIONS, "modified": MODIFIED,
            "composition": COMPOSITIONS, "init": INITS, "norm": NORMS,
        }  # fmt: skip
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise ValueError(
                    f"Delta.{field}={getattr(self, field)!r}; choose one of {', '.join(values)}."
                )
        wrong = {
            "form='softmax' needs per_head=True": self.form == "softmax" and not self.per_head,
            "per_head=True needs modified='heads'": self.per_head and self.modified != "heads",
            "modified='heads' is inserted in parallel": (
                self.modified == "heads" and self.insertion != "parallel"
            ),
            "modified='normed' is inserted sequentially": (
                self.modified == "normed" and self.insertion != "sequential"
            ),
            "composition='gated' and concat=True need form='softmax'": (
                self.form != "softmax" and (self.composition == "gated" or self.concat)
            ),
            "concat=True needs composition='gated'": self.concat and self.composition != "gated",
            "scale needs composition='scaled'": self.scale != 1 and self.composition != "scaled",
            "mlp needs per_head=True": self.mlp is not None and not self.per_head,
            f"bottleneck={self.bottleneck} is negative": self.bottleneck < 0,
            "where is empty": not self.where,
        }
        for message, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(f"Delta {self.name!r}: {message}.")

    @property
    def is_lora(self) -> bool:
        """Whether the change is linear in what a projection reads, so that it can be merged."""
        return (
            self.modified == "output" and self.insertion == "parallel" and self.form == "identity"
        )

    def draw(self, key: Array, site: Site) -> PyTree:
        """Initial float32 parameters of one site (one layer of a scanned one).

        Returns:
          ``{"key", "value"}`` [r, heads, D] per head; ``{"kernel": {"a" [*inputs, r], "b"
          [r, *outputs]}}`` for LoRA; else ``{"down": {"kernel" [d, r], "bias"}, "up": {"kernel"
          [r, *outputs], "bias"}}``, with ``norm: {"scale", "bias"}`` where there is one. All with
          ``scale`` [] where it is learned.
        """
        first, second = jax.random.split(key)

        def draw(key: Array, shape: tuple[int, ...], fan_in: int, *, last: bool) -> Array:
            if self.init == "bert":
                return 0.02 * jax.random.normal(key, shape)
            return jnp.zeros(shape) if last else torch_uniform(fan_in)(key, shape)

        r, fan_in = self.bottleneck, math.prod(site.inputs)
        shape: tuple[int, ...]
        params: dict[str, Any]
        if self.per_head:
            shape = (r, *site.outputs)
            params = {
                "key": draw(first, shape, shape[-1], last=False),
                "value": draw(second, shape, shape[-1], last=True),
            }
        elif self.is_lora:
            a = draw(first, (*site.inputs, r), fan_in, last=False)
            params = {"kernel": {"a": a, "b": draw(second, (r, *site.outputs), r, last=True)}}
        else:
            down = draw(first, (fan_in, r), fan_in, last=False)
            up = draw(second, (r, *site.outputs), r, last=True)
            params = {
                "down": {"kernel": down, "bias": jnp.zeros(r)},
                "up": {"kernel": up, "bias": jnp.zeros(site.outputs)},
            }
            if self.norm != "none":
                shape = site.inputs if self.norm == "in" else site.outputs
                params["norm"] = {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}
        if self.scale is None:
            params["scale"] = jnp.ones(())
        return params

    def delta(self, params: PyTree, z: Array, dropout: Dropout = lambda x: x) -> Array:
        """The change ``s dh`` [..., *outputs] that is added, of z [..., *inputs].

        Per head, z is the scaled query [B, L, heads, D].

        Args:
          params: as of ``draw``.
          z: what the change reads.
          dropout: applied where the class says.
        """
        s = jnp.asarray(params["scale"] if self.scale is None else self.scale, z.dtype)
        if self.per_head:
            scores = jnp.einsum("blhd,phd->blhp", z, params["key"].astype(z.dtype))
            return s * self._average(scores, params["value"], dropout)
        if self.is_lora:
            a, b = (params["kernel"][x].astype(z.dtype) for x in ("a", "b"))
            return s * jnp.tensordot(jnp.tensordot(dropout(z), a, a.ndim - 1), b, 1)
        down, up = params["down"], params["up"]
        if self.norm == "in":
            z = _layer_norm(z, params["norm"])
        hidden = z @ down["kernel"].astype(z.dtype) + down["bias"].astype(z.dtype)
        hidden = dropout(nn.relu(hidden) if self.form == "relu" else hidden)
        outputs = jnp.tensordot(hidden, up["kernel"].astype(z.dtype), 1)
        outputs = s * (outputs + up["bias"].astype(z.dtype))
        return _layer_norm(outputs, params["norm"]) if self.norm == "out" else outputs

    def _average(self, scores: Array, value: Array, dropout: Dropout) -> Array:
        scores32 = scores.astype(jnp.float32)
        weights = {"softmax": nn.softmax, "relu": nn.relu, "identity": lambda x: x}[self.form](
            scores32
        ).astype(scores.dtype)
        return jnp.einsum("blhp,phd->blhd", dropout(weights), value.astype(scores.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """Vectors before the inputs of an encoder (Lester et al. 2021), N(0, 0.02^2) at first.

    They are put before what ``where`` reads, by default the norm of the embeddings, so they have no
    position of their own and go through that norm and its dropout.

    Attributes:
      name: of the part.
      length: l.
      where: regular expressions of the module before whose input they are put.
      context: the encoder's outputs keep them, for a decoder that attends to them; else the
        outputs are those of the true inputs only.
    """

    name: str = "prompt"
    length: int = 20
    where: tuple[str, ...] = (r"^(encoder_)?embedding_norm$",)
    context: bool = False

    def draw(self, key: Array, site: Site) -> PyTree:
        """``{"prompt" [l, H]}``."""
        return {"prompt": 0.02 * jax.random.normal(key, (self.length, *site.inputs))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unfrozen:
    """Parameters of the network itself that are trained: nothing is added.

    Attributes:
      name: of the part.
      where: regular expressions of the parameters' paths.
    """

    name: str = "unfrozen"
    where: tuple[str, ...] = ("",)


Part = Delta | Prompt | Unfrozen
Method = tuple[Part, ...]


# -- the named points of the design space -----------------------------------------------------

ATTENTION, ATTENTION_OUT, FFN = r"attention$", r"attention/out$", r"mlp$"


def houlsby(bottleneck: int = 64) -> Method:
    """Adapters after attention and feed-forward layer (Houlsby et al. 2019), as the paper runs it.

    The one after attention norms its input and is drawn as ``init='bert'``.
    """
    return (*sequential_attention(bottleneck), *sequential_ffn(bottleneck))


def sequential_attention(bottleneck: int = 64) -> Method:
    """An adapter on the attention's output, before dropout and residual sum."""
    return (
        Delta(
            name="adapter_attention", where=(ATTENTION_OUT,), modified="output",
            insertion="sequential", bottleneck=bottleneck, init="bert", norm="in",
        ),
    )  # fmt: skip


def sequential_ffn(bottleneck: int = 64, *, init: str = "bert") -> Method:
    """An adapter on the feed-forward layer's output: ``LN(y + u + a(u))``."""
    return (
        Delta(
            name="adapter_ffn", where=(FFN,), insertion="sequential", bottleneck=bottleneck,
            init=init,
        ),
    )  # fmt: skip


def pfeiffer(bottleneck: int = 64, *, init: str = "bert") -> Method:
    """One adapter a layer (Pfeiffer et al. 2021): ``v = LN(y + u)``, then ``LN(y + u + a(v))``."""
    return (
        Delta(
            name="adapter", where=(FFN,), modified="normed", insertion="sequential",
            bottleneck=bottleneck, init=init,
        ),
    )  # fmt: skip


def parallel_attention(bottleneck: int = 64) -> Method:
    """An adapter beside the attention, whose change enters before the output projection."""
    return (
        Delta(
            name="adapter_attention", where=(ATTENTION,), modified="heads", bottleneck=bottleneck,
            init="bert", norm="in",
        ),
    )  # fmt: skip


def parallel_ffn(bottleneck: int = 64, *, scale: float | None = 1.0, init: str = "lora") -> Method:
    """An adapter beside the feed-forward layer: ``LN(y + Dropout(FFN(y)) + s a(y))``.

    Args:
      bottleneck: r.
      scale: s; the paper's scaled parallel adapter has 4 on BART and 2 on RoBERTa. None = learned.
      init: see ``Delta``.
    """
    return (
        Delta(
            name="adapter_ffn", where=(FFN,), bottleneck=bottleneck, scale=scale, init=init,
            composition="simple" if scale == 1.0 else "scaled",
        ),
    )  # fmt: skip


def multi_head_parallel(bottleneck: int = 30, *, init: str = "bert") -> Method:
    """``ReLU(q_i P_k,i^T) P_v,i`` in every head: prefix tuning without softmax and gate."""
    return (
        Delta(
            name="adapter_heads", where=(ATTENTION,), modified="heads", per_head=True,
            bottleneck=bottleneck, init=init,
        ),
    )  # fmt: skip


def prefix(length: int = 30, *, form: str = "concat", mlp: int | None = None) -> Method:
    """Prefix tuning (Li and Liang 2021) of every attention.

    Args:
      length: l.
      form: 'concat' and 'gated' are two ways to compute the same; 'ungated' leaves the gate out.
      mlp: hidden width of the training-time network that makes the prefix, 800 in the paper.

    Raises:
      ValueError: an unknown form.
    """
    if form not in ("concat", "gated", "ungated"):
        raise ValueError(f"form={form!r}; choose 'concat', 'gated' or 'ungated'.")
    return (
        Delta(
            name="prefix", where=(ATTENTION,), form="softmax", modified="heads", per_head=True,
            composition="simple" if form == "ungated" else "gated", concat=form == "concat",
            bottleneck=length, init="bert", mlp=mlp,
        ),
    )  # fmt: skip


def lora(
    rank: int = 8,
    *,
    alpha: float | None = None,
    where: str | tuple[str, ...] = r"attention/(query|value)$",
    dropout: float = 0.1,
    name: str = "lora",
) -> Method:
    """LoRA (Hu et al. 2022): ``W x + (alpha / rank) B A x`` at projections.

    Args:
      rank: r.
      alpha: default r, a scale of 1.
      where: the projections, by default queries and values.
      dropout: on what the change reads.
      name: of the part.
    """
    scale = 1.0 if alpha is None else alpha / rank
    patterns = (where,) if isinstance(where, str) else tuple(where)
    return (
        Delta(
            name=name, where=patterns, form="identity", modified="output", bottleneck=rank,
            scale=scale, composition="simple" if scale == 1.0 else "scaled", dropout=dropout,
        ),
    )  # fmt: skip


def lora_ffn(rank: int = 102, *, alpha: float | None = None, dropout: float = 0.1) -> Method:
    """LoRA at both matrices of the feed-forward layer."""
    return lora(rank, alpha=alpha, where=r"mlp/(up|down)$", dropout=dropout, name="lora_ffn")


def mam(
    prefix: int = 30, bottleneck: int = 512, *, scale: float = 4.0, mlp: int | None = None
) -> Method:
    """The paper's mix-and-match adapter (section 4.6): short prefixes, scaled parallel adapter."""
    return (*_prefix(prefix, mlp=mlp), *parallel_ffn(bottleneck, scale=scale))


def prefix_lora(
    prefix: int = 30, rank: int = 102, *, alpha: float | None = None, mlp: int | None = None
) -> Method:
    """Prefixes with LoRA at the feed-forward layer."""
    return (*_prefix(prefix, mlp=mlp), *lora_ffn(rank, alpha=alpha))


def parallel_both(attention: int = 30, ffn: int = 512) -> Method:
    """Parallel adapters at attention and feed-forward layer."""
    return (*parallel_attention(attention), *parallel_ffn(ffn))


def prompt(length: int = 20, *, context: bool = False) -> Method:
    """Prompt tuning (Lester et al. 2021); see ``Prompt``."""
    return (Prompt(length=length, context=context),)


def bitfit(where: str = r"bias$") -> Method:
    """All biases, those of the norms too, and nothing else (Ben Zaken et al. 2022)."""
    return full(where)


def full(where: str | tuple[str, ...] = "") -> Method:
    """Fine-tuning: all parameters, or those whose path has ``where``."""
    return (Unfrozen(where=(where,) if isinstance(where, str) else tuple(where)),)


_prefix = prefix  # ``mam`` and ``prefix_lora`` have an argument of this name

METHODS: dict[str, Callable[..., Method]] = {
    function.__name__: function
    for function in (
        full, bitfit, prompt, prefix, houlsby, pfeiffer, sequential_attention, sequential_ffn,
        parallel_attention, parallel_ffn, multi_head_parallel, lora, lora_ffn, mam, prefix_lora,
        parallel_both,
    )
}  # fmt: skip


def named(name: str, **options: Any) -> Method:
    """Returns the method ``name`` of ``METHODS`` with its options.

    Raises:
      ValueError: there is none of this name.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}.{hint}")
    return METHODS[name](**options)


# -- initial values, folding, merging ---------------------------------------------------------


def find_sites(method: Method, run: Callable[..., Any], *args: Any) -> dict[str, dict[str, Site]]:
    """Finds where the parts of a method go, without computing anything.

    Args:
      method: see the module.
      run: a forward pass of the unchanged network.
      *args: its arguments; shapes suffice.

    Returns:
      Part name -> path -> site.

    Raises:
      ValueError: two parts have one name, or a part matches no module; the message lists the
        nearest paths.
    """
    names = [part.name for part in method]
    if len(set(names)) < len(names):
        raise ValueError(f"the parts of a method need different names; these are {names}.")
    recorder = _Recorder(method)
    with nn.intercept_methods(recorder):
        jax.eval_shape(lambda *a: run(*a), *args)  # a new function: nothing cached
    for part in method:
        if not isinstance(part, Unfrozen) and not recorder.sites[part.name]:
            known = sorted(recorder.paths - {""})
            last = {path.rsplit("/", 1)[-1] for path in known}
            text = re.sub(r"\W", "", part.where[0].rsplit("/", 1)[-1])
            similar = difflib.get_close_matches(text, last, n=2)
            near = [path for path in known if path.rsplit("/", 1)[-1] in similar][:5]
            raise ValueError(
                f"the part {part.name!r} goes to {part.where}, which no module of the network "
                f"that it can modify matches. Nearest paths: {', '.join(near or known[:8])}."
            )
    return recorder.sites


def init(method: Method, key: Array, run: Callable[..., Any], *args: Any) -> PyTree:
    """Draws the added parameters of a method.

    Args:
      method: see the module.
      key: a typed key. A site draws from its path, alike in scanned and unrolled stacks.
      run, args: see ``find_sites``.

    Returns:
      ``{part name: tree}``, float32; see the module. Parts with ``mlp`` have the parameters of
      that network under the attention's path with ``layers_each`` for the layer, one for each kind
      of attention: ``fold`` turns them into prefixes.
    """
    sites = find_sites(method, run, *args)
    return {
        part.name: _draw_part(part, key, list(sites[part.name].values()))
        for part in method if not isinstance(part, Unfrozen)
    }  # fmt: skip


def _draw_part(part: Delta | Prompt, key: Array, sites: list[Site]) -> PyTree:
    tree: dict[str, Any] = {}
    if isinstance(part, Delta) and part.mlp is not None:
        groups: dict[str, list[Site]] = {}
        for site in sites:
            groups.setdefault(_group(site), []).append(site)
        for path, members in groups.items():
            count = len(members) if members[0].layers is None else members[0].layers
            put(tree, path, _draw_mlp(part, trees.leaf_key(key, path), members[0], count))
        return tree
    for site in sites:
        drawn = [
            part.draw(trees.leaf_key(key, f"{part.name}/{path}"), site) for path in site.unrolled()
        ]
        leaves = drawn[0] if site.layers is None else jax.tree.map(lambda *x: jnp.stack(x), *drawn)
        put(tree, site.path, leaves)
    return tree


def _group(site: Site) -> str:
    """The path of the network that makes the prefixes of a site and its like in other layers."""
    if site.layers is not None:
        return site.path
    return re.sub(r"_\d+$", "_each", site.layer) + site.path.removeprefix(site.layer)


def _draw_mlp(part: Delta, key: Array, site: Site, layers: int) -> PyTree:
    """Linear(d, hidden), tanh, Linear(hidden, layers * 2 * d), as PyTorch draws them."""
    keys = jax.random.split(key, 5)
    d, hidden = math.prod(site.outputs), part.mlp or 0
    outputs = (layers, 2, *site.outputs)
    return {
        "embedding": jax.random.normal(keys[0], (part.bottleneck, d)),
        "hidden": {
            "kernel": torch_uniform(d)(keys[1], (d, hidden)),
            "bias": torch_uniform(d)(keys[2], (hidden,)),
        },
        "output": {
            "kernel": torch_uniform(hidden)(keys[3], (hidden, *outputs)),
            "bias": torch_uniform(hidden)(keys[4], outputs),
        },
    }


def fold(method: Method, added: PyTree) -> tuple[Method, PyTree]:
    """Replaces the networks that make prefixes by the prefixes that they make.

    Args:
      method: see the module.
      added: its parameters.

    Returns:
      The method without ``mlp``, and its parameters, 2 l d per attention. The same function.
    """
    parts, folded = [], dict(added)
    for part in method:
        if isinstance(part, Delta) and part.mlp is not None:
            tree: dict[str, Any] = {}
            for path, params in find(added[part.name], "embedding").items():
                _put_prefixes(tree, path, _prefixes(params))
            folded[part.name] = tree
            part = dataclasses.replace(part, mlp=None)
        parts.append(part)
    return tuple(parts), folded


def _prefixes(params: PyTree) -> Array:
    """[L, 2, l, heads, D]."""
    hidden = jnp.tanh(params["embedding"] @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    made = jnp.tensordot(hidden, params["output"]["kernel"], 1) + params["output"]["bias"]
    return jnp.moveaxis(made, 0, 2)


def _put_prefixes(tree: dict[str, Any], path: str, made: Array) -> None:
    if "_each" not in path:
        put(tree, path, {"key": made[:, 0], "value": made[:, 1]})
        return
    for i, (key, value) in enumerate(made):
        put(tree, path.replace("_each", f"_{i}"), {"key": key, "value": value})


def merge(method: Method, added: PyTree, params: PyTree, *, undo: bool = False) -> PyTree:
    """Folds LoRA into the weights: the network alone then gives what it gave when adapted.

    Args:
      method: of LoRA parts (and ``Unfrozen`` ones, whose weights are the network's own).
      added: its parameters.
      params: the network's.
      undo: take the change out again.

    Raises:
      ValueError: the method has other parts, which no weights can stand for: adapters have a ReLU,
        prefixes add columns.
    """
    for part in method:
        if isinstance(part, Unfrozen):
            continue
        if not (isinstance(part, Delta) and part.is_lora):
            raise ValueError(
                f"the part {part.name!r} cannot be merged into the weights: only changes that are "
                "linear in what a projection reads (LoRA) can."
            )
        sign = -1.0 if undo else 1.0
        params = _merge_factors(part, added[part.name], params, sign)
    return params


def _merge_factors(part: Delta, tree: PyTree, params: PyTree, sign: float) -> PyTree:
    pairs = {f"{path}/kernel": site for path, site in find(tree, "kernel").items()}

    def delta(site: PyTree) -> Array:
        s = site["scale"] if part.scale is None else part.scale
        return trees.lora_delta(site["kernel"], sign * s)

    def leaf(path: str, x: Array) -> Array:
        site = pairs.pop(path, None)
        if site is None:
            return x
        stacked = sum(f.ndim for f in site["kernel"].values()) - 2 > x.ndim
        change = jax.vmap(delta)(site) if stacked else delta(site)
        return (x + change).astype(x.dtype)

    merged = trees.map_with_path(leaf, params)
    if pairs:
        raise ValueError(f"params has no leaf {next(iter(pairs))!r}, for which there are factors.")
    return merged


def count(method: Method, added: PyTree) -> int:
    """The number of added parameters as the paper counts them: folded, no biases, no scales."""
    shapes = jax.eval_shape(lambda a: fold(method, a)[1], added)
    return sum(
        math.prod(x.shape) for path, x in zip(trees.paths(shapes), jax.tree.leaves(shapes))
        if not path.endswith(("bias", "scale"))
    )  # fmt: skip


def petl_rules(
    model: str = "model", *, scan: bool = False
) -> tuple[tuple[str, PartitionSpec], ...]:
    """Partition rules of the added parameters, to be put before those of the network.

    Bottlenecks are split over ``model``, as the hidden units beside them, and prefixes by heads, as
    the attention. LoRA's factors have no rule of their own.

    Args:
      model: mesh axis of heads and hidden units.
      scan: the layers' parameters have a leading layer axis.
    """
    lead = (None,) if scan else ()

    def spec(*axes: str | None) -> PartitionSpec:
        return PartitionSpec(*lead, *axes)

    return (
        (r"added/.*/down/kernel$", spec(None, model)),
        (r"added/.*/down/bias$", spec(model)),
        (r"added/.*/up/kernel$", spec(model)),
        (r"added/.*/(attention|cross_attention)/(key|value)$", spec(None, model)),
        (r"added/.*/(bias|scale)$", PartitionSpec()),
    )


# -- interception -----------------------------------------------------------------------------


@contextlib.contextmanager
def adapted(method: Method, added: PyTree) -> Iterator[None]:
    """Inside, the network runs with the method's changes.

    Dropout is on where the innermost enclosing call was given ``train=True``. It acts while a
    function is traced; give a function that is compiled with the network as a static argument, as
    generation is, an ``AdaptedModule`` instead.

    Args:
      method: see the module.
      added: as of ``init``; a site that it does not have is left alone.
    """
    method, added = fold(method, added)
    with nn.intercept_methods(_Adapter(method, added)):
        yield


@dataclasses.dataclass(frozen=True)
class AdaptedModule:
    """A network with a method, for what takes a module and its variables, such as generation.

    Attributes:
      module: the network.
      method: see the module.
    """

    module: nn.Module
    method: Method

    def apply(self, variables: PyTree, *args: Any, **kwargs: Any) -> Any:
        """As the network's ``apply``, of ``{"params": ..., "added": ...}``."""
        rest = {name: value for name, value in variables.items() if name != "added"}
        with adapted(self.method, variables["added"]):
            return self.module.apply(rest, *args, **kwargs)


class _Layer(NamedTuple):
    """The Transformer layer that is running."""

    path: str
    number: Array | int
    config: Any


class _Interceptor:
    """Meets every call of a module; subclasses say what is at a site."""

    def __init__(self, method: Method):
        self.deltas = [part for part in method if isinstance(part, Delta)]
        self.prompts = [part for part in method if isinstance(part, Prompt)]
        # What encloses the call at hand, innermost last. Calls nest, so stacks suffice.
        self.layers: list[_Layer] = []
        self.training: list[bool] = []
        self.read: list[Array] = []  # what the enclosing attention reads
        self.prompted = 0  # prompts before the inputs of the next encoder

    def site(
        self, part: Delta | Prompt, path: str, inputs: tuple[int, ...], outputs: tuple[int, ...]
    ) -> PyTree | None:
        """The parameters of ``part`` at ``path``, None where nothing is done."""
        raise NotImplementedError

    def __call__(self, next_fun, args, kwargs, context) -> Any:
        module, name = context.module, context.method_name
        if name == "setup":
            return next_fun(*args, **kwargs)
        path = "/".join(module.path)
        with contextlib.ExitStack() as stack:
            if "train" in kwargs:
                stack.enter_context(_pushed(self.training, bool(kwargs["train"])))
            if isinstance(module, TransformerLayer) and name in ("__call__", "decode", "start"):
                index = args[1] if len(args) > 1 else kwargs.get("layer", 0)
                stack.enter_context(_pushed(self.layers, _Layer(path, index, module.config)))
            if hasattr(module, "attend") and name in ("__call__", "prefill", "cross"):
                stack.enter_context(_pushed(self.read, args[0]))
            if name == "attend" and self.read:
                return self.attend(next_fun, args, kwargs, module, path)
            if name == "residual" and isinstance(module, TransformerLayer):
                return self.residual(next_fun, args, module, path)
            if isinstance(module, TransformerStack) and self.prompts:
                return self.stack(next_fun, args, kwargs, module, name, path)
            if name == "__call__":
                return self.output(next_fun, args, kwargs, module, path)
            return next_fun(*args, **kwargs)

    def attend(self, next_fun, args, kwargs, module, path) -> Array:
        """Changes the average of the values [B, L, heads, D]."""
        run = next_fun
        query, inputs = args[0], self.read[-1]
        for part in self.deltas:
            if part.modified != "heads":
                continue
            params = self.site(part, path, inputs.shape[-1:], query.shape[2:])
            if params is not None and part.bottleneck:
                run = self._attend(part, params, run, module, path)
        return run(*args, **kwargs)

    def _attend(self, part: Delta, params: PyTree, run, module, path) -> Callable[..., Array]:
        inputs = self.read[-1]
        dropout = self.dropout(part, module, path)

        def concat(query, key, value, **options) -> Array:
            options = _extended(options, query, key, part.bottleneck)
            return run(
                query, _prepend(params["key"], key), _prepend(params["value"], value), **options
            )

        def add(query, key, value, **options) -> Array:
            y = run(query, key, value, **options)
            if not part.per_head:
                return y + part.delta(params, inputs, dropout).reshape(y.shape).astype(y.dtype)
            scale = getattr(module, "scale", None)
            query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
            change = part.delta(params, query, dropout).astype(y.dtype)
            if part.composition != "gated":
                return y + change
            gate = _gate(query, key, params["key"], options)[..., None].astype(y.dtype)
            return (1 - gate) * y + gate * change

        return concat if part.concat else add

    def residual(self, next_fun, args, module, path) -> Array:
        """Changes what a sublayer gives [B, L, H]."""
        x, inputs, outputs, norm = args
        path = f"{path}/{norm.name.removesuffix('_norm')}"
        for part in self.deltas:
            if part.modified not in ("sublayer", "normed"):
                continue
            params = self.site(part, path, inputs.shape[-1:], outputs.shape[-1:])
            if params is None:
                continue
            if part.modified == "normed":
                z = next_fun(x, inputs, outputs, norm)
            else:
                z = inputs if part.insertion == "parallel" else outputs
            change = part.delta(params, z, self.dropout(part, module, path))
            outputs = outputs + change.astype(outputs.dtype)
        return next_fun(x, inputs, outputs, norm)

    def output(self, next_fun, args, kwargs, module, path) -> Any:
        """Changes what a module gives, and puts prompts before what it reads."""
        for prompt in self.prompts:
            args = self.prompt(prompt, args, path)
        outputs = next_fun(*args, **kwargs)
        for part in self.deltas:
            if part.modified != "output" or not any(re.search(w, path) for w in part.where):
                continue
            inputs = args[0]
            shapes = _feature_shapes(part, module, inputs, outputs, path)
            params = self.site(part, path, *shapes)
            if params is None:
                continue
            z = inputs if part.insertion == "parallel" else outputs
            change = part.delta(params, z, self.dropout(part, module, path))
            outputs = outputs + change.astype(outputs.dtype)
        return outputs

    def prompt(self, part: Prompt, args: tuple, path: str) -> tuple:
        """Puts prompts before the first argument [B, L, H]."""
        if not any(re.search(w, path) for w in part.where):
            return args
        params = self.site(part, path, args[0].shape[-1:], ())
        if params is None:
            return args
        self.prompted = part.length
        return (_prepend(params["prompt"], args[0]), *args[1:])

    def stack(self, next_fun, args, kwargs, module, name, path) -> Any:
        """Tells a stack of the prompts before its inputs or its context."""
        if name not in ("__call__", "decode"):
            return next_fun(*args, **kwargs)
        for prompt in self.prompts:
            args = self.prompt(prompt, args, path)
        kwargs, extra, self.prompted = dict(kwargs), self.prompted, 0
        seen = sum(prompt.length for prompt in self.prompts if prompt.context)
        if module.config.cross_attention and kwargs.get("context_lengths") is not None:
            kwargs["context_lengths"] = kwargs["context_lengths"] + seen
        if not extra:
            return next_fun(*args, **kwargs)
        if kwargs.get("lengths") is not None:
            kwargs["lengths"] = kwargs["lengths"] + extra
        for name, filler in (("mask", True), ("bias", 0)):
            if kwargs.get(name) is not None:
                kwargs[name] = _pad_front(kwargs[name], extra, (-1, -2), filler)
        y = next_fun(*args, **kwargs)
        return y if seen else jax.tree.map(lambda x: x[:, extra:], y)

    def dropout(self, part: Delta, module: nn.Module, path: str) -> Dropout:
        """The part's dropout, drawn from the host module's stream."""
        rate = part.dropout
        if rate is None:
            config = self.layers[-1].config if self.layers else None
            field = "attention_dropout" if re.search("attention", path) else "dropout"
            rate = getattr(config, field, 0.0)
        if not rate or not (self.training and self.training[-1]):
            return lambda x: x

        def drop(x: Array) -> Array:
            kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape)
            return jnp.where(kept, x / (1 - rate), 0)

        return drop


class _Recorder(_Interceptor):
    """Changes nothing and notes the sites."""

    def __init__(self, method: Method):
        super().__init__(method)
        self.sites: dict[str, dict[str, Site]] = {part.name: {} for part in method}
        self.paths: set[str] = set()

    def __call__(self, next_fun, args, kwargs, context) -> Any:
        if context.method_name != "setup":
            self.paths.add("/".join(context.module.path))
        return super().__call__(next_fun, args, kwargs, context)

    def site(self, part, path, inputs, outputs) -> None:
        if any(re.search(where, path) for where in part.where):
            layer = self.layers[-1] if self.layers else None
            if layer is None:
                site = Site(path, inputs, outputs)
            else:
                count = layer.config.num_layers if layer.config.scan else None
                site = Site(path, inputs, outputs, layer.path, count)
            self.sites[part.name][path] = site


class _Adapter(_Interceptor):
    """Applies the parameters ``added``."""

    def __init__(self, method: Method, added: PyTree):
        super().__init__(method)
        self.added = added

    def site(self, part, path, inputs, outputs) -> PyTree | None:
        del inputs, outputs
        node = self.added[part.name]
        for key in path.split("/"):
            if not isinstance(node, dict) or key not in node:
                return None
            node = node[key]
        if self.layers and self.layers[-1].config.scan:
            index = self.layers[-1].number
            return jax.tree.map(lambda x: x[index], node)
        return node


@contextlib.contextmanager
def _pushed(stack: list, value: Any) -> Iterator[None]:
    stack.append(value)
    try:
        yield
    finally:
        stack.pop()


def _feature_shapes(
    part: Delta, module: nn.Module, inputs: Array, outputs: Any, path: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Feature shapes of what a module reads and gives."""
    if not isinstance(outputs, jax.Array):
        raise ValueError(f"{path!r} gives no array, so the part {part.name!r} cannot change it.")
    if part.is_lora:
        if not module.has_variable("params", "kernel"):
            raise ValueError(f"{path!r} has no kernel, so LoRA ({part.name!r}) cannot adapt it.")
        shape: tuple[int, ...] = module.get_variable("params", "kernel").shape
        # Batch axes are as many before as behind.
        axes = (len(shape) + inputs.ndim - outputs.ndim) // 2
        if inputs.shape[inputs.ndim - axes :] != shape[:axes]:
            raise ValueError(
                f"the kernel of {path!r} has shape {shape}, which does not multiply an input of "
                f"shape {inputs.shape}: LoRA adapts dense layers."
            )
        return shape[:axes], shape[axes:]
    z = inputs if part.insertion == "parallel" else outputs
    return z.shape[-1:], outputs.shape[z.ndim - 1 :]


def _prepend(rows: Array, x: Array) -> Array:
    """Puts rows [l, ...] before x [B, L, ...]."""
    rows = jnp.broadcast_to(rows.astype(x.dtype), (x.shape[0], *rows.shape))
    return jnp.concatenate([rows, x], axis=1)


def _pad_front(x: Array, count: int, axes: tuple[int, ...], value: Any) -> Array:
    """Pads axes that are not broadcast."""
    widths = [(0, 0)] * x.ndim
    for axis in axes:
        if x.shape[axis] > 1:
            widths[axis] = (count, 0)
    return jnp.pad(x, widths, constant_values=value)


def _extended(options: dict[str, Any], query: Array, key: Array, count: int) -> dict[str, Any]:
    """The options of ``attend`` with ``count`` more keys in front, which everything sees."""
    options = dict(options)
    if options.get("causal"):
        # Shifted by the prefix it is no longer the mask that attention knows as causal.
        causal = jnp.tri(query.shape[1], key.shape[1], dtype=bool)[None, None]
        mask = options.get("mask")
        options |= {"mask": causal if mask is None else causal & mask, "causal": False}
    if options.get("mask") is not None:
        options["mask"] = _pad_front(options["mask"], count, (-1,), True)
    if options.get("bias") is not None:
        options["bias"] = _pad_front(options["bias"], count, (-1,), 0)
    if options.get("lengths") is not None:
        options["lengths"] = options["lengths"] + count
    return options


def _gate(query: Array, key: Array, prefix_key: Array, options: dict[str, Any]) -> Array:
    """The share of the attention weights that a prefix has, [B, L, heads] (equation 7).

    Args:
      query: [B, L, heads, D], scaled.
      key: [B, S, heads, D].
      prefix_key: [l, heads, D].
      options: of ``attend``.
    """
    query = query.astype(jnp.float32)
    scores = jnp.einsum("blhd,bshd->bhls", query, key.astype(jnp.float32))
    if options.get("bias") is not None:
        scores = scores + options["bias"]
    seen = jnp.ones((), bool) if options.get("mask") is None else options["mask"]
    if options.get("lengths") is not None:
        seen &= (jnp.arange(key.shape[1]) < options["lengths"][:, None])[:, None, None]
    if options.get("causal"):
        seen &= jnp.tri(query.shape[1], key.shape[1], dtype=bool)
    # As in attention: a row that sees nothing averages over everything.
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    own = jnp.moveaxis(nn.logsumexp(scores, axis=-1), 1, 2)
    prefix_scores = jnp.einsum("blhd,phd->blhp", query, prefix_key.astype(jnp.float32))
    return nn.sigmoid(nn.logsumexp(prefix_scores, axis=-1) - own)


def _layer_norm(x: Array, params: PyTree) -> Array:
    """Over the feature axes, in float32."""
    axes = tuple(range(x.ndim - params["scale"].ndim, x.ndim))
    wide = x.astype(jnp.float32)
    mean = wide.mean(axes, keepdims=True)
    variance = jnp.square(wide - mean).mean(axes, keepdims=True)
    normed = (wide - mean) * jax.lax.rsqrt(variance + NORM_EPSILON)
    return (normed * params["scale"] + params["bias"]).astype(x.dtype)


def put(tree: dict[str, Any], path: str, value: PyTree) -> None:
    """Puts a node into nested dictionaries, in place."""
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def find(tree: PyTree, key: str, path: str = "") -> dict[str, PyTree]:
    """The nodes of nested dictionaries that have ``key``, by path."""
    if not isinstance(tree, dict):
        return {}
    if key in tree:
        return {path: tree}
    found: dict[str, PyTree] = {}
    for name, child in tree.items():
        found |= find(child, key, f"{path}/{name}" if path else name)
    return found
