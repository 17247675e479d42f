"""Recipes draw what they record, and not the metrics of every stage."""

import pytest

from transfer_jax.training import report


@pytest.fixture(scope="module", autouse=True)
def _no_panels_of_stages():
    """A figure takes longer than a training of a few steps; training/test_report.py draws them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_draw_stage", lambda curves, title, file: file.touch())
        yield
