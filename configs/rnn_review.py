"""Recurrent networks, after Lipton, Berkowitz and Elkan 2015 (a survey without experiments).

Variants that need no download, or only ``TRANSFER_JAX_DATA``, are small; ``wmt14``, ``ptb``,
``char_rnn``, ``handwriting``, ``coco`` and ``ntm_copy`` are systems that the survey is about, at
their published sizes. None of those has been run; all but ``ntm_copy`` are lowered in the tests.

Measured with the seeds 0, 1, 2, one untuned setting each, on 2 CPU cores that other jobs shared, by

    python -m launch.local --config=configs/rnn_review.py:VARIANT --workdir=DIR --config.seed=SEED

and, where a variant has several networks, some of them in a process of their own (a stage's seed
depends on its name alone). Seconds are of processor time, without other jobs.

``adding`` (T = 100, 52 s). Test MSE by seed: LSTM 0.0017, 0.0049, 0.0033; Elman 0.097, 0.165, 0.163
(the constant 1: 0.167). The LSTM bridges 100 steps each time. That an Elman network cannot holds
for two seeds: with seed 0 it begins to learn in the last 150 steps (orthogonal recurrent matrix).

``temporal_order`` (T = 60, 39 s). Test accuracy: LSTM 0.9995, 1, 1; Elman 0.242, 0.244, 0.258
(chance 0.25).

``bidirectional`` (20 s). Test accuracy of ``x_t XOR x_{t+5}``: both directions 1, 1, 1; forward
0.501, 0.499, 0.500.

``gradient_flow`` (9 s). Spectral norm of ds(t)/ds(0), means over the seeds; the linear networks
follow radius^t to 5e-6, the tanh networks stay below it:

=========================  =======  =======  =======
network                    t = 10   t = 50   t = 100
=========================  =======  =======  =======
tanh, radius 0.9           0.31     1.5e-3   1.6e-6
tanh, radius 1             0.85     0.11     5.8e-3
tanh, radius 1.1           2.0      1.8      0.71
LSTM cell, forget bias 0   0.011    1.2e-10  6.0e-21
LSTM cell, forget bias 1   0.25     6.5e-4   1.9e-7
LSTM cell, forget bias 5   3.5      84       309
=========================  =======  =======  =======

So the cell alone does not keep gradients: at the start an LSTM with the usual bias loses them
faster than an orthogonal tanh network. Its gates must open first.

``charlm`` (tinyshakespeare, 600 batches of 32 x 50 characters, 75 s). Test bits per character, mean
and standard deviation, on windows of 500 and of 50 characters that start from zero:

===========================  =============  =============
network                      500            50
===========================  =============  =============
LSTM 128, state carried      3.148 (0.036)  3.202 (0.032)
LSTM 128, reset              3.118 (0.011)  3.143 (0.010)
Elman 128, state carried     3.066 (0.006)  3.115 (0.009)
Elman 128, reset             3.066 (0.008)  3.092 (0.008)
Kneser-Ney 1-, 3-, 5-gram    4.850, 3.027, 2.366
===========================  =============  =============

None of the three claims shows in so short a training: the Elman network is ahead of the LSTM, the
carried state does not help even where there is one to carry, and all are above the 3-gram. After
1,200 batches (``--config.train.steps=1200``, seed 0 only) on windows of 500: LSTM carried 2.887,
reset 2.930, Elman carried 2.888: the carried state helps and the 3-gram is beaten, but the Elman
network is not, and the 5-gram is far off.
Clipping (Elman, recurrent matrix 1.5 times orthogonal, SGD at rate 1, 200 batches): without 47.2,
5.8, 56.9 bits, worse than the 1-gram; at norm 1 4.22, 4.09, 4.12.

``spoken_digits`` (100 batches of 32, about 30 s). Test accuracy: both directions (146,698
parameters) 0.977, 0.953, 0.973; forward (56,970) 0.930, 0.957, 0.927. Ahead with two seeds of
three, with more parameters.

``translation`` and ``digit_strings`` have been tried for a few steps only; whether a reversed
source gives a better BLEU has not been measured.
"""

