"""Parameter-efficient transfer: insertion points, equivalences, counts and what must not change."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax import trees
from transfer_jax.nn import TransformerConfig, TransformerStack, petl, stack_layers
from transfer_jax.nn.transformer import make_norm

ENCODER = TransformerConfig(
    features=8, num_layers=2, num_heads=2, hidden=12, norm_first=False, final_norm=False,
    init_scale=0.4,
)  # fmt: skip
B, S, T, V = 2, 6, 5, 11
SOURCE = jax.random.randint(jax.random.key(0), (B, S), 0, V)
TARGET = jax.random.randint(jax.random.key(1), (B, T), 0, V)
LENGTHS = jnp.array([6, 3])


class Toy(nn.Module):
    """An encoder with norms after the sums, and a decoder with norms before."""

    config: TransformerConfig

    def setup(self):
        c = self.config
        self.tokens = nn.Embed(V, c.features)
        self.embedding_norm = make_norm(c)
        self.encoder = TransformerStack(c)
        self.decoder = TransformerStack(
            dataclasses.replace(
                c, causal=True, cross_attention=True, norm_first=True, final_norm=True
            )
        )

    def encode(self, source, train=False):
        x = self.embedding_norm(self.tokens(source))
        return self.encoder(x, lengths=LENGTHS, train=train)

    def __call__(self, source, target, train=False):
        context = self.encode(source, train=train)
        return self.decoder(
            self.tokens(target), context=context, context_lengths=LENGTHS, train=train
        )

    def step_by_step(self, source, target):
        context, state, outputs = self.encode(source), None, []
        for i in range(target.shape[1]):
            y, state = self.decoder.decode(
                self.tokens(target[:, i : i + 1]), state, max_length=T, context=context,
                context_lengths=LENGTHS,
            )  # fmt: skip
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1)


MODEL = Toy(ENCODER)
PARAMS = jax.jit(MODEL.init)(jax.random.key(2), SOURCE, TARGET)["params"]


def forward(params, model=MODEL, method=None, **options):
    return model.apply({"params": params}, SOURCE, TARGET, method=method, **options)


FROZEN = forward(PARAMS)


def perturbed(tree, noise):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + np.float32(noise * rng.normal(size=x.shape)), tree)


def draw(method, params=PARAMS, model=MODEL, noise=0.3):
    """Parameters of a method, none of them zero."""
    added = petl.init(method, jax.random.key(3), functools.partial(forward, model=model), params)
    return perturbed(added, noise) if noise else added


def run(parts, added, params=PARAMS, **options):
    """Not compiled as a whole: single operations are compiled once for all tests."""
    with petl.adapted(parts, added):
        return forward(params, **options)


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


IDENTITIES = {
    "parallel_ffn": petl.parallel_ffn(4, scale=4.0),
    "learned scale": petl.parallel_ffn(4, scale=None),
    "sequential_ffn": petl.sequential_ffn(4, init="lora"),
    "lora": petl.lora(2, alpha=4.0, where=r"(attention/(query|key|value|out)|mlp/(up|down))$"),
    "multi_head": petl.multi_head_parallel(4, init="lora"),
    "no prefix": petl.prefix(0),
    "no prefix, gated": petl.prefix(0, form="gated"),
    "no prompt": petl.prompt(0, context=True),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_starts_as_the_frozen_model_bit_for_bit(name):
    added = draw(IDENTITIES[name], noise=0.0)
    np.testing.assert_array_equal(run(IDENTITIES[name], added), FROZEN)
    if "no " not in name:  # and does not stay there
        moved = run(IDENTITIES[name], perturbed(added, 0.3))
        assert not np.allclose(moved, FROZEN, atol=1e-3)


EVERY = (
    *petl.prefix(3, form="gated"),
    *petl.parallel_ffn(4, scale=None),
    *petl.lora(2, alpha=4.0, where=r"(attention/(query|key|value|out)|mlp/(up|down))$"),
    *petl.prompt(2, context=True),
    dataclasses.replace(petl.pfeiffer(3)[0], name="pfeiffer"),
    *petl.sequential_attention(3),
)


def test_scanned_recomputed_and_cached_decoding_are_the_same_function():
    """Everything at once: the cache never holds prefixes, and each layer has its own parameters."""
    scanned = Toy(dataclasses.replace(ENCODER, scan=True, remat=True))
    added, params = draw(EVERY), stack_layers(PARAMS)
    stacked = stack_layers(added)
    own = petl.init(EVERY, jax.random.key(3), functools.partial(forward, model=scanned), params)
    first = stack_layers(draw(EVERY, noise=0.0))
    jax.tree.map(np.testing.assert_array_equal, own, first)  # alike in their first values too

    @functools.partial(jax.jit, static_argnums=2)
    def gradient(added, params, model):
        def loss(added):
            with petl.adapted(EVERY, added):
                y = forward(params, model=model)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(loss, has_aux=True)(added)

    a, expected = gradient(added, PARAMS, MODEL)
    b, y = gradient(stacked, params, scanned)
    close(y, expected, 2e-5)
    decode = jax.jit(functools.partial(run, EVERY, model=scanned, method="step_by_step"))
    close(decode(stacked, params), expected, 2e-5)
    jax.tree.map(lambda x, y: close(x, y, 2e-4), b, stack_layers(a))
    # Every attention's prefix matters: encoder, decoder and cross.
    for path, x in zip(trees.paths(b["prefix"]), jax.tree.leaves(b["prefix"])):
        assert np.all(np.abs(x).max(axis=(1, 2, 3)) > 1e-6), path


def test_prefix_as_concatenation_is_the_gated_form():
    """Equation 7, under ragged, causal and cross attention; without the gate it is another."""
    added = draw(petl.prefix(3))
    results = {form: run(petl.prefix(3, form=form), added) for form in ("concat", "gated")}
    close(results["concat"], results["gated"])
    assert not np.allclose(run(petl.prefix(3, form="ungated"), added), results["gated"], atol=1e-3)
    q, k = jax.random.normal(jax.random.key(5), (2, B, T, 2, 4))
    prefix = jax.random.normal(jax.random.key(6), (3, 2, 4))
    gate = petl._gate(q, k, prefix, {"causal": True})
    scores = jnp.einsum("blhd,bshd->blhs", q, k)
    scores = jnp.where(jnp.tri(T, dtype=bool)[:, None], jnp.exp(scores), 0).sum(-1)
    mine = jnp.exp(jnp.einsum("blhd,phd->blhp", q, prefix)).sum(-1)
    close(gate, mine / (mine + scores))
    # What lies beyond the lengths has no part in the gate.
    options = {"lengths": jnp.array([4, 2])}
    beyond = k.at[1, 2:].set(100.0).at[0, 4:].set(100.0)
    close(petl._gate(q, k, prefix, options), petl._gate(q, beyond, prefix, options))


def test_prefixes_of_the_training_network_are_those_of_the_formula():
    method = petl.prefix(3, mlp=16)
    added = draw(method, noise=0.0)
    plain, folded = petl.fold(method, added)
    assert set(folded["prefix"]["decoder"]["layers_1"]) == {"attention", "cross_attention"}
    assert petl.count(method, added) == petl.count(plain, folded) == 2 * 3 * 8 * 2 * 3
    net = added["prefix"]["decoder"]["layers_each"]["cross_attention"]
    hidden = jnp.tanh(net["embedding"] @ net["hidden"]["kernel"] + net["hidden"]["bias"])
    flat = hidden @ net["output"]["kernel"].reshape(16, -1) + net["output"]["bias"].reshape(-1)
    made = flat.reshape(3, 4, 2, 4)  # [l, 2 j], [l, 2 j + 1]: key and value of layer j
    cross = folded["prefix"]["decoder"]["layers_1"]["cross_attention"]
    close(cross["key"], made[:, 2], 1e-6)
    close(cross["value"], made[:, 3], 1e-6)
    close(run(method, added), run(plain, folded), 1e-6)
    scanned = Toy(dataclasses.replace(ENCODER, scan=True))
    params = stack_layers(PARAMS)
    own = petl.init(
        method, jax.random.key(3), functools.partial(forward, model=scanned), params
    )["prefix"]  # fmt: skip
    assert own["decoder"]["layers"]["attention"]["output"]["kernel"].shape == (16, 2, 2, 2, 4)
    made = petl.fold(method, {"prefix": own})[1]["prefix"]
    jax.tree.map(lambda x: close(x.shape[:2], (2, 3)), made)


class Layer(nn.Module):
    """One layer whose sublayers the test reads."""

    config: TransformerConfig

    def setup(self):
        self.stack = TransformerStack(self.config)

    def __call__(self, x, train=False):
        return self.stack(x, lengths=jnp.array([4, 3]), train=train)


ONE = dataclasses.replace(ENCODER, num_layers=1)
X = jax.random.normal(jax.random.key(7), (B, 4, 8))


@pytest.mark.parametrize("prenorm", [False, True])
def test_insertion_points_in_closed_form(prenorm):
    """With W_d = I and a ReLU that never cuts, an adapter adds (z + c) W_u + b_u."""
    model = Layer(dataclasses.replace(ONE, norm_first=prenorm))
    params = model.init(jax.random.key(2), X)["params"]
    layer = params["stack"]["layers_0"]

    def norm(name, x):
        return make_norm(ONE).apply({"params": layer[name]}, x)

    def mlp(x):
        hidden = nn.gelu(x @ layer["mlp"]["up"]["kernel"], approximate=False)
        return hidden @ layer["mlp"]["down"]["kernel"]

    after = run_layer(model, params, (), {}, "attention_only")
    y = norm("mlp_norm", after) if prenorm else after
    u = mlp(y)
    up = 0.3 * jax.random.normal(jax.random.key(8), (8, 8))

    def adapter(z):
        return 2.0 * ((z + 100.0) @ up - 100.0 * up.sum(0))

    leaves = {
        "down": {"kernel": jnp.eye(8), "bias": jnp.full(8, 100.0)},
        "up": {"kernel": up, "bias": -100.0 * up.sum(0)},
    }

    def finish(x):
        return x if prenorm else norm("mlp_norm", x)

    expected = {
        "parallel": finish(after + u + adapter(y)),
        "sequential": finish(after + u + adapter(u)),
        "normed": finish(after + u + adapter(finish(after + u))),
    }
    for name, value in expected.items():
        modified = "normed" if name == "normed" else "sublayer"
        part = petl.Delta(
            name="a", where=("mlp$",), modified=modified, bottleneck=8, composition="scaled",
            insertion="parallel" if name == "parallel" else "sequential", scale=2.0,
        )  # fmt: skip
        added = {"a": {"stack": {"layers_0": {"mlp": leaves}}}}
        got = run_layer(model, params, (part,), added)
        close(got, value, 1e-3)  # float32 beside 100
    assert not np.allclose(expected["parallel"], expected["sequential"], atol=1e-2)
    # Attention: in parallel before the output projection, reading what attention reads;
    # sequentially after it.
    read = norm("attention_norm", X) if prenorm else X
    out = layer["attention"]["out"]["kernel"]
    before = run_layer(model, params, (), {}, "heads")
    parallel = petl.Delta(name="a", where=("attention$",), modified="heads", bottleneck=8)
    change = (adapter(read) / 2.0).reshape(B, 4, 2, 4)
    shaped = {**leaves, "up": jax.tree.map(lambda x: x.reshape(*x.shape[:-1], 2, 4), leaves["up"])}
    added = {"a": {"stack": {"layers_0": {"attention": shaped}}}}
    got = run_layer(model, params, (parallel,), added, "attention")
    close(got, jnp.einsum("blhd,hde->ble", before + change, out), 1e-3)
    sequential = petl.Delta(
        name="a", where=("attention/out$",), modified="output", insertion="sequential", bottleneck=8
    )
    added = {"a": {"stack": {"layers_0": {"attention": {"out": leaves}}}}}
    got = run_layer(model, params, (sequential,), added, "attention")
    o = jnp.einsum("blhd,hde->ble", before, out)
    close(got, o + adapter(o) / 2.0, 1e-3)


def run_layer(model, params, method, added, what="all", **options):
    """The layer's output, or what one of its parts gives on the way (``params`` has no biases)."""
    seen = {}

    def watch(next_fun, args, kwargs, context):
        if context.method_name == "residual":
            seen.setdefault("attention", args[2])
        y = next_fun(*args, **kwargs)
        if context.method_name == "residual":
            seen.setdefault("attention_only", y)
        if context.method_name == "attend":
            seen["heads"] = y
        return y

    with petl.adapted(method, added), nn.intercept_methods(watch):
        y = model.apply({"params": params}, X, **options)
    return y if what == "all" else seen[what]


