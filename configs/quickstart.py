"""Pretrain an S4 on the digits 0-4, then learn 5-9 by fine-tuning, LoRA, EWC and a task vector.

Runs on scikit-learn's bundled digits: no download.
"""

import ml_collections

from transfer_jax.training import base_config, fit_config

VARIANTS = {"digits": "the whole comparison, about a minute on two cores"}


def get_config(variant: str = "digits") -> ml_collections.ConfigDict:
    del variant  # there is one
    config = base_config("quickstart")
    config.batch_size = 50
    config.model = ml_collections.ConfigDict(
        {
            "features": 32,
            "depth": 2,
            "mixer": "s4",
            # 64 steps: the memory of the smallest time step, 1 / dt_min, is about the sequence.
            "mixer_options": {"state_size": 16, "output": "glu", "dt_min": 0.01, "dt_max": 0.5},
            "norm": "layer",
            "dropout": 0.0,
            "dtype": "float32",
        }
    )
    ssm = {"where": r"ssm/(lambda_re|lambda_im|p|b|log_dt)$", "learning_rate": 1e-3}
    optimizer = {
        "learning_rate": 1e-2,
        "schedule": "cosine",
        "warmup_steps": 20,
        "weight_decay": 0.01,
        "groups": {"ssm": ssm},
    }
    every = {"log_every": 50, "eval_every": 100, "checkpoint_every": 100}
    config.pretrain = fit_config(steps=300, optimizer=optimizer, **every)
    config.transfer = fit_config(steps=200, optimizer=optimizer, **every)
    config.lora = ml_collections.ConfigDict(
        {
            "where": r"layer/out/kernel$",
            "rank": 4,
            "train": "^head",
            "fit": fit_config(steps=200, optimizer={**optimizer, "groups": {}}, **every),
        }
    )
    config.ewc = ml_collections.ConfigDict({"strength": 1000.0})
    config.task_vector = ml_collections.ConfigDict(
        {"shares": tuple(round(0.1 * i, 1) for i in range(1, 11))}
    )
    return config
