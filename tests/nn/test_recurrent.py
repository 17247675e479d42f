"""LSTM and GRU: parity with PyTorch on the same weights, and padding that leaves no trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.nn import GRU, LSTM


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_parity_with_torch(name):
    torch = pytest.importorskip("torch")
    peer = getattr(torch.nn, name)(5, 7, batch_first=True)
    module = {"LSTM": LSTM, "GRU": GRU}[name](7)
    weights = {k: v.detach().numpy() for k, v in peer.named_parameters()}
    variables = {
        "params": {
            "input": {"kernel": weights["weight_ih_l0"].T, "bias": weights["bias_ih_l0"]},
            "hidden": {"kernel": weights["weight_hh_l0"].T, "bias": weights["bias_hh_l0"]},
        }
    }
    x = np.random.default_rng(0).normal(size=(3, 11, 5)).astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), shapes, variables)
    lengths = np.array([11, 4, 8])
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        torch.from_numpy(x), lengths, batch_first=True, enforce_sorted=False
    )
    with torch.no_grad():
        outputs, state = peer(packed)
        outputs = torch.nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True)[0].numpy()
    y, ours = module.apply(variables, x, lengths=jnp.asarray(lengths), method="prefill")
    valid = np.arange(11) < lengths[:, None]
    np.testing.assert_allclose(np.where(valid[..., None], y, 0), outputs, atol=1e-5)
    theirs = (state[1], state[0]) if name == "LSTM" else (state,)
    for a, b in zip(jax.tree.leaves(ours), theirs):
        np.testing.assert_allclose(a, b[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(module.apply(variables, x, lengths=lengths), y, atol=1e-6)


@pytest.mark.parametrize("module", [LSTM(6), GRU(6)], ids=["lstm", "gru"])
def test_chunks_and_steps_carry_the_state(module):
    x = jax.random.normal(jax.random.key(0), (2, 9, 6))
    variables = jax.jit(module.init)(jax.random.key(1), x)
    y, state = module.apply(variables, x[:, :4], method="prefill")
    z, state = module.apply(variables, x[:, 4:8], None, state, method="prefill")
    w, _ = module.apply(variables, x[:, 8], state, method="step")
    whole = jnp.concatenate([y, z, w[:, None]], axis=1)
    np.testing.assert_allclose(whole, module.apply(variables, x), atol=1e-6)
