"""How often the alarms of `rapo watch` are right: toy runs in plain PyTorch, some of which lose what the base could.

    taskset -c 0 nice python benchmarks/alarms.py --toys runs/toy --out runs/alarms      # records what is missing
    python benchmarks/alarms.py --out runs/alarms --table                                 # from what is there

Each run is 40 steps of `ladder_train.train`; what the trainer would log is recorded under its names, and exact pass@16
of 48 problems before every fourth step. The rules were made looking at base 0 alone; the table is of the others.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from ladder_losses import GROUP, Batch, Settings
from ladder_train import PROMPTS, STEPS, Toy, _log_prob, _logits, success, train
from tqdm import tqdm

from rapo_verl.method.passk import clopper_pearson, exact_pass_at_k, pass_at_k_curve
from rapo_verl.run.alarms import NAMES, Listener
from rapo_verl.run.files import write_atomic

SEED, EVERY, PROBLEMS, K = 2, 4, 48, 16
MADE_ON, TRIED_ON = (0,), tuple(range(2, 14))
# Written before any of them ran. What a run is, healthy or collapsed, its exact pass@16 says and not its name.
SETTINGS = {
    "RAPO": Settings(alpha=0.3, phi_min=0.8),
    "entropy bonus 0.1": Settings(entropy=0.1),
    "reverse KL 0.3": Settings(kl="low_var_kl", kl_coef=0.3),
    "no KL, twice the learning rate": Settings(lr=1e-3),
    "entropy bonus 0.06": Settings(entropy=0.06),
    "no KL": Settings(),
    "forward KL": Settings(alpha=0.3),
    "entropy bonus 0.03": Settings(entropy=0.03),
}


def record(toy: Toy, settings: Settings, steps: int) -> list[dict]:
    """Return what a run logs, key "step" and veRL's and our names, "exact" pass@16 before the step's update."""
    history: list[dict] = []
    base = toy.model()

    @torch.no_grad()
    def observe(step: int, policy: torch.nn.Module, rollout: Batch) -> None:
        prompts, mask = toy.prompts[step * PROMPTS : (step + 1) * PROMPTS], rollout.mask
        log_prob = _logits(policy, prompts, rollout.prompt, rollout.tokens).log_softmax(-1)
        entropy = -(log_prob.exp() * log_prob).sum(-1)[mask].mean()
        line = {
            "step": step + 1,
            "critic/rewards/mean": rollout.reward.mean().item(),
            "actor/entropy": entropy.item(),
            "response_length/mean": mask.sum(1).float().mean().item(),
            "rapo/truncated": mask.all(1).float().mean().item(),
            "right": rollout.reward.view(PROMPTS, -1).sum(1).int().tolist(),
        }
        if settings.alpha:
            one = torch.ones(len(rollout.tokens))
            ratio = (_log_prob(base, prompts, rollout, one) - rollout.log_prob).exp()
            line["rapo/reference_mass_sampled"] = ratio[mask].mean().item()
        if step % EVERY == 0:
            line["exact"] = float(exact_pass_at_k(np.array(success(toy, policy, PROBLEMS)), K).mean())
        history.append(line)

    policy, _ = train(toy, settings, SEED, steps, Path(), observe)
    last = float(exact_pass_at_k(np.array(success(toy, policy, PROBLEMS)), K).mean())
    return [*history, {"step": steps + 1, "exact": last}]


def first_sounds(history: list[dict], *, validation: bool) -> dict[str, int]:
    """Return the step at which each alarm of a recorded run begins, "any" the first of them.

    Args:
        history: as from `record`.
        validation: whether the rules are told of the exact pass@16, as if it were validation.
    """
    listener, found = Listener([]), {}
    for line in history[:-1]:
        right = np.array(line["right"])
        told = {f"rapo/groups/pass@{k}": p for k, p in zip((1, GROUP), pass_at_k_curve(right, GROUP, (1, GROUP)))}
        if validation and "exact" in line:
            told[f"val/pass@k/toy/{K}"] = line["exact"]
        for alarm in listener.hear(line["step"], {**line, **told})[0]:
            found.setdefault(alarm.name, line["step"])
    return found | ({"any": min(found.values())} if found else {})


def kind(exact: np.ndarray) -> str:
    """Return what became of a run by its exact pass@16: a fifth of the base's lost, or a twentieth at most."""
    return "collapsed" if exact[-1] < 0.8 * exact[0] else "healthy" if exact[-1] >= 0.95 * exact[0] else "between"


def share(number: int, of: int) -> str:
    """Return a share with its 95 % interval."""
    if not of:
        return "-"
    low, high = clopper_pearson([number], of)
    return f"{number} of {of} ({low[0]:.0%} to {high[0]:.0%})"


def table(out: Path) -> str:
    """Return the rates of every rule, and how long before or after the loss the first of them spoke."""
    runs: dict[str, list[tuple[dict, dict, list]]] = {"collapsed": [], "between": [], "healthy": []}
    for base in TRIED_ON:
        for path in sorted(out.glob(f"*, base {base}.json")):
            history = json.loads(path.read_text())
            exact = [(line["step"], line["exact"]) for line in history if "exact" in line]
            sounds = [first_sounds(history, validation=v) for v in (False, True)]
            runs[kind(np.array([value for _, value in exact]))].append((*sounds, exact))
    lines = ["| alarm | collapsed | between | healthy |", "|---" * 4 + "|"]
    for name in (*NAMES, "any"):
        cells = [share(sum(name in run[name == "breadth"] for run in of), len(of)) for of in runs.values()]
        lines.append(f"| {f'`{name}`' if name != 'any' else 'any but `breadth`'} | {' | '.join(cells)} |")
    for level, words in ((1.0, "the base's"), (0.5, "half of the base's")):
        leads = []
        for sounds, _, exact in runs["collapsed"]:
            under = EVERY + max(step for step, value in exact if value >= level * exact[0][1])
            leads.append(under - sounds["any"] if "any" in sounds else -np.inf)
        early = [sum(lead >= least for lead in leads) for least in (5, 0)]
        lines.append(
            f"\nBefore exact pass@16 was under {words} for good: five steps or more in {share(early[0], len(leads))} "
            f"collapsed runs, at all in {share(early[1], len(leads))}; median {np.median(leads):+.0f} steps."
        )
    return "\n".join(lines)


def main() -> None:
    """Record what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toys", type=Path, default=Path("runs/toy"), help="has base0, base1, ... of `rapo make-toy`")
    parser.add_argument("--out", type=Path, default=Path("runs/alarms"))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table(args.out))
        return
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    # The first four of every base before the others.
    halves = [list(SETTINGS)[i : i + 4] for i in (0, 4)]
    cells = [(b, name) for bases in (MADE_ON, TRIED_ON) for half in halves for b in bases for name in half]
    for base, name in tqdm([c for c in cells if not (args.out / f"{c[1]}, base {c[0]}.json").exists()]):
        history = record(Toy(args.toys / f"base{base}", SEED), SETTINGS[name], STEPS)
        write_atomic(args.out / f"{name}, base {base}.json", json.dumps(history))


if __name__ == "__main__":
    main()