from typing import Any

import ml_collections

from transfer_jax.training import base_config, fit_config

VARIANTS = {
    "adding": "the sum of two marked numbers among 100, LSTM and Elman; a minute on two cores",
    "gradient_flow": "gradients through time in untrained networks; half a minute, no training",
    "bidirectional": "XOR with a bit that comes later, one direction and both; a minute",
    "temporal_order": "in which order did two symbols come; a minute",
    "ntm_copy": "Graves et al. 2014: repeat up to 20 vectors, NTM and LSTM; hours on two cores",
    "charlm": "characters, state carried or not, beside n-grams (needs TRANSFER_JAX_DATA)",
    "spoken_digits": "spoken digits as mel energies (needs TRANSFER_JAX_DATA)",
    "digit_strings": "strings of spoken digits by CTC (needs TRANSFER_JAX_DATA)",
    "translation": "English to German, the source reversed or not (needs TRANSFER_JAX_DATA)",
    "wmt14": "Sutskever et al. 2014: English to French, 4 layers of 1000 cells",
    "ptb": "Zaremba et al. 2014, medium: words of the Penn Treebank",
    "char_rnn": "Karpathy 2015: characters, 2 layers of 128 cells (needs TRANSFER_JAX_DATA)",
    "handwriting": "Graves et al. 2009: lines of handwriting, both directions, CTC",
    "coco": "Vinyals et al. 2015: captions of images from their features",
}


def get_config(variant: str = "adding") -> ml_collections.ConfigDict:
    return {**SMALL, **FULL}[variant]()


def _base(task: str) -> ml_collections.ConfigDict:
    config = base_config("rnn_review")
    config.task = task
    config.uniform_init = 0.0  # parameters uniform in [-x, x]; 0 = each layer's own initial values
    return config


def _network(cell: str, features: int, **changes: Any) -> dict[str, Any]:
    """Fields of ``papers.rnn_review.body``."""
    section: dict[str, Any] = {
        "cell": cell, "features": features, "layers": 1, "bidirectional": False, "dropout": 0.0,
        "dtype": "float32", "radius": 0.0, "options": {},
    }  # fmt: skip
    if cell == "lstm":
        section["options"] = {"forget_bias": 1.0}
    return {**section, **changes}


def _compare(
    name: str, options: dict[str, Any], networks: dict[str, dict[str, Any]], *, steps: int,
    learning_rate: float, every: int, batch_size: int = 64,
) -> ml_collections.ConfigDict:  # fmt: skip
    config = _base("compare")
    config.batch_size = batch_size
    config.problem = ml_collections.ConfigDict(
        {"name": name, "options": options, "test_examples": 2048, "test_batch": 512}
    )
    config.networks = ml_collections.ConfigDict(networks)
    config.train = fit_config(
        steps=steps, log_every=100, eval_every=every,
        optimizer={"name": "adam", "learning_rate": learning_rate, "clip_norm": 1.0},
    )  # fmt: skip
    return config


def _adding() -> ml_collections.ConfigDict:
    networks = {"elman": _network("elman", 64), "lstm": _network("lstm", 64)}
    return _compare("adding", {"length": 100}, networks, steps=1500, learning_rate=2e-3, every=150)


def _bidirectional() -> ml_collections.ConfigDict:
    networks = {
        "forward": _network("lstm", 64), "both": _network("lstm", 64, bidirectional=True)
    }  # fmt: skip
    return _compare(
        "delayed_xor", {"length": 40, "delay": 5}, networks, steps=300, learning_rate=3e-3,
        every=50, batch_size=32,
    )  # fmt: skip


def _temporal_order() -> ml_collections.ConfigDict:
    networks = {"elman": _network("elman", 64), "lstm": _network("lstm", 64)}
    return _compare(
        "temporal_order", {"length": 60}, networks, steps=1000, learning_rate=2e-3, every=100
    )


