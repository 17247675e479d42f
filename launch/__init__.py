"""Starting jobs: on this machine, on TPU VMs, on GKE, on Slurm."""
