"""The first stage of the quickstart, with a small network: what tests of launchers train.

Config and recipe in one file. The environment variable PAUSE is how many seconds every batch takes
longer than it has to: time to stop a job in its middle.
"""

import contextlib
import os
import time

from transfer_jax import configuration
from transfer_jax.papers import quickstart
from transfer_jax.training import fit_config


class _Done(Exception):
    pass


def get_config(variant=""):
    config = configuration.get_config("quickstart").copy_and_resolve_references()
    config.unlock()
    config.recipe = "first_stage:recipe"
    config.batch_size = 48
    config.model.update({"features": 8, "depth": 1})
    config.model.mixer_options.state_size = 4
    # Everything that can be split over `fsdp` is, but for the state matrices: XLA's FFT on CPUs
    # refuses the layouts that this gives it.
    config.sharding.min_size = 16
    config.sharding.rules = (("ssm/", ()),)
    config.pretrain = fit_config(
        steps=24, log_every=1, eval_every=12, checkpoint_every=4, optimizer={"learning_rate": 3e-3}
    )
    return config


def recipe(exp):
    fit = exp.fit
    pause = float(os.environ.get("PAUSE", 0))

    def first(name, objective, train, config, evaluate):
        if pause:
            train = _Slow(train, pause)
        fitted = fit(name, objective, train, config, evaluate=evaluate)
        for metric, value in fitted.metrics.items():
            exp.record(metric, value)
        raise _Done

    exp.fit = first
    with contextlib.suppress(_Done):
        quickstart.recipe(exp)


class _Slow:
    def __init__(self, data, pause):
        self.data, self.pause = data, pause

    def example_batch(self):
        return self.data.example_batch()

    def iterator(self, process_index=0, process_count=1):
        return _SlowIterator(self.data.iterator(process_index, process_count), self.pause)


class _SlowIterator:
    def __init__(self, inner, pause):
        self.inner, self.pause = inner, pause

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(self.pause)
        return next(self.inner)

    def __getattr__(self, name):  # get_state, set_state, close
        return getattr(self.inner, name)
