"""docs/upstream.md: what it says of veRL is so in the installed one, and its mends do what they claim."""

import itertools
import subprocess

import numpy as np
import pytest

from rapo_verl.method.passk import pass_at_k


def test_verls_best_at_k_is_too_low_and_pass_at_k_is_the_mean_over_subsets():
    from verl.trainer.ppo.metric_utils import bootstrap_metric

    ((best, _),) = bootstrap_metric([1.0, 0.0, 0.0, 0.0], 4, [np.max])
    assert best == pytest.approx(1 - (3 / 4) ** 4, abs=0.05)  # 1000 draws: a standard error of 0.015
    assert pass_at_k([1], 4, 4)[0] == 1
    for right, k in itertools.product(range(7), range(1, 7)):
        answers = [1] * right + [0] * (6 - right)
        subsets = [any(subset) for subset in itertools.combinations(answers, k)]
        assert pass_at_k([right], 6, k)[0] == pytest.approx(np.mean(subsets), abs=1e-12)


def test_shell_splits_the_hosts_as_the_page_says():
    script = """scontrol() { printf 'node-a\\nnode-b\\n'; }
    nodes=$(scontrol); old=("$nodes"); mapfile -t new < <(scontrol)
    echo "${#old[@]} ${#new[@]}" """
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout == "1 2\n"


def test_exhausted_loader_yields_nothing_after_it_is_restored():
    from torchdata.stateful_dataloader import StatefulDataLoader

    def batches(loader):
        return sum(1 for _ in loader)

    def taken(number):
        loader = StatefulDataLoader(list(range(8)), batch_size=2)
        for _ in itertools.islice(iter(loader), number):
            state = loader.state_dict()
        return state

    for number, left in ((4, 0), (3, 1)):
        resumed = StatefulDataLoader(list(range(8)), batch_size=2)
        resumed.load_state_dict(taken(number))
        assert batches(resumed) == left
    assert batches(StatefulDataLoader(list(range(8)), batch_size=2)) == 4
