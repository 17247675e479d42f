"""ViT and DeiT: the same weights give the same numbers as in ``transformers``."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop import peers
from transfer_jax.interop import from_pretrained, resize_images, resize_vocabulary, save_pretrained
from transfer_jax.models import VisionTransformer, ViTConfig, vit_stack
from transfer_jax.trees.files import Checkpoint

IMAGES = np.array(jax.random.normal(jax.random.key(0), (2, 12, 12, 3)))
NAMES = ["ViTForImageClassification", "DeiTForImageClassificationWithTeacher"]


def config(kind):
    return getattr(peers.transformers, f"{kind}Config")(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20,
        image_size=12, patch_size=4, num_labels=5,
    )  # fmt: skip


@pytest.fixture(scope="module", params=NAMES)
def vit(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("vit")
    peer = peers.make_peer(directory, request.param, config(request.param.split("For")[0]))
    return directory, request.param, peer, from_pretrained(directory)


def channels_first(images):
    return peers.to_torch(images.transpose(0, 3, 1, 2))


def test_all_hidden_states_and_logits(vit):
    _, name, peer, (module, params, _) = vit
    expected = peer.base_model(channels_first(IMAGES), output_hidden_states=True)
    _, states = module.apply({"params": params}, IMAGES, hidden_states=True, method="features")
    # The last state is after the norm here, before it there.
    found = [*expected.hidden_states[:2], expected.last_hidden_state]
    assert len(states) == len(expected.hidden_states) == 3
    for ours, state in zip(states, found):
        np.testing.assert_allclose(ours, state.detach().numpy(), atol=2e-5)
    output = peer(channels_first(IMAGES))
    logits = module.apply({"params": params}, IMAGES)
    np.testing.assert_allclose(logits, output.logits.detach().numpy(), atol=2e-5)
    if "Teacher" in name:
        both = module.apply({"params": params}, IMAGES, method="both_logits")
        for ours, theirs in zip(both, (output.cls_logits, output.distillation_logits)):
            np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=2e-5)


def test_gradients(vit, tmp_path):
    _, _, peer, (module, params, _) = vit
    peer.zero_grad()
    (peer(channels_first(IMAGES)).logits ** 2).mean().backward()
    gradient = jax.jit(jax.grad(lambda p: jnp.mean(module.apply({"params": p}, IMAGES) ** 2)))
    save_pretrained(tmp_path / "ours", module, gradient(params))
    # Its names in memory are not those of its files: it writes its gradient itself.
    written = copy.deepcopy(peer)
    for ours, theirs in zip(written.parameters(), peer.parameters()):
        ours.data = theirs.grad
    written.save_pretrained(tmp_path / "theirs")
    ours, theirs = Checkpoint(tmp_path / "ours"), Checkpoint(tmp_path / "theirs")
    assert set(ours.specs) == set(theirs.specs)
    for key in ours.specs:
        expected = theirs.read(key)
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(ours.read(key), expected, atol=1e-4 * scale, err_msg=key)


def test_out_and_in_again_scanned_or_not(vit, tmp_path):
    directory, name, peer, (module, params, _) = vit
    peers.assert_round_trip(directory, tmp_path / "again", name, peer)
    scanned, stacked, _ = from_pretrained(directory, scan=True)
    np.testing.assert_allclose(
        scanned.apply({"params": stacked}, IMAGES), module.apply({"params": params}, IMAGES),
        atol=1e-5,
    )  # fmt: skip
    save_pretrained(tmp_path / "scanned", scanned, stacked)
    again = from_pretrained(tmp_path / "scanned").params
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_images_of_another_size(vit):
    _, _, peer, (module, params, _) = vit
    resized, more = resize_images(module, params, (8, 24))
    images = np.array(jax.random.normal(jax.random.key(1), (2, *resized.config.size, 3)))
    expected = peer(channels_first(images), interpolate_pos_encoding=True).logits
    np.testing.assert_allclose(
        resized.apply({"params": more}, images), expected.detach().numpy(), atol=2e-5
    )
    with pytest.raises(ValueError, match="no vocabulary"):
        resize_vocabulary(module, params, 10)
    same, equal = resize_images(module, params, 12)
    assert same == module
    np.testing.assert_array_equal(equal["positions"], params["positions"])


@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_the_bare_model_and_its_pooler(kind, tmp_path):
    name = f"{kind}Model"
    peer = peers.make_peer(tmp_path / "model", name, config(kind))
    module, params, _ = from_pretrained(tmp_path / "model")
    features = module.apply({"params": params}, IMAGES)
    expected = peer(channels_first(IMAGES))
    pooled = module.apply({"params": params}, features, method="pooled")
    np.testing.assert_allclose(pooled, expected.pooler_output.detach().numpy(), atol=2e-5)
    peers.assert_round_trip(tmp_path / "model", tmp_path / "again", name, peer)
    head = f"{kind}ForImageClassification"
    fresh = from_pretrained(tmp_path / "model", architecture=head, fresh=("^classifier",)).fresh
    assert fresh == ("classifier/bias", "classifier/kernel")


@pytest.mark.parametrize("distilled, count", [(False, 86_567_656), (True, 87_338_192)])
def test_the_published_base_models_have_their_number_of_parameters(distilled, count):
    head = "distilled" if distilled else "classification"
    config = ViTConfig(stack=vit_stack(scan=True), distillation_token=distilled, head=head)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(VisionTransformer(config).init, jax.random.key(0), images)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count
