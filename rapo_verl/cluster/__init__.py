"""A run over the nodes of a Slurm job: one agent a node. Nothing in here knows what the run computes."""
