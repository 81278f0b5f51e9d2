"""How the settings of docs/toy.md were chosen: the toy world in plain PyTorch, half a minute a run instead of six.

    python benchmarks/toy_calibration.py --toy-dir runs/toy/base0 --out runs/calibration.jsonl     # resumable
    python benchmarks/toy_calibration.py --estimators --out runs/estimators.jsonl                  # resumable

Same model, problems, batch and learning rate as recipe/experiment/toy_cpu.yaml, our loss terms and veRL's, no veRL
trainer. Every method gets the same number of tries (TRIES), all on one pair (base 0, RL seed 0); the highest sum of
exact pass@1 and pass@1024 wins. `benchmarks/toy_methods.py` then runs the winners through veRL on other pairs.
With --estimators: every estimator and reading of the forward KL at RAPO's default settings, over RL seeds.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen2ForCausalLM
from verl.trainer.ppo.core_algos import kl_penalty

from rapo_verl.method.config import ESTIMATORS, PER_TOKEN_ESTIMATORS, ReferenceConfig
from rapo_verl.method.forward_kl import forward_kl_estimate
from rapo_verl.method.head import Target, head
from rapo_verl.method.passk import exact_pass_at_k
from rapo_verl.method.reference_tokens import phi_nodes, reference_tokens
from rapo_verl.method.reweighting import reward_to_phi, reweight_tokens
from rapo_verl.reward import verify_integer
from rapo_verl.toy.base_model import encode_prompts
from rapo_verl.toy.exact import success_probabilities
from rapo_verl.toy.make import load_problems

# As in recipe/experiment/toy_cpu.yaml.
STEPS, PROMPTS, GROUP, MINI_BATCHES, LR, WARM_UP, CLIP, MAX_TOKENS = 40, 32, 8, 2, 5e-4, 5, 0.2, 24
KS = (1, 16, 256, 1024)
# method: the settings tried, (term, its coefficient, phi_min, beta).
TRIES = {
    "GRPO, low_var_kl": [("low_var_kl", c, 1.0, 0.0) for c in (1e-2, 3e-2, 1e-1, 3e-1)],
    "GRPO, reverse KL (k2)": [("k2", c, 1.0, 0.0) for c in (1e-2, 3e-2, 1e-1, 3e-1)],
    "GRPO, entropy alone": [("none", 0.0, 1.0, beta) for beta in (3e-3, 1e-2, 3e-2, 1e-1)],
    "forward KL, phi = 1": [(kind, c, 1.0, 0.0) for kind in ("bounded", "unbiased") for c in (0.1, 0.3)],
    "RAPO": [
        *[("bounded", c, phi, 0.0) for c, phi in ((0.3, 0.8), (0.3, 0.6), (0.1, 0.8))],
        ("unbiased", 0.3, 0.8, 0.0),
    ],
}
# Every estimator with the default reading; the other readings with one estimator of either form.
ESTIMATOR_RUNS = [
    *[(estimator, "token") for estimator in ESTIMATORS],
    *[(estimator, reading) for reading in ("nucleus", "unnormalized") for estimator in ("bounded", "topk")],
]
ESTIMATOR_SEEDS = (0, 1, 2)
# 64 of the 264 tokens, the default, would hold all of the mass but 1e-4: no different from `full`.
TOP_K = 16


@torch.no_grad()
def sample(model: Qwen2ForCausalLM, prompts: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return GROUP responses to each prompt and the log-probs of their tokens, both (prompts * GROUP, length)."""
    head = model(prompts, use_cache=True, logits_to_keep=1)
    cache = head.past_key_values
    cache.batch_repeat_interleave(GROUP)
    logits = head.logits[:, -1].repeat_interleave(GROUP, 0)
    tokens, log_probs = [], []
    done = torch.zeros(len(logits), dtype=torch.bool)
    for _ in range(MAX_TOKENS):
        log_prob = logits.log_softmax(-1)
        token = torch.multinomial(log_prob.exp(), 1)
        tokens.append(token)
        log_probs.append(log_prob.gather(1, token))
        done |= token[:, 0] == end
        if done.all():
            break
        logits = model(token, past_key_values=cache, use_cache=True).logits[:, -1]
    return torch.cat(tokens, 1), torch.cat(log_probs, 1)


