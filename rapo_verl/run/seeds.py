"""Sampling seeds of single responses, for training and evaluation."""

import hashlib
import json


def sampling_seed(*key: str | int | bool) -> int:
    """Return a sampling seed in [0, 2^62) from what identifies a response (run seed, step, problem, number, ...).

    A hash, so that neighbours share nothing: vLLM gives child i of a request the seed s + i, and its default seed is 0,
    so that seeds counted up from small numbers repeat each other's samples.

    Args:
        key: integers, booleans and strings; their order and types count.
    """
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