def _ntm_copy() -> ml_collections.ConfigDict:
    """The copy task of Graves et al. 2014 with the published sizes and optimiser."""
    memory = {"slots": 128, "width": 20}
    networks = {
        "lstm": _network("lstm", 256, layers=3),
        "ntm": _network("ntm", 100, options=memory),
    }
    config = _compare(
        "copy", {"longest": 20, "width": 8}, networks, steps=50_000, learning_rate=1e-4,
        every=1_000, batch_size=16,
    )  # fmt: skip
    config.train.optimizer.update(name="rmsprop", b1=0.9, b2=0.95, clip_norm=0.0, clip_value=10.0)
    return config


def _gradient_flow() -> ml_collections.ConfigDict:
    config = _base("gradient_flow")
    config.flow = ml_collections.ConfigDict(
        {
            "features": 64, "length": 100, "noise": 0.1, "radii": (0.9, 1.0, 1.1),
            "forget_biases": (0.0, 1.0, 5.0),
        }
    )  # fmt: skip
    return config


def _language_model(
    networks: dict[str, dict[str, Any]], *, batch_size: int, window: int, train: Any
) -> ml_collections.ConfigDict:
    config = _base("language_model")
    config.data = ml_collections.ConfigDict({"unit": "character", "directory": ""})
    config.batch_size = batch_size  # streams of the text
    config.window = window
    config.long_window = 500
    config.ngrams = (1, 3, 5)
    config.networks = ml_collections.ConfigDict(networks)
    config.train = train
    return config


def _words(cell: str, features: int, carried: bool, **changes: Any) -> dict[str, Any]:
    """A network for ``_language_model``."""
    return _network(cell, features, carried=carried, **{"embedding": None, **changes})


def _charlm() -> ml_collections.ConfigDict:
    steep = {"name": "sgd", "learning_rate": 1.0, "b1": 0.0}

    def steep_fit(clip: float) -> dict[str, Any]:
        return fit_config(
            steps=200, log_every=50, eval_every=50, optimizer={**steep, "clip_norm": clip}
        ).to_dict()

    networks = {
        "elman_carried": _words("elman", 128, True),
        "elman_reset": _words("elman", 128, False),
        "lstm_carried": _words("lstm", 128, True),
        "lstm_reset": _words("lstm", 128, False),
        "steep": _words("elman", 128, True, radius=1.5, train=steep_fit(0.0)),
        "steep_clipped": _words("elman", 128, True, radius=1.5, train=steep_fit(1.0)),
    }
    train = fit_config(
        steps=600, log_every=100, eval_every=200,
        optimizer={"name": "adam", "learning_rate": 4e-3, "schedule": "cosine", "clip_norm": 1.0},
    )  # fmt: skip
    return _language_model(networks, batch_size=32, window=50, train=train)


def _frames() -> dict[str, int]:
    return {"samples": 6000, "bands": 24}


def _spoken_digits() -> ml_collections.ConfigDict:
    config = _base("spoken_digits")
    config.batch_size = 32
    config.frames = ml_collections.ConfigDict(_frames())
    config.networks = ml_collections.ConfigDict(
        {
            "both": _network("lstm", 64, layers=2, bidirectional=True, head="mean"),
            "forward": _network("lstm", 64, layers=2, head="mean"),
        }
    )
    config.train = fit_config(
        steps=100, log_every=50, eval_every=50,
        optimizer={"name": "adam", "learning_rate": 1e-3, "clip_norm": 1.0},
    )  # fmt: skip
    return config


def _label(networks: dict[str, dict[str, Any]], data: dict[str, Any]) -> ml_collections.ConfigDict:
    config = _base("label")
    config.data = ml_collections.ConfigDict(data)
    config.networks = ml_collections.ConfigDict(networks)
    config.test_batch = 64
    config.beams = 10
    return config


