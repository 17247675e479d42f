"""The objective protocol, the basic objectives, and the transformations that make methods."""

from transfer_jax.objectives.base import Aux, Mean, Objective, Transformed, Variables

__all__ = ["Aux", "Mean", "Objective", "Transformed", "Variables"]
