"""Launchers: run one function on every rank, under Ray, torchrun, deepspeed, Slurm or in this process."""
