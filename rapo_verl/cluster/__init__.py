"""A run over the nodes of a Slurm job: docs/cluster.md."""
