"""Pretrain an S4 on the digits 0-4, then learn 5-9 by fine-tuning, LoRA, EWC and a task vector.

Runs on scikit-learn's bundled digits: no download. Measured with
``transfer-jax run quickstart --config.seed=S`` for S = 0, 1, 2 on 2 CPU cores (jax 0.10.2), test
accuracy in percent, mean and standard deviation over the seeds. "Old" and "new" choose among the
five classes of a task, "all" among ten. The strength of EWC and the rank of LoRA were set once and
not tuned; the share of the task vector is chosen on validation data in each run.

    way           old          new          all          trained
    pretrained    97.8 ± 1.0   21.6 ± 8.7   49.0 ± 0.5    9,034
    fine-tuning   55.9 ± 3.7   97.6 ± 2.3   60.9 ± 1.4    9,034
    LoRA          85.4 ± 2.0   90.1 ± 2.6   69.6 ± 4.4    1,098
    EWC           97.6 ± 0.6   87.0 ± 3.3   66.8 ± 3.5    9,034
    task vector   70.4 ± 13.7  95.2 ± 3.1   52.2 ± 11.8   9,034

EWC keeps the old task whole at the price of ten points on the new one; fine-tuning forgets. None of
them tells all ten classes apart well: the outputs of the two tasks were never trained against each
other.
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