def test_the_change_is_linear_in_the_scale_and_its_gradient_is_an_inner_product():
    def change(scale):
        (part,) = petl.parallel_ffn(4, scale=scale)
        z = jax.random.normal(jax.random.key(1), (3, 8))
        params = jax.tree.map(
            lambda x: x + 0.2, part.draw(jax.random.key(0), petl.Site("", (8,), (8,)))
        )
        return part, params, z

    part, params, z = change(3.0)
    close(part.delta(params, z), 3.0 * change(1.0)[0].delta(params, z))
    (learned, params, z), upstream = change(None), jax.random.normal(jax.random.key(2), (3, 8))
    gradient = jax.grad(lambda p: jnp.vdot(upstream, learned.delta(p, z)))(params)["scale"]
    close(gradient, jnp.vdot(upstream, change(1.0)[0].delta(params, z)))
    # It starts at 1, and the draw above added 0.2.
    close(params["scale"], 1.2)


@pytest.mark.parametrize("where", ["ffn", "heads"])
def test_dropout_is_after_the_relu_and_absent_in_evaluation(where):
    """Few units, all active: the mean over all masks is the value without dropout."""
    config = dataclasses.replace(ONE, dropout=0.0)
    model = Layer(config)
    params = model.init(jax.random.key(2), X)["params"]
    parts = petl.parallel_ffn(1) if where == "ffn" else petl.multi_head_parallel(1)
    part = dataclasses.replace(parts[0], dropout=0.5)
    modified = dataclasses.replace(part, modified="sublayer") if where == "ffn" else part
    method = (modified,)
    added = petl.init(method, jax.random.key(3), lambda p: model.apply({"params": p}, X), params)
    added = perturbed(added, 1.0)
    evaluated = run_layer(model, params, method, added)
    np.testing.assert_array_equal(evaluated, run_layer(model, params, method, added, train=False))
    # Of the change alone, through its own function: dropout reads what the ReLU gave.
    z = X.reshape(B, 4, 2, 4) if where == "heads" else X
    site = added[part.name]["stack"]["layers_0"]["attention" if where == "heads" else "mlp"]
    seen = []
    part.delta(site, z, lambda x: seen.append(x) or x)
    assert (np.asarray(seen[0]) >= 0).all() and seen[0].shape[-1] == 1
    on, off = (part.delta(site, z, lambda x, k=k: x * k) for k in (2.0, 0.0))
    close((on + off) / 2, part.delta(site, z))
    # In training a mask is drawn, from the host's stream.
    train = functools.partial(run_layer, model, params, method, added, train=True)
    draws = [train(rngs={"dropout": jax.random.key(i)}) for i in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.allclose(draws[0], draws[2], atol=1e-3)


def test_the_host_dropout_is_the_default_and_the_host_masks_stay():
    """The branch beside the FFN is not dropped a second time, and takes no mask from the host."""
    config = dataclasses.replace(ONE, dropout=0.5)
    model = Layer(config)
    params = model.init(jax.random.key(2), X)["params"]
    rngs = {"dropout": jax.random.key(0)}
    host = model.apply({"params": params}, X, train=True, rngs=rngs)
    zero = petl.init(
        petl.parallel_ffn(4), jax.random.key(3), lambda p: model.apply({"params": p}, X), params
    )
    same = run_layer(model, params, petl.parallel_ffn(4), zero, train=True, rngs=rngs)
    np.testing.assert_array_equal(same, host)
    (part,) = petl.parallel_ffn(4)
    bias = jax.tree.map(lambda x: x, zero)
    bias["adapter_ffn"]["stack"]["layers_0"]["mlp"]["up"]["bias"] = jnp.full(8, 7.0)
    changed = {}

    def watch(next_fun, args, kwargs, context):
        if context.method_name == "residual" and args[3].name == "mlp_norm":
            changed.setdefault("u", args[2])
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(watch):  # outside: sees what comes in
        plain = run_layer(model, params, (), {}, train=True, rngs=rngs)
    np.testing.assert_array_equal(plain, host)
    u = changed.pop("u")
    with petl.adapted((part,), bias), nn.intercept_methods(watch):  # inside: with the change
        model.apply({"params": params}, X, train=True, rngs=rngs)
    close(changed["u"], u + 7.0)  # 7 everywhere, neither dropped nor rescaled


def test_multi_head_parallel_adapter_with_one_head_is_a_parallel_adapter_of_the_query():
    (part,) = petl.multi_head_parallel(3)
    site = petl.Site("", (8,), (1, 8))
    params = part.draw(jax.random.key(0), site)
    assert part.draw(jax.random.key(0), petl.Site("", (8,), (2, 4)))["key"].shape == (3, 2, 4)
    q = jax.random.normal(jax.random.key(1), (B, T, 1, 8))
    (single,) = petl.parallel_ffn(3)
    plain = {
        "down": {"kernel": params["key"][:, 0].T, "bias": jnp.zeros(3)},
        "up": {"kernel": params["value"][:, 0], "bias": jnp.zeros(8)},
    }
    close(part.delta(params, q)[:, :, 0], single.delta(plain, q[:, :, 0]))


@pytest.mark.parametrize("scan", [False, True])
def test_lora_is_its_merged_weights(scan):
    method = petl.lora(
        2, alpha=6.0, where=r"(attention/(query|key|value|out)|mlp/(up|down))$", dropout=0.5
    )
    added, params, model = draw(method), PARAMS, MODEL
    if scan:
        model = Toy(dataclasses.replace(ENCODER, scan=True))
        added, params = stack_layers(added), stack_layers(params)
    merged = petl.merge(method, added, params)
    close(run(method, added, params, model=model), forward(merged, model))
    back = petl.merge(method, added, merged, undo=True)
    jax.tree.map(lambda a, b: close(a, b, 1e-6), back, params)
    kernel = params["encoder"]["layers" if scan else "layers_0"]["attention"]["query"]["kernel"]
    assert not np.allclose(
        merged["encoder"]["layers" if scan else "layers_0"]["attention"]["query"]["kernel"], kernel
    )
    with pytest.raises(ValueError, match="cannot be merged"):
        petl.merge(petl.prefix(2), draw(petl.prefix(2)), PARAMS)
    with pytest.raises(ValueError, match="no leaf"):
        petl.merge(method, {"lora": {"nowhere": {"kernel": {"a": jnp.ones((8, 2)),
                   "b": jnp.ones((2, 8))}}}}, PARAMS)  # fmt: skip


def test_prompts_stand_before_the_inputs_without_a_position():
    method = petl.prompt(3, context=True)
    added = draw(method)
    rows = added["prompt"]["embedding_norm"]["prompt"]
    embedded = PARAMS["tokens"]["embedding"]
    longer = jnp.concatenate([jnp.broadcast_to(rows, (B, 3, 8)), embedded[SOURCE]], axis=1)

    def by_hand(params):
        def body(model):
            context = model.encoder(model.embedding_norm(longer), lengths=LENGTHS + 3)
            return context, model.decoder(
                model.tokens(TARGET), context=context, context_lengths=LENGTHS + 3
            )

        return nn.apply(body, MODEL)({"params": params})

    context, expected = by_hand(PARAMS)
    close(run(method, added), expected)
    encoder_only = petl.prompt(3)
    with petl.adapted(encoder_only, added):
        trimmed = MODEL.apply({"params": PARAMS}, SOURCE, method="encode")
    close(trimmed, context[:, 3:])


def test_counts_of_the_paper():
    """BART-large and RoBERTa-base from shapes alone."""

    class Stacks(nn.Module):
        encoder: TransformerConfig
        decoder: TransformerConfig | None = None

        @nn.compact
        def __call__(self, x):
            y = TransformerStack(self.encoder, name="encoder")(x)
            if self.decoder is None:
                return y
            return TransformerStack(self.decoder, name="decoder")(x, context=y)

    def counts(model, methods):
        d = model.encoder.features
        x = jax.ShapeDtypeStruct((1, 4, d), jnp.float32)
        params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)
        for method, expected in methods:
            added = jax.eval_shape(
                lambda p, x, m=method: petl.init(m, jax.random.key(0), model.apply, p, x), params, x
            )
            assert petl.count(method, added) == expected

    bart = TransformerConfig(features=1024, num_layers=12, num_heads=16, scan=True)
    decoder = dataclasses.replace(bart, causal=True, cross_attention=True)
    d, layers, attentions, ffns = 1024, 12, 3, 2
    counts(
        Stacks(bart, decoder),
        [
            (petl.mam(30, 512, scale=4.0, mlp=800), 27_377_664),
            (petl.prefix(200), 2 * 200 * d * attentions * layers),
            (petl.pfeiffer(600), 2 * 600 * d * ffns * layers),
            (petl.lora(16), 4 * 16 * d * attentions * layers),
            (petl.lora_ffn(102), 10 * 102 * d * ffns * layers),
            (petl.houlsby(200), 2 * 200 * d * (attentions + ffns) * layers),
            (petl.multi_head_parallel(30), 2 * 30 * d * attentions * layers),
        ],
    )
    roberta = TransformerConfig(features=768, num_layers=12, num_heads=12, scan=True)
    counts(Stacks(roberta), [(petl.mam(16, 16, scale=2.0), 589_824)])


