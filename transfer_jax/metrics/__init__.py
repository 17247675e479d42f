"""Metrics of predictions against references, in NumPy: of texts, and of sequences of tasks.

Import the module that is needed, such as ``transfer_jax.metrics.text``.
"""
