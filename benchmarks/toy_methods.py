"""Every method on the toy world through real veRL, compared by exact pass@k: the table of docs/toy.md.

    python benchmarks/toy_methods.py --out runs/methods --jobs 2      # goes on where it stopped
    python benchmarks/toy_methods.py --out runs/methods --table       # the table alone, from what is there
    python benchmarks/toy_methods.py --out runs/ladder_verl --ladder --jobs 2       # four rungs of docs/ladder.md

A pair is (world and base model, seed of RL). Settings were chosen on pair (0, 0); the others are the test.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from ladder import interval, markdown
from tqdm import tqdm

from rapo_verl.run.files import write_atomic
from rapo_verl.run.folder import read_metrics
from rapo_verl.toy.demo import sample_answers

PAIRS = ((0, 1), (1, 1), (0, 2))
LADDER_PAIRS = tuple((base, 1) for base in range(2, 8))
KL = "actor_rollout_ref.actor.kl_loss_coef={} actor_rollout_ref.actor.kl_loss_type={}"
# name: (experiment, overrides). Beside veRL's usual low_var_kl, each method with what benchmarks/toy_calibration.py
# chose from four tries.
METHODS = {
    "GRPO, low_var_kl 1e-2": ("toy_grpo_cpu", ""),
    "GRPO, low_var_kl 1e-1": ("toy_grpo_cpu", KL.format(0.1, "low_var_kl")),
    "GRPO, low_var_kl 3e-1": ("toy_grpo_cpu", KL.format(0.3, "low_var_kl")),
    "GRPO, reverse KL (k2) 1e-1": ("toy_grpo_cpu", KL.format(0.1, "k2")),
    "GRPO, entropy 3e-3 alone": (
        "toy_grpo_cpu",
        "actor_rollout_ref.actor.kl_loss_coef=0 actor_rollout_ref.actor.entropy_coeff=0.003",
    ),
    "forward KL, phi = 1": ("toy_rapo_cpu", "rapo.reference.phi_min=1"),
    "RAPO": ("toy_rapo_cpu", ""),
    "GRPO, pass@k advantage": ("toy_grpo_cpu", "algorithm.adv_estimator=grpo_passk"),
}
ONE_PAIR = ("GRPO, pass@k advantage",)
# The recipe's coefficient, with m = 32 answers of the base to each training problem; on the ladder's pairs alone.
ANSWERS = {"RAPO, reference answers m = 32": ("toy_rapo_answers_cpu", "")}
LADDER = ("GRPO, low_var_kl 1e-2", "GRPO, low_var_kl 3e-1", "RAPO", *ANSWERS)
KS = (1, 16, 256, 1024, 4096)
HARD_DRAWS = 1024


def folder(out: Path, method: str, pair: tuple[int, int]) -> Path:
    """Return the folder of one run."""
    slug = "".join(c if c.isalnum() or c in "-." else "_" for c in method)
    return out / f"base{pair[0]}_seed{pair[1]}" / slug


def run_one(out: Path, method: str, pair: tuple[int, int], steps: int) -> None:
    """Train one method on one pair and enumerate its success probabilities; nothing where that is done."""
    run_dir = folder(out, method, pair)
    if (run_dir / "exact.json").exists():
        return
    experiment, overrides = (METHODS | ANSWERS)[method]
    base, seed = pair
    toy_dir = Path(f"runs/toy/base{base}")
    if method in ANSWERS:
        sample_answers(toy_dir, 32)
    run_dir.mkdir(parents=True, exist_ok=True)
    seeds = [
        f"data.seed={seed}",
        f"actor_rollout_ref.actor.data_loader_seed={seed}",
        f"actor_rollout_ref.rollout.seed={seed}",
    ]
    command = [
        sys.executable, "-m", "rapo_verl.cli", "train", f"experiment={experiment}", f"run_dir={run_dir}",
        f"toy_dir={toy_dir}", f"trainer.total_training_steps={steps}", f"trainer.save_freq={steps}",
        *seeds, *overrides.split(),
    ]  # fmt: skip
    with (run_dir / "console.log").open("ab") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
    enumerate_one(run_dir / f"checkpoints/global_step_{steps}/actor/huggingface", toy_dir, run_dir / "exact.json")


def enumerate_one(model: Path, toy_dir: Path, out: Path) -> None:
    """Write the exact success probability of every evaluation problem, in a process of its own (one thread)."""
    if out.exists():
        return
    code = (
        "import sys, json, torch; from pathlib import Path; from rapo_verl.run.files import write_atomic; "
        "from rapo_verl.toy.exact import success_probabilities as f; from rapo_verl.toy.make import load_problems; "
        "torch.set_num_threads(1); w, p = load_problems(Path(sys.argv[2])); "
        "write_atomic(Path(sys.argv[3]), json.dumps(f(sys.argv[1], w, p, batch_size=16).tolist()))"
    )
    subprocess.run([sys.executable, "-c", code, str(model), str(toy_dir), str(out)], check=True)


def solved(p: np.ndarray, k: int) -> np.ndarray:
    """Return 1 - (1 - p)^k."""
    return -np.expm1(k * np.log1p(-np.minimum(p, 1 - 1e-12)))


def row(p: np.ndarray, base: np.ndarray) -> list[float]:
    """Return pass@k for KS and Hard pass@1024 (weight: the base fails all of one draw of HARD_DRAWS)."""
    weight = 1 - solved(base, HARD_DRAWS)
    return [float(solved(p, k).mean()) for k in KS] + [float(np.average(solved(p, 1024), weights=weight))]


def table(out: Path, methods: tuple[str, ...], pairs: tuple[tuple[int, int], ...]) -> str:
    """Return the markdown table from what has been run."""
    lines = ["| method | " + " | ".join(f"p@{k}" for k in KS) + " | Hard@1024 | entropy | p@1/p@1024/Hard by pair |"]
    lines.append("|---" * (len(KS) + 4) + "|")
    for method in ("base", *methods):
        rows, by_pair, entropy = [], [], []
        for pair in pairs:
            base = np.array(json.loads((out / f"base{pair[0]}.json").read_text()))
            path = folder(out, method, pair) / "exact.json"
            if method != "base" and not path.exists():
                by_pair.append("-")
                continue
            rows.append(row(base if method == "base" else np.array(json.loads(path.read_text())), base))
            by_pair.append(f"{rows[-1][0]:.2f}/{rows[-1][3]:.2f}/{rows[-1][5]:.2f}")
            if method != "base":
                last = read_metrics(path.parent)[-10:]
                entropy.append(np.mean([step["actor/entropy"] for step in last]))
        if rows:
            shown = " | ".join(f"{value:.3f}" for value in np.mean(rows, axis=0))
            lines.append(
                f"| {method} | {shown} | {np.mean(entropy) if entropy else float('nan'):.2f} | {' '.join(by_pair)} |"
            )
    return "\n".join(lines)


def against(out: Path) -> str:
    """Return the ladder's paired differences and, by pair, what of its target is missed; of pairs that are whole."""
    whole = [pair for pair in LADDER_PAIRS if all((folder(out, m, pair) / "exact.json").exists() for m in LADDER)]
    base = {pair: np.array(json.loads((out / f"base{pair[0]}.json").read_text())) for pair in whole}
    found = {"base": np.array([row(base[pair], base[pair]) for pair in whole])}
    for method in LADDER:
        p = {pair: np.array(json.loads((folder(out, method, pair) / "exact.json").read_text())) for pair in whole}
        found[method] = np.array([row(p[pair], base[pair]) for pair in whole])
    measures = {"p@1": 0, "p@1024": KS.index(1024), "Hard@1024": len(KS)}
    rows, verdicts = [], []
    for method in LADDER[2:]:
        for other in found:
            if other not in LADDER[LADDER.index(method) :]:
                difference = found[method] - found[other]
                rows.append([f"{method} − {other}", *(interval(difference[:, i]) for i in measures.values())])
        best = np.max([found[grpo] for grpo in LADDER[:2]], axis=0)
        ours, i, hard = found[method], measures["p@1024"], measures["Hard@1024"]
        met = {
            "p@1": ours[:, 0] >= 0.95 * best[:, 0],
            "p@1024": (ours[:, i] > found["base"][:, i]) & (ours[:, i] > best[:, i]),
            "Hard": ours[:, hard] >= 2 * best[:, hard],
        }
        missed = [", ".join(name for name, ok in met.items() if not ok[n]) for n in range(len(whole))]
        verdicts.append([method, *(f"not {which}" if which else "all" for which in missed)])
    return "\n\n".join(
        [markdown(["difference", *measures], rows), markdown(["target", *(f"base {b}" for b, _ in whole)], verdicts)]
    )


