"""One cell of the ladder: a method trained on one (base, RL seed) pair of the toy world, in plain PyTorch.

Model, problems, batches, learning rate and steps as in recipe/experiment/toy_cpu.yaml; veRL's own advantages, policy
losses and KL penalties, the library's forward KL and reference answers, no veRL trainer. A mini-batch is 16 whole
prompts, whose keys and values are computed once for all of their responses.
"""

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from ladder_losses import Batch, Settings, advantages_of, answers_loss, mixture_weights, rollout_loss
from transformers import AutoTokenizer, Qwen2ForCausalLM

from rapo_verl.method.config import ReferenceConfig
from rapo_verl.method.reference_answers import answer_shares, token_weights
from rapo_verl.method.reweighting import reward_to_phi
from rapo_verl.reward import verify_integer
from rapo_verl.toy.base_model import encode_prompts, encode_solutions
from rapo_verl.toy.exact import response_log_prob
from rapo_verl.toy.make import load_problems
from rapo_verl.toy.world import OPS

# As in recipe/experiment/toy_cpu.yaml.
STEPS, PROMPTS, MINI_BATCHES, WARM_UP, MAX_TOKENS = 40, 32, 2, 5, 24
# The base's answers are drawn in chunks of this many a prompt: a method with m answers takes the first m of them.
ANSWERS_CHUNK = 32
# First plan letter and its three digits; see `success`.
PREFIX, NEGLIGIBLE = 4, 1e-8
# What is kept of each response drawn.
FIELDS = ("prompt", "tokens", "log_prob", "mask", "reward")


class Toy:
    """A toy folder in memory: base model, training problems in one RL seed's order, evaluation problems."""

    def __init__(self, folder: Path, seed: int) -> None:
        """Load the folder and shuffle its training problems."""
        self.folder, self.model_dir = folder, folder / "model"
        self.world, self.problems = load_problems(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_dir)
        frame = pd.read_parquet(folder / "train.parquet").sample(frac=1, random_state=seed)
        self.golds = [row["ground_truth"] for row in frame["reward_model"]]
        self.prompts = encode_prompts(self.tokenizer, [messages[0]["content"] for messages in frame["prompt"]])

    def model(self) -> Qwen2ForCausalLM:
        """Return a fresh copy of the base."""
        return Qwen2ForCausalLM.from_pretrained(self.model_dir, dtype=torch.float32)

    def sample(self, model: Qwen2ForCausalLM, step: int, n: int) -> Batch:
        """Return n judged responses to each prompt of a step, at temperature 1."""
        first = step * PROMPTS
        tokens, log_prob = _sample(model, self.prompts[first : first + PROMPTS], n, self.tokenizer.eos_token_id)
        ended = (tokens == self.tokenizer.eos_token_id).int()
        mask = (ended.cumsum(1) - ended) == 0
        prompt = torch.arange(PROMPTS).repeat_interleave(n)
        texts = self.tokenizer.batch_decode([t[m] for t, m in zip(tokens, mask)], skip_special_tokens=True)
        right = [verify_integer(t, self.golds[first + i])[0] == "correct" for t, i in zip(texts, prompt.tolist())]
        return Batch(prompt, tokens, log_prob, mask, torch.tensor(right).float())

    def answers(self, steps: int, m: int, cache: Path) -> list[Batch]:
        """Return m judged answers of the base to each prompt of every step, drawn once for all methods of a pair."""
        chunks = []
        for chunk in range(math.ceil(m / ANSWERS_CHUNK)):
            path = cache / f"answers{chunk}_steps{steps}.pt"
            if not path.exists():
                base = self.model()
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(1000 + chunk)
                    drawn = [vars(self.sample(base, step, ANSWERS_CHUNK)) for step in range(steps)]
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(f".{os.getpid()}.tmp")
                torch.save(drawn, temporary)
                temporary.rename(path)
            chunks.append(torch.load(path))
        # Chunk by chunk the prompts' answers are adjacent; so they are again in each step's m.
        grid = [
            {k: torch.cat([c[k].unflatten(0, (PROMPTS, -1)) for c in of_step], 1)[:, :m].flatten(0, 1) for k in FIELDS}
            for of_step in zip(*chunks)
        ]
        return [Batch(**step) for step in grid]


