"""Runs an experiment on this machine, in one process or several.

    python -m launch.local --config=configs/s4.py:listops --workdir=runs/s4 \\
        --config.optimizer.learning_rate=1e-3

``--processes=N`` runs N processes as one job, as a cluster would; ``--devices=8`` gives each of
them 8 virtual CPU devices. See ``--help``.
"""

import sys

from transfer_jax.cli import main_local

if __name__ == "__main__":
    sys.exit(main_local())
