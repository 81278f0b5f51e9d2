"""The ladder's losses against closed forms, and the whole command on a tiny base."""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from rapo_verl.toy import make

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import ladder  # noqa: E402
from ladder_losses import Batch, Settings, advantages_of, answers_loss, rollout_loss  # noqa: E402
from ladder_methods import METHODS, TRIES  # noqa: E402


def batch(rewards: list[float], length: int = 3) -> Batch:
    """Return one prompt's responses of equal length with log-probs of a policy that is its own sampler."""
    torch.manual_seed(0)
    n = len(rewards)
    log_prob = -torch.rand(n, length) - 0.1
    tokens = torch.randint(0, 5, (n, length))
    mask = torch.ones(n, length, dtype=torch.bool)
    return Batch(torch.zeros(n, dtype=torch.long), tokens, log_prob, mask, torch.tensor(rewards))


def test_every_method_has_the_same_number_of_tries_or_no_choice():
    assert {len(tries) for tries in METHODS.values()} == {1, TRIES}
    names = [settings.name() for tries in METHODS.values() for settings in tries]
    assert len({(i, name) for i, name in enumerate(names)}) == len(names)
    assert all("/" not in name and len(name) < 200 for name in names)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("right", [0, 1, 3, 5])
def test_passk_advantages_are_the_mean_over_the_subsets_that_hold_a_response(right, k):
    n = 5
    rewards = [1.0] * right + [0.0] * (n - right)
    found = advantages_of(Settings(n=n, advantage="passk", passk=k), batch(rewards))[:, 0]
    mean = 1 - math.comb(n - right, k) / math.comb(n, k)
    for i in range(n):
        subsets = [s for s in itertools.combinations(range(n), k) if i in s]
        own = sum(max(rewards[j] for j in s) for s in subsets) / len(subsets)
        assert found[i] == pytest.approx((own - mean) / (math.sqrt(mean * (1 - mean)) + 1e-6), abs=1e-5)


def test_a_prompts_answers_weigh_as_one_whatever_their_number():
    answers = batch([1.0, 1.0, 1.0])
    answers.prompt = torch.tensor([0, 0, 1])
    # Token weights of the library's "token-mean": shares over the mean length, 3 here.
    answers.weight = torch.tensor([0.75, 0.25, 1.0], dtype=torch.float64) / 3
    log_prob = answers.log_prob.clone().requires_grad_()
    loss = answers_loss(log_prob, answers)
    per_answer = -answers.log_prob.mean(1)
    assert loss.item() == pytest.approx(((0.75 * per_answer[0] + 0.25 * per_answer[1] + per_answer[2]) / 2).item())
    loss.backward()
    torch.testing.assert_close(-log_prob.grad.sum(1), torch.tensor([0.375, 0.125, 0.5]))


def test_simko_keeps_the_value_and_hands_on_a_share_of_the_gradient():
    responses = batch([1.0, 0.0])
    logits = torch.randn(2, 3, 5, requires_grad=True)
    full = logits.log_softmax(-1)
    log_prob = full.gather(2, responses.tokens[..., None])[..., 0]
    responses.log_prob = log_prob.detach()
    responses.advantages = torch.tensor([[1.0] * 3, [-1.0] * 3])
    plain = rollout_loss(full, log_prob, responses, Settings())
    simko = rollout_loss(full, log_prob, responses, Settings(surrogate="simko", top_share=0.3))
    assert simko.item() == pytest.approx(plain.item(), abs=1e-6)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (plain, simko)]
    entropy = -(full.exp() * full).sum(-1)
    forking = entropy >= entropy.flatten().quantile(0.8)
    changed = (gradients[0] - gradients[1]).abs().amax(-1) > 1e-7
    assert changed.any() and not changed[~forking].any()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_finite_loss_and_gradient(method):
    settings = METHODS[method][-1]
    responses = batch([1.0, 0.0, 0.0, 1.0] * (settings.n // 4))
    logits = torch.randn(settings.n, 3, 5, requires_grad=True)
    full = logits.log_softmax(-1)
    log_prob = full.gather(2, responses.tokens[..., None])[..., 0]
    responses.log_prob, responses.ref_log_prob = log_prob.detach() - 0.01, log_prob.detach() + 0.3
    responses.advantages = advantages_of(settings, responses)
    if settings.surrogate == "none":
        responses.weight = torch.full((settings.n,), 1 / 3)
        loss = answers_loss(log_prob, responses)
    else:
        loss = rollout_loss(full, log_prob, responses, settings)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0


def test_the_command_runs_resumes_and_prints_its_tables(toy_dir, tmp_path, monkeypatch, capsys):
    """Two methods, two steps, one pair, on a base trained for a moment."""
    for base in ("base0", "base2"):
        folder = tmp_path / "toys" / base
        folder.mkdir(parents=True)
        (folder / make.WORLD_FILE).write_text(json.dumps({"world_seed": 0, "eval": [24, 99]}))
        for name in (make.MODEL_DIR, make.TRAIN_FILE):
            (folder / name).symlink_to(toy_dir / name)
    methods = ["GRPO, low_var_kl 1e-2", "answers m = 32, 1"]
    arguments = ["--out", str(tmp_path / "out"), "--toys", str(tmp_path / "toys"), "--steps", "2", "--pairs", "1"]
    monkeypatch.setattr(sys, "argv", ["ladder.py", *arguments, "--problems", "12", "--methods", *methods])

    def run() -> tuple[str, dict[Path, int]]:
        ladder.main()
        shown = capsys.readouterr().out
        return shown, {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json")}

    first, cells = run()
    assert len(cells) == 4 and all(f"| {method} |" in first for method in ("base", *methods))
    lost = next(path for path in cells if "kl=low_var_kl" in path.name)
    before = json.loads(lost.read_text())["p"]
    lost.unlink()
    second, again = run()
    assert second == first and json.loads(lost.read_text())["p"] == before
    assert {path for path in cells if cells[path] != again[path]} == {lost}
    assert (tmp_path / "out" / "ladder.png").stat().st_size > 1000
