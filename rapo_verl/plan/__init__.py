"""``rapo plan``: what a run needs of its GPUs, before anyone queues for them. Arithmetic only: docs/scaling.md."""
