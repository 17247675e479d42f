"""CLIP: the same weights give the same numbers as in ``transformers``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop import peers
from transfer_jax.interop import from_pretrained, resize_images, save_pretrained
from transfer_jax.models import Clip, clip_vit_b

IMAGES = np.array(jax.random.normal(jax.random.key(0), (3, 12, 12, 3)))
# The end of a text is 30, its largest number in all rows but the last.
TOKENS = np.array([[28, 5, 9, 30, 0, 0, 0], [28, 7, 30, 30, 30, 30, 30], [28, 4, 30, 31, 9, 1, 2]])


def config(end):
    both = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    return peers.transformers.CLIPConfig(
        projection_dim=10,
        text_config={
            **both, "intermediate_size": 24, "vocab_size": 32, "max_position_embeddings": 9,
            "eos_token_id": end,
        },
        vision_config={**both, "intermediate_size": 20, "image_size": 12, "patch_size": 4},
    )  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clip")
    peer = peers.make_peer(directory, "CLIPModel", config(30))
    return directory, peer, from_pretrained(directory)


def channels_first(images):
    return peers.to_torch(images.transpose(0, 3, 1, 2))


def theirs(peer):
    return peer(peers.to_torch(TOKENS), channels_first(IMAGES), output_hidden_states=True)


def test_all_hidden_states_embeddings_and_logits(clip):
    _, peer, (module, params, _) = clip
    expected = theirs(peer)
    norm = peer.vision_model.post_layernorm  # of the class token alone there, of all tokens here
    towers = {
        "image": (IMAGES, expected.vision_model_output, norm),
        "text": (TOKENS, expected.text_model_output, lambda x: x),
    }
    for tower, (inputs, output, norm) in towers.items():
        _, states = module.apply(
            {"params": params}, inputs,
            method=lambda m, x, tower=tower: getattr(m, tower).features(x, hidden_states=True),
        )  # fmt: skip
        found = [*output.hidden_states[:2], norm(output.last_hidden_state)]
        assert len(states) == len(output.hidden_states) == 3
        for ours, state in zip(states, found):
            np.testing.assert_allclose(ours, state.detach().numpy(), atol=2e-5)
        embedded = module.apply({"params": params}, inputs, method=f"encode_{tower}")
        np.testing.assert_allclose(
            embedded, output.pooler_output.detach().numpy(), atol=2e-5, rtol=2e-5
        )
    logits = module.apply({"params": params}, IMAGES, TOKENS)
    np.testing.assert_allclose(
        logits, expected.logits_per_image.detach().numpy(), atol=2e-5, rtol=2e-5
    )


def test_gradients(clip, tmp_path):
    _, peer, (module, params, _) = clip
    peer.zero_grad()
    (theirs(peer).logits_per_image ** 2).mean().backward()
    gradient = jax.jit(
        jax.grad(lambda p: jnp.mean(module.apply({"params": p}, IMAGES, TOKENS) ** 2))
    )(params)
    peers.assert_same_gradients(gradient, module, peer, tmp_path / "gradient")


def test_out_and_in_again(clip, tmp_path):
    directory, peer, _ = clip
    written = peers.assert_round_trip(directory, tmp_path / "again", "CLIPModel", peer)
    assert written["text_config"]["eos_token_id"] == 30


def test_scanned_layers_read_the_same_file(clip, tmp_path):
    directory, _, (module, params, _) = clip
    scanned, stacked, _ = from_pretrained(directory, scan=True)
    np.testing.assert_allclose(
        scanned.apply({"params": stacked}, IMAGES, TOKENS),
        module.apply({"params": params}, IMAGES, TOKENS), atol=1e-5,
    )  # fmt: skip
    save_pretrained(tmp_path / "scanned", scanned, stacked)
    again = from_pretrained(tmp_path / "scanned").params
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_images_of_another_size(clip):
    _, peer, (module, params, _) = clip
    resized, more = resize_images(module, params, (8, 16))
    assert module.config.text == resized.config.text
    images = IMAGES.reshape(3, 8, 18, 3)[:, :, :16]
    found = resized.apply({"params": more}, images, method="encode_image")
    expected = peer.get_image_features(
        channels_first(images), interpolate_pos_encoding=True
    ).pooler_output
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=2e-5, rtol=2e-5)


def test_an_end_token_of_two_means_the_largest_as_in_the_first_files(clip, tmp_path):
    peer = peers.make_peer(tmp_path / "clip", "CLIPModel", config(2))
    module, params, _ = from_pretrained(tmp_path / "clip")
    assert module.config.text.end_token is None
    embedded = module.apply({"params": params}, TOKENS, method="encode_text")
    expected = peer.get_text_features(peers.to_torch(TOKENS)).pooler_output.detach().numpy()
    np.testing.assert_allclose(embedded, expected, atol=2e-5)
    first = clip[2].module.apply({"params": params}, TOKENS, method="encode_text")
    np.testing.assert_allclose(first[:2], expected[:2], atol=2e-5)
    assert np.abs(first[2] - expected[2]).max() > 1e-2  # token 31 comes after the end
    assert peers.assert_round_trip(tmp_path / "clip", tmp_path / "again", "CLIPModel", peer)[
        "text_config"
    ]["eos_token_id"] == 2  # fmt: skip


@pytest.mark.parametrize("patch_size, count", [(16, 149_620_737), (32, 151_277_313)])
def test_the_published_models_have_their_number_of_parameters(patch_size, count):
    module = Clip(clip_vit_b(patch_size, scan=True))  # quicker to trace
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),
        jax.ShapeDtypeStruct((1, 77), jnp.int32),
    )  # fmt: skip
    with peers.torch.device("meta"):
        peer = peers.transformers.CLIPModel(
            peers.transformers.CLIPConfig(vision_config={"patch_size": patch_size})
        )
    assert sum(p.numel() for p in peer.parameters()) == count
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count
