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
from ladder_train import PROMPTS, _target  # noqa: E402


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


def test_advantages_of_negative_samples_and_of_a_kl_in_the_reward():
    responses = batch([1.0, 0.0, 0.0, 1.0])
    found = advantages_of(Settings(n=4, advantage="negative", positive=0.1), responses)
    assert found[:, 0].tolist() == pytest.approx([0.1, -1.0, -1.0, 0.1])
    responses.ref_log_prob = responses.log_prob - torch.tensor([[0.1], [0.2], [0.0], [0.6]])
    found = advantages_of(Settings(n=4, kl="k1_reward", kl_coef=0.5), responses)
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0]) - 0.5 * 3 * torch.tensor([0.1, 0.2, 0.0, 0.6])
    torch.testing.assert_close(found[:, 0], (scores - scores.mean()) / (scores.std() + 1e-6))


@pytest.mark.parametrize(
    ("kl", "moved", "value", "descends"),
    [
        ("low_var_kl", 0.0, "reverse", "forward"),
        ("k2", 0.0, None, "reverse"),
        ("ratio_k3", 0.0, "reverse", "reverse"),
        ("ratio_k3", 0.7, "reverse", "reverse"),
    ],
)
def test_a_penalty_has_the_value_and_the_gradient_of_the_kl_it_stands_for(kl, moved, value, descends):
    """Every token of a vocabulary of four, as often as an old policy of tenths says it: the exact expectation."""
    tenths = torch.tensor([4, 3, 2, 1])
    drawn = torch.arange(4).repeat_interleave(tenths)
    old, ref = (tenths / 10).log(), torch.tensor([-1.0, 0.5, 0.2, -0.4]).log_softmax(-1)
    logits = (old + moved * torch.tensor([1.0, -1.0, 0.5, 0.0])).requires_grad_()
    log_prob = logits.log_softmax(-1)
    rows = Batch(
        torch.zeros(10, dtype=torch.long), drawn[:, None], old[drawn, None], torch.ones(10, 1, dtype=torch.bool),
        torch.zeros(10), ref_log_prob=ref[drawn, None], advantages=torch.zeros(10, 1),
    )  # fmt: skip
    loss = rollout_loss(log_prob.expand(10, 1, 4), log_prob[drawn, None], rows, Settings(kl=kl, kl_coef=0.3))
    kls = {
        "reverse": (log_prob.exp() * (log_prob - ref)).sum(),
        "forward": (ref.exp() * (ref - log_prob)).sum(),
    }
    if value:
        torch.testing.assert_close(loss, 0.3 * kls[value])
    gradients = [torch.autograd.grad(of, logits, retain_graph=True)[0] for of in (loss, 0.3 * kls[descends])]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("surrogate", ["clip_cov", "kl_cov"])
def test_covariance_methods_touch_their_share_of_the_tokens_alone(surrogate):
    """Of twelve tokens a quarter: clip-cov drops them (covariance 1 to 5), kl-cov pulls the highest back."""
    responses = batch([1.0, 0.0, 0.0, 1.0])
    responses.log_prob = responses.log_prob * torch.tensor([1.0, 4.0, 1.0, 4.0])[:, None]
    responses.advantages = torch.tensor([2.0, -2.0, 1.0, -1.0])[:, None].expand(4, 3)
    log_prob = (responses.log_prob + 0.05).requires_grad_()
    settings = Settings(surrogate=surrogate, cov_ratio=0.25, cov_kl=0.5)
    rollout_loss(torch.zeros(4, 3, 5), log_prob, responses, settings).backward()
    plain = -responses.advantages * math.exp(0.05) / 12
    changed = (log_prob.grad - plain).abs() > 1e-6
    cov = responses.advantages * (log_prob - log_prob.mean()).detach()
    if surrogate == "clip_cov":
        assert changed.sum() == 3 and (log_prob.grad[changed] == 0).all()
        assert (cov[changed] > 1).all() and (cov[changed] < 5).all()
    else:
        assert changed.flatten().nonzero()[:, 0].tolist() == sorted(cov.flatten().topk(3).indices.tolist())
        torch.testing.assert_close(log_prob.grad[changed], (plain + 0.5 / 12)[changed])


@pytest.mark.parametrize(
    ("settings", "masses"),
    [
        (Settings(m=4), [[2 / 3, 1 / 3, 0], [1, 0, 0], [0, 0, 0]]),
        (Settings(m=4, omega_wrong=1.0), [[2 / 4, 1 / 4, 1 / 4], [1 / 4, 3 / 4, 0], [4 / 4, 0, 0]]),
        (Settings(m=4, weights="sample"), [[2, 1, 0], [1, 0, 0], [0, 0, 0]]),
    ],
)
def test_a_steps_answers_are_merged_and_weighted(settings, masses):
    """Prompt 0 has right answers 1, 1, 2 and wrong 3; prompt 1 right 1 and wrong 2, 2, 2; all others wrong 1 only."""
    tokens = torch.ones(PROMPTS, 4, dtype=torch.long)
    tokens[0], tokens[1] = torch.tensor([1, 1, 2, 3]), torch.tensor([1, 2, 2, 2])
    reward = torch.zeros(PROMPTS, 4)
    reward[0], reward[1, 0] = torch.tensor([1, 1, 1, 0]), 1
    answers = batch(reward.flatten().tolist(), length=2)
    answers.prompt = torch.arange(PROMPTS).repeat_interleave(4)
    answers.tokens = tokens.flatten()[:, None].repeat(1, 2)
    target = _target(answers, answers, None, None, None, settings)
    mass = torch.zeros(PROMPTS, 4, dtype=torch.float64)
    mass[target.prompt, target.tokens[:, 0]] = target.weight * target.mask.sum(1)
    torch.testing.assert_close(mass[:3, 1:], torch.tensor(masses, dtype=torch.float64))


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