def _digit_strings() -> ml_collections.ConfigDict:
    networks = {
        "both": _network("lstm", 64, bidirectional=True),
        "forward": _network("lstm", 64),
    }
    data = {"directory": "", "labels": 10, "digits": 4, "strings": 2000, **_frames()}
    config = _label(networks, data)
    config.batch_size = 32
    config.train = fit_config(
        steps=600, log_every=100, eval_every=200,
        optimizer={"name": "adam", "learning_rate": 3e-3, "clip_norm": 1.0},
    )  # fmt: skip
    return config


def _translate(model: dict[str, Any], vocabulary: dict[str, int]) -> ml_collections.ConfigDict:
    config = _base("translate")
    config.data = ml_collections.ConfigDict({"directory": "", "source": "en", "target": "de"})
    config.vocabulary = ml_collections.ConfigDict(vocabulary)
    config.model = ml_collections.ConfigDict(
        {
            "cell": "lstm", "options": {"forget_bias": 1.0}, "layers": 1, "embedding": None,
            "dropout": 0.0, "dtype": "float32", "attention": False, "input_feeding": False,
            **model,
        }
    )  # fmt: skip
    config.orders = ("natural", "reversed")
    config.test_batch = 100
    config.beams = 5
    config.length_penalty = 0.0
    return config


def _translation() -> ml_collections.ConfigDict:
    config = _translate(
        {"features": 192, "embedding": 96, "dropout": 0.1},
        {"source": 3000, "target": 3000, "min_count": 2},
    )
    config.max_length = 15
    config.boundaries = (11, 16)
    config.batch_size = 64
    config.train = fit_config(
        steps=700, log_every=100, eval_every=350,
        optimizer={"name": "adam", "learning_rate": 3e-3, "schedule": "cosine", "clip_norm": 1.0},
    )  # fmt: skip
    return config


# -- full scale -----------------------------------------------------------------------------------

# Softmax and embeddings by token, everything else whole or split as fsdp does.
_BY_TOKEN = (
    (r"(^|/)head/kernel$", (None, "model")),
    (r"(^|/)output/kernel$", (None, "model")),
    (r"(^|/)embed(_source)?/embedding$", ("model", None)),
)


def _decay(factor: float, every: int, times: int) -> ml_collections.ConfigDict:
    """After ``train`` come ``times`` stages of ``every`` steps, each at ``factor`` times the rate
    of the one before."""
    return ml_collections.ConfigDict({"factor": factor, "every": every, "times": times})


def _wmt14() -> ml_collections.ConfigDict:
    """12 million pairs, 93,750 batches an epoch; after five epochs the rate is halved five times.

    The paper's loss is summed over the tokens of a sentence, ours is their mean: the rate of 0.7 is
    multiplied, the clipping at 5 divided by 30, the mean length of a target.
    """
    config = _translate(
        {"features": 1000, "layers": 4, "embedding": 1000, "dtype": "bfloat16", "options": {}},
        {"source": 160_000, "target": 80_000, "min_count": 1},
    )
    config.data.update(directory="data/wmt14", source="en", target="fr")
    config.orders = ("reversed",)
    config.max_length = 79
    config.boundaries = (10, 20, 30, 40, 50, 60, 80)
    config.batch_size = 128
    config.beams = 12
    config.uniform_init = 0.08
    config.sharding.rules = _BY_TOKEN
    config.train = fit_config(
        steps=5 * 93_750, log_every=100, eval_every=10_000, checkpoint_every=5_000,
        optimizer={"name": "sgd", "b1": 0.0, "learning_rate": 21.0, "clip_norm": 5 / 30},
    )  # fmt: skip
    config.decay = _decay(0.5, 46_875, 5)
    return config