def main() -> None:
    """Run what is missing, then print the table and write it beside the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: runs/methods, runs/ladder_verl")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--ladder", action="store_true", help="four methods on six pairs of benchmarks/ladder.py")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    out = (args.out or Path("runs/ladder_verl" if args.ladder else "runs/methods")).absolute()
    methods, pairs = (LADDER, LADDER_PAIRS) if args.ladder else (tuple(METHODS), PAIRS)
    if not args.table:
        out.mkdir(parents=True, exist_ok=True)
        for base in sorted({base for base, _ in pairs}):
            toy_dir = Path(f"runs/toy/base{base}")
            subprocess.run(
                [sys.executable, "-m", "rapo_verl.cli", "toy", "make", "--out", str(toy_dir), "--seed", str(base)],
                check=True,
            )
            enumerate_one(toy_dir / "model", toy_dir, out / f"base{base}.json")
        todo = [(m, pair) for pair in pairs for m in methods if m not in ONE_PAIR or pair == PAIRS[0]]
        with ThreadPoolExecutor(args.jobs) as pool:
            runs = [pool.submit(run_one, out, method, pair, args.steps) for method, pair in todo]
            for run in tqdm(runs, desc="runs"):
                run.result()
    text = table(out, methods, pairs) + ("\n\n" + against(out) if args.ladder else "")
    write_atomic(out / "table.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main()
