import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
# Ray gives its workers a niceness of 15: on a machine that does anything else they would starve.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="session")
def toy_dir(tmp_path_factory) -> Path:
    """A toy whose base model was trained for seconds: enough to write letters and digits, not to solve problems."""
    from rapo_verl.toy import base_model, make
    from rapo_verl.toy.world import World

    folder = tmp_path_factory.mktemp("toy")
    world = World(0)
    make.write_problems(world, folder, train=(240, 0), evaluation=(24, 99))
    torch.set_num_threads(1)
    base_model.pretrain(world, folder / make.MODEL_DIR, seed=0, steps=60, batch_size=48, progress=False)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the trainings, which take longest: the other processes of `make test` do the rest meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_runs.py")
