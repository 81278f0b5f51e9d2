"""Sampling seeds: the same key, the same seed; any other key, another."""

import itertools

from rapo_verl.run.seeds import sampling_seed


def test_seed_is_a_fixed_function_of_its_key():
    # Written down: another value would change every run and evaluation that is to be repeated.
    assert sampling_seed("train", 1, 2, 3, 4) == 2141131157978299603
    assert sampling_seed("eval", 1, 2, 3) == 3198684222350280460


def test_seeds_of_neighbours_all_differ():
    keys = itertools.product(("train", "validation"), range(3), range(20), range(40), range(16))
    seeds = [sampling_seed(*key) for key in keys]
    # 76,800 seeds of 62 bits collide by chance with probability 6e-10.
    assert len(set(seeds)) == len(seeds)


def test_seeds_lie_in_their_range_and_fill_it():
    seeds = [sampling_seed("train", i) for i in range(4096)]
    assert all(type(seed) is int and 0 <= seed < 2**62 for seed in seeds)
    # Of 4096 uniform seeds, the chance that none falls in a given 1/64 of the range is 1e-28.
    assert len({seed >> 56 for seed in seeds}) == 64


def test_neighbouring_keys_do_not_give_neighbouring_seeds():
    seeds = sorted(sampling_seed("train", i) for i in range(4096))
    # vLLM seeds child i with s + i: groups of up to 2,048 must not overlap. Chance of a gap below 4096: 1e-8.
    assert min(b - a for a, b in itertools.pairwise(seeds)) > 4096


def test_order_and_type_of_the_key_count():
    keys = [(1, 2), (2, 1), (12,), ("1", 2), (1, "2"), (True, 2), (1, 2, 0), (1,), (True,), ("1",), ("true",), (0,)]
    keys += [(False,), ("",), (), ("1, 2",), ("train", 1), ("train1",), (-1,)]
    assert len({sampling_seed(*key) for key in keys}) == len(keys)


def test_bytes_beyond_ascii_and_large_integers_are_keys_too():
    assert len({sampling_seed(key) for key in ("é", "e", "\u0000", 2**80, -(2**80))}) == 5
