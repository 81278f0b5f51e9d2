"""Samples that survive any kill, and their verdicts (`rapo eval generate`, `score`). No statistics, no page in here.

`spec` says what is to be sampled, `store` keeps it in shards that never change, `engines` run vLLM here or on Ray.
"""
