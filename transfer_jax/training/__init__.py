"""Training: one loop, experiments of named stages, sharding, checkpoints, reports."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transfer_jax.training.checkpoint import load_variables
    from transfer_jax.training.config import FitConfig, OptimizerConfig, base_config, fit_config
    from transfer_jax.training.experiment import Experiment
    from transfer_jax.training.host import keep_memory
    from transfer_jax.training.loop import Fitted, NonFiniteError, Preempted, evaluate, fit
    from transfer_jax.training.report import print_results, write_report
    from transfer_jax.training.sharding import Layout, make_mesh
    from transfer_jax.training.writers import read_metrics

# Resolved on first use: config files and reports need neither flax nor orbax.
_HOME = {
    "Experiment": "experiment",
    "FitConfig": "config",
    "Fitted": "loop",
    "Layout": "sharding",
    "NonFiniteError": "loop",
    "OptimizerConfig": "config",
    "Preempted": "loop",
    "base_config": "config",
    "evaluate": "loop",
    "fit": "loop",
    "fit_config": "config",
    "keep_memory": "host",
    "load_variables": "checkpoint",
    "make_mesh": "sharding",
    "print_results": "report",
    "read_metrics": "writers",
    "write_report": "report",
}

__all__ = [
    "Experiment", "FitConfig", "Fitted", "Layout", "NonFiniteError", "OptimizerConfig", "Preempted",
    "base_config", "evaluate", "fit", "fit_config", "keep_memory", "load_variables", "make_mesh",
    "print_results", "read_metrics", "write_report",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"transfer_jax.training.{_HOME[name]}"), name)
    raise AttributeError(f"module 'transfer_jax.training' has no attribute {name!r}")