def train(
    toy: Toy,
    settings: Settings,
    seed: int,
    steps: int,
    cache: Path,
    observe: Callable[[int, Qwen2ForCausalLM, Batch], None] | None = None,
) -> tuple[Qwen2ForCausalLM, list[float]]:
    """Return the trained policy and the mean reward of every step; `observe` sees each step before its update."""
    policy = toy.model()
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), settings.lr, weight_decay=0.0)
    answers = toy.answers(steps, settings.m, cache) if settings.m else None
    torch.manual_seed(seed)
    curve = []
    for step in range(steps):
        prompts = toy.prompts[step * PROMPTS : (step + 1) * PROMPTS]
        rollout = toy.sample(policy, step, settings.n)
        judge(rollout, reference, prompts, settings)
        curve.append(rollout.reward.mean().item())
        if observe is not None:
            observe(step, policy, rollout)
        of_step = answers[step] if answers is not None else None
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, (step + 1) / WARM_UP)
        update(policy, reference, optimizer, prompts, rollout, of_step, settings)
    return policy, curve


def update(
    policy: Qwen2ForCausalLM,
    reference: Qwen2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    prompts: torch.Tensor,
    rollout: Batch,
    answers: Batch | None,
    settings: Settings,
) -> None:
    """Take the optimizer steps of one step's judged responses, and of the base's answers to its prompts."""
    target = None
    if answers is not None:
        target = _target(answers, rollout, policy, reference, prompts, settings)
        if settings.rehearse_from <= 1:
            rehearsed = answers.reward.view(PROMPTS, -1).mean(1) >= settings.rehearse_from
            target = target.rows(rehearsed[target.prompt])
            rollout.advantages = rollout.advantages * ~rehearsed[rollout.prompt, None]
    for chosen in torch.randperm(PROMPTS).view(MINI_BATCHES, -1):
        loss = _loss(policy, prompts, chosen, rollout, target, settings)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()


