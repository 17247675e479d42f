"""LoRA and prefixes in PEFT's files, in both directions, against PEFT itself."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from tests.interop import peers
from transfer_jax import trees
from transfer_jax.interop import from_pretrained
from transfer_jax.interop.peft import load_peft, save_peft
from transfer_jax.nn import petl, stack_layers

peft = pytest.importorskip("peft")
torch = peers.torch

V, L = 40, 7
TOKENS = np.array(jax.random.randint(jax.random.key(0), (2, L), 4, V))
SIZES = {
    "vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 20, "num_labels": 3,
}  # fmt: skip


@pytest.fixture(scope="module", params=["Bert", "Roberta"])
def classifier(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    name = f"{request.param}ForSequenceClassification"
    config = getattr(peers.transformers, f"{request.param}Config")(**SIZES)
    peers.make_peer(directory, name, config)
    return directory, name, from_pretrained(directory)


def theirs(directory, name):
    return getattr(peers.transformers, name).from_pretrained(directory).eval()


def logits(peer):
    with torch.no_grad():
        mask = torch.ones(2, L, dtype=torch.long)
        return peer.eval()(peers.to_torch(TOKENS), attention_mask=mask)[0].numpy()


def ours(module, params, adapter):
    """Also with what the file replaces, a head."""
    params = _replaced(params, adapter.params)

    @jax.jit
    def run(params, added):
        with petl.adapted(adapter.method, added):
            return module.apply({"params": params}, TOKENS)

    return np.array(run(params, adapter.added))


def _replaced(params, given):
    return jax.tree.map(
        lambda new, old: old if new is None else new, given, params, is_leaf=lambda x: x is None
    )


OPTIONS = {
    "plain": {"r": 3, "lora_alpha": 6, "target_modules": ["query", "value"]},
    "everything": {
        "r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["query", "key", "dense"],
        "rank_pattern": {"layer.1.attention.self.query": 2},
        "alpha_pattern": {"key": 5}, "exclude_modules": r".*(pooler|classifier).*",
        "modules_to_save": ["classifier"], "task_type": "SEQ_CLS", "lora_dropout": 0.1,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", OPTIONS)
def test_lora_of_peft_gives_the_same_outputs_here_and_back_there(classifier, kind, tmp_path):
    directory, name, (module, params, _) = classifier
    peer = peft.get_peft_model(theirs(directory, name), peft.LoraConfig(**OPTIONS[kind]))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    peer.save_pretrained(tmp_path / "a")
    expected = logits(peer)
    adapter = load_peft(tmp_path / "a", module)
    got = ours(module, params, adapter)
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)
    merged = petl.merge(adapter.method, adapter.added, _replaced(params, adapter.params))
    np.testing.assert_allclose(
        module.apply({"params": merged}, TOKENS), expected, atol=5e-5, rtol=5e-5
    )
    # Written by us, read by them.
    save_peft(
        tmp_path / "b", module, adapter.method, adapter.added, params=adapter.params,
        task_type="SEQ_CLS" if kind == "everything" else None,
    )  # fmt: skip
    again = peft.PeftModel.from_pretrained(theirs(directory, name), tmp_path / "b")
    np.testing.assert_allclose(logits(again), expected, atol=2e-5, rtol=2e-5)
    if kind == "plain":
        settings = json.loads((tmp_path / "b/adapter_config.json").read_text())
        assert settings["target_modules"] == ["query", "value"]
        assert settings["lora_alpha"] / settings["r"] == 2.0
    # A scanned stack reads the same file.
    stack = dataclasses.replace(module.config.stack, scan=True)
    scanned = module.clone(config=dataclasses.replace(module.config, stack=stack))
    adapter = load_peft(tmp_path / "a", scanned)
    got = ours(scanned, stack_layers(params), adapter)
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)


def test_lora_trained_here_loads_there(classifier, tmp_path):
    """A learned scale, and the output projection, whose kernel has two input axes; scanned."""
    directory, name, (module, params, _) = classifier
    stack = dataclasses.replace(module.config.stack, scan=True)
    module = module.clone(config=dataclasses.replace(module.config, stack=stack))
    params = stack_layers(params)
    (part,) = petl.lora(2, where=r"(attention/(out|key)|mlp/(up|down))$")
    method = (dataclasses.replace(part, scale=None, composition="scaled"),)
    run = functools.partial(module.apply, inputs=TOKENS)
    added = petl.init(method, jax.random.key(1), lambda p: run({"params": p}), params)
    rng = np.random.default_rng(0)
    added = jax.tree.map(lambda x: x + np.float32(0.3 * rng.normal(size=x.shape)), added)
    with petl.adapted(method, added):
        expected = run({"params": params})
    head = trees.partition(params, "^(pooler|classifier)")[0]
    save_peft(tmp_path / "a", module, method, added, params=head, task_type="SEQ_CLS")
    peer = peft.PeftModel.from_pretrained(theirs(directory, name), tmp_path / "a")
    np.testing.assert_allclose(logits(peer), expected, atol=2e-5, rtol=2e-5)
    other = petl.pfeiffer(2)
    with pytest.raises(ValueError, match="neither LoRA nor prefix"):
        save_peft(tmp_path / "b", module, other, {"adapter": {}})


def test_prefixes_in_both_directions(tmp_path):
    """PEFT also moves the positions by the length of the prefix."""
    config = peers.transformers.BertConfig(**SIZES)
    peers.make_peer(tmp_path / "model", "BertModel", config)
    module, params, _ = from_pretrained(tmp_path / "model")
    shifted = module.clone(config=dataclasses.replace(module.config, position_offset=3))
    base = theirs(tmp_path / "model", "BertModel")
    peer = peft.get_peft_model(
        base, peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
    )
    peer.save_pretrained(tmp_path / "a")
    adapter = load_peft(tmp_path / "a", module)
    assert petl.count(adapter.method, adapter.added) == 2 * 3 * 16 * 2
    np.testing.assert_allclose(
        ours(shifted, params, adapter), logits(peer), atol=2e-5, rtol=2e-5
    )  # fmt: skip
    save_peft(tmp_path / "b", module, adapter.method, adapter.added,
              task_type="FEATURE_EXTRACTION")  # fmt: skip
    again = peft.PeftModel.from_pretrained(theirs(tmp_path / "model", "BertModel"), tmp_path / "b")
    np.testing.assert_array_equal(logits(again), logits(peer))


def test_fused_projections_of_gpt2(tmp_path):
    config = peers.transformers.GPT2Config(
        vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=20, bos_token_id=0, eos_token_id=0
    )
    peers.make_peer(tmp_path / "model", "GPT2LMHeadModel", config)
    module, params, _ = from_pretrained(tmp_path / "model")
    base = theirs(tmp_path / "model", "GPT2LMHeadModel")
    peer = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True,
                              init_lora_weights=False)
    )  # fmt: skip
    peer.save_pretrained(tmp_path / "a")
    adapter = load_peft(tmp_path / "a", module)
    expected = logits(peer)
    np.testing.assert_allclose(ours(module, params, adapter), expected, atol=2e-5, rtol=2e-5)
    # The projections' own inputs now differ: the ranks add up in the file.
    lora = adapter.added["lora"]
    lora["stack"]["layers_0"]["attention"]["value"]["kernel"]["a"] += 0.1
    del lora["stack"]["layers_1"]["attention"]["key"]
    expected = ours(module, params, adapter)
    save_peft(tmp_path / "b", module, adapter.method, adapter.added)
    again = peft.PeftModel.from_pretrained(
        theirs(tmp_path / "model", "GPT2LMHeadModel"), tmp_path / "b"
    )
    np.testing.assert_allclose(logits(again), expected, atol=2e-5, rtol=2e-5)


def test_wrong_files_are_refused(classifier, tmp_path):
    _, name, (module, _, _) = classifier
    other = peers.transformers.GPT2Config(vocab_size=V, n_embd=16, n_layer=1, n_head=4)
    peer = peft.get_peft_model(
        peers.transformers.GPT2LMHeadModel(other), peft.LoraConfig(target_modules=["c_attn"])
    )
    peer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn \(no such module\)"):
        load_peft(tmp_path / "gpt2", module)
    wide = getattr(peers.transformers, name.replace("ForSequenceClassification", "Config"))(
        **{**SIZES, "hidden_size": 32}
    )
    peer = peft.get_peft_model(
        getattr(peers.transformers, name)(wide), peft.LoraConfig(target_modules=["query"])
    )
    peer.save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="another shape"):
        load_peft(tmp_path / "wide", module)
    settings = json.loads((tmp_path / "wide/adapter_config.json").read_text())
    (tmp_path / "wide/adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora"):
        load_peft(tmp_path / "wide", module)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        load_peft(tmp_path / "nowhere", module)