def reweighted(
    kind: str, reading: str, logits: torch.Tensor, tokens: torch.Tensor, phi: torch.Tensor, phi_min: float
) -> tuple[torch.Tensor, Target | None]:
    """Return log pi_hat of the sampled tokens, (responses, length), and what `reweight_tokens` makes of all others."""
    if reading == "token" and kind not in PER_TOKEN_ESTIMATORS:
        return (phi[:, None, None] * logits).log_softmax(-1).gather(2, tokens[..., None])[..., 0], None
    labels, nodes = tokens.flatten(), phi_nodes(phi_min)
    k = logits.shape[-1] if kind == "full" else TOP_K
    found = reference_tokens(logits.flatten(0, 1), labels, k=k, nodes=nodes)
    per_token = phi.repeat_interleave(tokens.shape[1])
    sampled, target = reweight_tokens(found, labels, per_token, reading=reading, top_p=0.95, nodes=nodes)
    return sampled.view_as(tokens), Target(*(x.unflatten(0, tokens.shape) for x in target))


def regulariser(
    kind: str, log_prob: torch.Tensor, old: torch.Tensor, ref: torch.Tensor | None, mask: torch.Tensor
) -> torch.Tensor:
    """Return the loss term per sampled token: ours, or veRL's KL of that name."""
    if kind == "none" or ref is None:
        return torch.zeros_like(log_prob)
    if kind in ("low_var_kl", "k2"):
        return kl_penalty(log_prob, ref, kind)
    return forward_kl_estimate(log_prob, old, ref, mask, estimator=kind, rho_max=6.0).loss


def train(
    toy_dir: Path, seed: int, kind: str, coef: float, phi_min: float, beta: float, reading: str = "token"
) -> list[float]:
    """Train one setting and return the exact success probability of each evaluation problem."""
    world, evaluation = load_problems(toy_dir)
    tokenizer = AutoTokenizer.from_pretrained(toy_dir / "model")
    policy, reference = (Qwen2ForCausalLM.from_pretrained(toy_dir / "model", dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), LR, weight_decay=0.0)
    frame = pd.read_parquet(toy_dir / "train.parquet").sample(frac=1, random_state=seed)
    torch.manual_seed(seed)
    for step in range(STEPS):
        rows = frame.iloc[step * PROMPTS : (step + 1) * PROMPTS]
        golds = [row["ground_truth"] for row in rows["reward_model"] for _ in range(GROUP)]
        prompts = encode_prompts(tokenizer, [messages[0]["content"] for messages in rows["prompt"]])
        tokens, old = sample(policy, prompts, tokenizer.eos_token_id)
        ended = (tokens == tokenizer.eos_token_id).int()
        mask = (ended.cumsum(1) - ended) == 0
        texts = tokenizer.batch_decode([row[keep] for row, keep in zip(tokens, mask)], skip_special_tokens=True)
        reward = torch.tensor([float(verify_integer(t, gold)[0] == "correct") for t, gold in zip(texts, golds)])
        group = reward.view(-1, GROUP)
        advantages = ((group - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-6)).view(-1, 1)
        inputs = torch.cat([prompts.repeat_interleave(GROUP, 0), tokens[:, :-1]], 1)

        def logits_of(model: Qwen2ForCausalLM, rows: torch.Tensor) -> torch.Tensor:
            return model(inputs[rows], logits_to_keep=tokens.shape[1], use_cache=False).logits  # noqa: B023

        ref, target = None, None
        if kind != "none":
            phi = reward_to_phi(reward, ReferenceConfig(phi_min=phi_min))
            with torch.no_grad():
                logits = logits_of(reference, torch.arange(len(tokens)))
            ref, target = reweighted(kind, reading, logits, tokens, phi, phi_min)
        for group_of in optimizer.param_groups:
            group_of["lr"] = LR * min(1.0, (step + 1) / WARM_UP)
        for rows_ in torch.randperm(len(tokens)).view(MINI_BATCHES, -1):
            full, keep = logits_of(policy, rows_).log_softmax(-1), mask[rows_]
            log_prob = full.gather(2, tokens[rows_][..., None])[..., 0]
            ratio, advantage = (log_prob - old[rows_]).exp(), advantages[rows_]
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
            if kind in PER_TOKEN_ESTIMATORS:
                of_rows = Target(*(x[rows_].flatten(0, 1) for x in target))
                term = head(full.flatten(0, 1), tokens[rows_].flatten(), target=of_rows).forward_kl.view_as(keep)
            else:
                term = regulariser(kind, log_prob, old[rows_], None if ref is None else ref[rows_], keep)
            entropy = -(full.exp() * full).sum(-1)
            loss = (-surrogate + coef * term - beta * entropy)[keep].mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return success_probabilities(folder, world, evaluation, batch_size=16).tolist()