def success(toy: Toy, model: Qwen2ForCausalLM, problems: int) -> list[float]:
    """Return the success probability of the first evaluation problems, enumerated over the 64 right solutions.

    Solutions whose first plan letter and digits have a probability below NEGLIGIBLE are left out: at most 8e-8 a
    problem, 1e-4 of pass@1024, for half of the time.
    """
    found: list[float] = []
    for start in range(0, problems, 24):
        batch = toy.problems[start : min(start + 24, problems)]
        prompts = encode_prompts(toy.tokenizer, [problem.question for problem in batch])
        solutions = [solution for problem in batch for solution in toy.world.right_solutions(problem)]
        by_letter = encode_solutions(toy.tokenizer, solutions).unflatten(0, (-1, OPS))
        begun = response_log_prob(model, prompts, by_letter[:, 0, :PREFIX])
        likely = (begun.exp() > NEGLIGIBLE).nonzero()[:, 0]
        if not len(likely):  # of a policy that has fallen apart
            found += [0.0] * len(batch)
            continue
        tokens, problem = by_letter[likely].flatten(0, 1), (likely // OPS).repeat_interleave(OPS)
        log_probs = _logits(model, prompts, problem, tokens).double().log_softmax(-1)
        p = log_probs.gather(2, tokens[..., None])[..., 0].sum(1).exp()
        found += torch.zeros(len(batch), dtype=p.dtype).index_add(0, problem, p).clamp(max=1.0).tolist()
    return found


@torch.no_grad()
def _sample(model: Qwen2ForCausalLM, prompts: torch.Tensor, n: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return n responses to each prompt, filled with `end`, and their log-probs, both [prompts * n, MAX_TOKENS]."""
    first = model(prompts, use_cache=True, logits_to_keep=1)
    cache = first.past_key_values
    cache.batch_repeat_interleave(n)
    logits = first.logits[:, -1].repeat_interleave(n, 0)
    tokens = torch.full((len(logits), MAX_TOKENS), end)
    log_probs = torch.zeros(len(logits), MAX_TOKENS)
    done = torch.zeros(len(logits), dtype=torch.bool)
    for t in range(MAX_TOKENS):
        log_prob = logits.log_softmax(-1)
        # By inversion: four times as fast as torch.multinomial, which draws a number for every token.
        cumulative = log_prob.exp().cumsum(-1)
        drawn = torch.rand(len(logits), 1) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, drawn, right=True).clamp(max=logits.shape[-1] - 1)
        tokens[:, t], log_probs[:, t] = token[:, 0], log_prob.gather(1, token)[:, 0]
        done |= token[:, 0] == end
        if done.all() or t == MAX_TOKENS - 1:
            break
        logits = model(token, past_key_values=cache, use_cache=True).logits[:, -1]
    return tokens, log_probs


def _logits(model: Qwen2ForCausalLM, prompts: torch.Tensor, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits [rows, length, vocabulary] that predict each token of responses to prompts[prompt]."""
    head = model(prompts, use_cache=True, logits_to_keep=1)
    head.past_key_values.batch_select_indices(prompt)
    tail = model(tokens[:, :-1], past_key_values=head.past_key_values, use_cache=True).logits
    return torch.cat([head.logits[prompt], tail], 1)


@torch.no_grad()
def _log_prob(model: Qwen2ForCausalLM, prompts: torch.Tensor, batch: Batch, phi: torch.Tensor) -> torch.Tensor:
    """Return the log-prob of each token at temperature 1 / phi, RAPO's reading `token` of the reference."""
    logits = _logits(model, prompts, batch.prompt, batch.tokens)
    return (logits * phi[:, None, None]).log_softmax(-1).gather(2, batch.tokens[..., None])[..., 0]


def judge(rollout: Batch, reference: Qwen2ForCausalLM, prompts: torch.Tensor, settings: Settings) -> None:
    """Add what a term needs of the (reweighted) reference to a step's responses, and their advantages."""
    if settings.kl or settings.alpha:
        phi = reward_to_phi(rollout.reward, ReferenceConfig(phi_min=settings.phi_min))
        rollout.ref_log_prob = _log_prob(reference, prompts, rollout, phi)
    rollout.advantages = advantages_of(settings, rollout)


def _target(
    answers: Batch,
    rollout: Batch,
    policy: Qwen2ForCausalLM,
    reference: Qwen2ForCausalLM,
    prompts: torch.Tensor,
    settings: Settings,
) -> Batch:
    """Return a step's distinct answers with the weight of each: the reference tilted by a weight of the reward.

    A prompt counts once, or with "sample" as often as it has right answers.
    """
    parts = [answers, rollout] if settings.weights == "mixture" else [answers]
    key = torch.cat([torch.cat([b.prompt[:, None], b.tokens * b.mask], 1) for b in parts])
    _, inverse, counts = key.unique(dim=0, return_inverse=True, return_counts=True)
    first = torch.full_like(counts, len(key)).scatter_reduce(0, inverse, torch.arange(len(key)), "amin")
    distinct = Batch(**{name: torch.cat([getattr(b, name) for b in parts])[first] for name in FIELDS})
    if settings.weights == "mixture":
        one = torch.ones(len(first))
        old, ref = ((_log_prob(model, prompts, distinct, one) * distinct.mask).sum(1) for model in (policy, reference))
        counts = counts * mixture_weights(ref, old, n=settings.n, m=settings.m)
    right, lengths = distinct.reward > 0, distinct.mask.sum(1)
    distinct.weight = torch.zeros(len(first), dtype=torch.float64)
    for prompt in range(PROMPTS):
        of = distinct.prompt == prompt
        shares = answer_shares(counts[of], right[of], weight_of_wrong=settings.omega_wrong)
        number = (counts[of] * right[of]).sum() if settings.weights == "sample" else 1
        distinct.weight[of] = number * token_weights(shares, lengths[of], loss_agg_mode="token-mean")
    return distinct.rows(distinct.weight > 0)


def _loss(
    policy: Qwen2ForCausalLM,
    prompts: torch.Tensor,
    chosen: torch.Tensor,
    rollout: Batch,
    target: Batch | None,
    settings: Settings,
) -> torch.Tensor:
    """Return the loss of the mini-batch of the chosen prompts."""
    place = torch.full((PROMPTS,), -1).scatter(0, chosen, torch.arange(len(chosen)))
    batches = [b.rows(place[b.prompt] >= 0) for b in (rollout, target) if b is not None]
    rows = torch.cat([b.prompt for b in batches])
    tokens = torch.cat([b.tokens for b in batches])
    full = _logits(policy, prompts[chosen], place[rows], tokens).log_softmax(-1)
    log_prob = full.gather(2, tokens[..., None])[..., 0]
    own = len(batches[0].prompt)
    loss = torch.zeros(())
    if settings.surrogate != "none":
        loss = loss + rollout_loss(full[:own], log_prob[:own], batches[0], settings)
    if target is not None:
        loss = loss + settings.answers * answers_loss(log_prob[own:], batches[1])
    return loss