def _ptb() -> ml_collections.ConfigDict:
    """929,589 words in 20 streams, 1,327 batches an epoch; from the seventh epoch on of 39 the rate
    is divided by 1.2.

    The paper's loss is summed over the 35 steps of a window, ours is their mean: the rate of 1 is
    multiplied and the clipping at 5 divided by 35.
    """
    network = _words("lstm", 650, True, layers=2, embedding=650, dropout=0.5, options={})
    train = fit_config(
        steps=6 * 1_327, log_every=100, eval_every=1_327, checkpoint_every=1_327,
        optimizer={"name": "sgd", "b1": 0.0, "learning_rate": 35.0, "clip_norm": 5 / 35},
    )  # fmt: skip
    config = _language_model({"lstm": network}, batch_size=20, window=35, train=train)
    config.data.update(unit="word", directory="data/ptb")
    config.ngrams = (3,)  # 10,000 ** 4 n-grams have no number of 63 bits with room to spare
    config.uniform_init = 0.05
    config.decay = _decay(1 / 1.2, 1_327, 33)
    config.sharding.rules = _BY_TOKEN
    config.expected = ml_collections.ConfigDict({"vocab_size": 10_000})
    return config


def _char_rnn() -> ml_collections.ConfigDict:
    """50 epochs of 401 batches; from the eleventh on, the rate is multiplied by 0.97 each time."""
    network = _words("lstm", 128, True, layers=2, options={})
    optimizer = {"name": "rmsprop", "learning_rate": 2e-3, "b1": 0.0, "b2": 0.95, "clip_value": 5.0}
    train = fit_config(
        steps=4_010, log_every=100, eval_every=401, checkpoint_every=401, optimizer=optimizer
    )
    config = _language_model({"lstm": network}, batch_size=50, window=50, train=train)
    config.uniform_init = 0.08
    config.decay = _decay(0.97, 401, 40)
    config.expected = ml_collections.ConfigDict({"vocab_size": 66})
    return config


def _handwriting() -> ml_collections.ConfigDict:
    """25 numbers at each step of the pen, 81 characters; the weights change after every line."""
    network = _network("lstm", 100, bidirectional=True, options={"peepholes": True})
    config = _label({"both": network}, {"directory": "data/iam_online", "labels": 81})
    config.batch_size = 1
    config.train = fit_config(
        steps=500_000, log_every=100, eval_every=5_364, checkpoint_every=5_364,
        monitor="validation/nll", monitor_mode="min", select_best=True, patience=20,
        optimizer={"name": "sgd", "b1": 0.9, "learning_rate": 1e-4},
    )  # fmt: skip
    config.expected = ml_collections.ConfigDict({"steps": 1_500, "features": 25, "labels": 70})
    return config


def _coco() -> ml_collections.ConfigDict:
    """414,113 captions; rate, decay, clipping and dropout are those of the authors' later code."""
    config = _base("caption")
    config.data = ml_collections.ConfigDict({"directory": "data/coco"})
    config.model = ml_collections.ConfigDict(
        {
            "cell": "lstm", "options": {}, "features": 512, "layers": 1, "embedding": 512,
            "dropout": 0.3, "dtype": "float32", "every_step": False,
        }
    )  # fmt: skip
    config.batch_size = 32
    config.test_batch = 64
    config.max_length = 30
    config.beams = 20
    config.length_penalty = 0.0
    config.uniform_init = 0.08
    config.sharding.rules = _BY_TOKEN
    config.train = fit_config(
        steps=8 * 12_941, log_every=100, eval_every=12_941, checkpoint_every=12_941,
        optimizer={"name": "sgd", "b1": 0.0, "learning_rate": 2.0, "clip_norm": 5.0},
    )  # fmt: skip
    config.decay = _decay(0.5, 8 * 12_941, 3)
    config.expected = ml_collections.ConfigDict({"features": 1024, "vocab_size": 8_800})
    return config


SMALL = {
    "adding": _adding,
    "gradient_flow": _gradient_flow,
    "bidirectional": _bidirectional,
    "temporal_order": _temporal_order,
    "ntm_copy": _ntm_copy,
    "charlm": _charlm,
    "spoken_digits": _spoken_digits,
    "digit_strings": _digit_strings,
    "translation": _translation,
}
FULL = {
    "wmt14": _wmt14,
    "ptb": _ptb,
    "char_rnn": _char_rnn,
    "handwriting": _handwriting,
    "coco": _coco,
}