def shown(p: np.ndarray) -> list[float]:
    """Return exact pass@k for KS."""
    return [float(exact_pass_at_k(p, k).mean()) for k in KS]


def table(results: dict[str, list[float]], base: np.ndarray) -> str:
    """Return the markdown table; the winner of each method is marked."""
    lines = ["| method | setting | " + " | ".join(f"p@{k}" for k in KS) + " | chosen |", "|---" * (len(KS) + 3) + "|"]

    def line(method: str, setting: str, values: list[float], mark: str) -> str:
        return f"| {method} | {setting} | " + " | ".join(f"{v:.3f}" for v in values) + f" | {mark} |"

    lines.append(line("base", "", shown(base), ""))
    for method, tries in TRIES.items():
        rows = {t: shown(np.array(results[json.dumps(t)])) for t in tries if json.dumps(t) in results}
        best = max(rows, key=lambda t: rows[t][0] + rows[t][-1], default=None)
        for (kind, coef, phi_min, beta), values in rows.items():
            setting = f"{kind} {coef:g}" + (f", phi_min {phi_min:g}" if phi_min < 1 else "")
            setting = f"beta {beta:g}" if kind == "none" else setting
            lines.append(line(method, setting, values, "x" if (kind, coef, phi_min, beta) == best else ""))
    return "\n".join(lines)


def estimator_table(results: dict[int, dict[str, list[float]]], base: np.ndarray) -> str:
    """Return the markdown table of the runs there are: mean ± standard deviation over the seeds."""
    lines = ["| estimator | reading | seeds | " + " | ".join(f"p@{k}" for k in KS) + " |", "|---" * (len(KS) + 3) + "|"]
    lines.append("| base | | | " + " | ".join(f"{v:.3f}" for v in shown(base)) + " |")
    for setting, (estimator, reading) in zip(estimator_settings(), ESTIMATOR_RUNS):
        rows = [shown(np.array(found[setting])) for found in results.values() if setting in found]
        if rows:
            mean, spread = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) if len(rows) > 1 else [np.nan] * len(KS)
            values = " | ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, spread))
            lines.append(f"| `{estimator}` | {reading} | {len(rows)} | {values} |")
    return "\n".join(lines)


def estimator_settings() -> list[str]:
    """Return the settings of ESTIMATOR_RUNS: RAPO's defaults but for the estimator and the reading."""
    return [json.dumps([estimator, 0.3, 0.8, 0.0, reading]) for estimator, reading in ESTIMATOR_RUNS]


def run_missing(out: Path, toy_dir: Path, seed: int, settings: list[str]) -> dict[str, list[float]]:
    """Train those of the settings that the file has not, adding each to it; return all of that base and seed."""
    results: dict[str, list[float]] = {}
    if out.exists():
        for text in out.read_text().splitlines():
            record = json.loads(text)
            if (record["toy_dir"], record["seed"]) == (str(toy_dir), seed):
                results[record["setting"]] = record["p"]
    for setting in tqdm([s for s in settings if s not in results], desc=f"settings of seed {seed}"):
        results[setting] = train(toy_dir, seed, *json.loads(setting))
        record = {"toy_dir": str(toy_dir), "seed": seed, "setting": setting, "p": results[setting]}
        with out.open("a") as file:
            file.write(json.dumps(record) + "\n")
    return results


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy-dir", type=Path, default=Path("runs/toy/base0"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--estimators", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/calibration.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    world, problems = load_problems(args.toy_dir)
    base = success_probabilities(args.toy_dir / "model", world, problems, batch_size=16)
    if args.estimators:
        found = {seed: run_missing(args.out, args.toy_dir, seed, estimator_settings()) for seed in ESTIMATOR_SEEDS}
        print(estimator_table(found, base))
    else:
        tries = [json.dumps(t) for of_method in TRIES.values() for t in of_method]
        print(table(run_missing(args.out, args.toy_dir, args.seed, tries), base))


if __name__ == "__main__":
    main()
