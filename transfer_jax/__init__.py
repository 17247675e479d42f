"""transfer_jax: sequence modelling and knowledge transfer in JAX.

A transfer method is a transformation of an objective, as an optimiser in optax is a
transformation of gradients; see ``docs/architecture.md``.

    import transfer_jax as tj

    experiment = tj.Experiment(tj.get_config("s4:digits"), "runs/s4-digits")
    experiment.run()
    experiment.report()

Subpackages are imported on first use, so ``import transfer_jax`` itself costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_SUBPACKAGES = (
    "data", "interop", "metrics", "models", "nn", "objectives", "ops", "papers", "training",
    "trees",
)  # fmt: skip
_NAMES = {
    "Aux": "objectives",
    "Experiment": "training",
    "FitConfig": "training",
    "Objective": "objectives",
    "Variables": "objectives",
    "fit": "training",
    "get_config": "configuration",
    "list_configs": "configuration",
}

if TYPE_CHECKING:
    from transfer_jax import (
        data,
        interop,
        metrics,
        models,
        nn,
        objectives,
        ops,
        papers,
        training,
        trees,
    )
    from transfer_jax.configuration import get_config, list_configs
    from transfer_jax.objectives import Aux, Objective, Variables
    from transfer_jax.training import Experiment, FitConfig, fit

__all__ = [
    "Aux", "Experiment", "FitConfig", "Objective", "Variables", "data", "fit", "get_config",
    "interop", "list_configs", "metrics", "models", "nn", "objectives", "ops", "papers",
    "training", "trees",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"transfer_jax.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"transfer_jax.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'transfer_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES, *_NAMES})