def test_any_linen_model_takes_adapters():
    class Perceptron(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(3, name="last")(nn.relu(nn.Dense(5, name="first")(x)))

    model, x = Perceptron(), jax.random.normal(jax.random.key(0), (4, 6))
    params = model.init(jax.random.key(1), x)["params"]
    part = petl.Delta(name="a", where=("first",), modified="output", bottleneck=2)
    added = petl.init((part,), jax.random.key(2), lambda p: model.apply({"params": p}, x), params)
    added = jax.tree.map(lambda v: v + 0.5, added)
    with petl.adapted((part,), added):
        got = model.apply({"params": params}, x)
    a = added["a"]["first"]
    hidden = x @ params["first"]["kernel"] + params["first"]["bias"]
    hidden += nn.relu(x @ a["down"]["kernel"] + a["down"]["bias"]) @ a["up"]["kernel"]
    hidden = nn.relu(hidden + a["up"]["bias"])
    close(got, hidden @ params["last"]["kernel"] + params["last"]["bias"])


def test_mistakes_are_named():
    def sites(*method):
        return petl.find_sites(method, forward, PARAMS)

    with pytest.raises(ValueError, match=r"no module.*Nearest paths: .*mlp"):
        sites(petl.Delta(name="a", where=("mpl$",)))
    with pytest.raises(ValueError, match="different names"):
        sites(*petl.prefix(2), *petl.prefix(3))
    with pytest.raises(ValueError, match="Did you mean 'pfeiffer'"):
        petl.named("pfeifer")
    with pytest.raises(ValueError, match="choose one of relu"):
        petl.Delta(name="a", where=("mlp",), form="gelu")
    with pytest.raises(ValueError, match="needs per_head"):
        petl.Delta(name="a", where=("mlp",), form="softmax", modified="heads")
    with pytest.raises(ValueError, match="LoRA"):
        sites(*petl.lora(2, where="embedding_norm"))
