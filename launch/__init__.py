"""Starts runs on one machine, TPU VMs, GKE and SLURM; sweeps; and plans of runs without their devices."""
