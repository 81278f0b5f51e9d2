"""pass@k at any n: `generate` fills a folder with samples, `score` judges them, `responses` counts, `report` shows.

`plan` says what is to be sampled, `store` keeps it in shards that never change, `engines` run vLLM here or on Ray.
"""
