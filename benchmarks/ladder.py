"""The ladder of methods: each trained on the toy world over (base, RL seed) pairs, compared by exact pass@k.

    python benchmarks/ladder.py --out runs/ladder --jobs 2      # goes on where it stopped
    python benchmarks/ladder.py --out runs/ladder --table       # tables and plot alone, from what is there

`ladder_methods` names the methods, their tries and the pairs; docs/ladder.md says what the tables show.
"""

import argparse
import io
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import transformers
from ladder_losses import Settings
from ladder_methods import CALIBRATION, COMMON, CONTRASTS, GRPO, KS, MEASURES, METHODS, ON_ALL, PAIRS, PROBLEMS
from ladder_train import STEPS, Toy, success, train
from matplotlib.figure import Figure
from tqdm import tqdm

from rapo_verl.method.passk import exact_pass_at_k
from rapo_verl.run.files import write_atomic
from rapo_verl.toy.make import make_toy


def cell_path(out: Path, pair: tuple[int, int], settings: Settings | None) -> Path:
    """Return the file of one cell; of the base itself for no settings."""
    return out / f"base{pair[0]}_seed{pair[1]}" / f"{settings.name() if settings else 'base'}.json"


def run_cell(
    out: Path, toys: Path, pair: tuple[int, int], settings: Settings | None, steps: int, problems: int
) -> None:
    """Train and enumerate one cell (None: the base alone) and write it; nothing where that is done."""
    path = cell_path(out, pair, settings)
    if path.exists():
        return
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    path.parent.mkdir(parents=True, exist_ok=True)
    toy = Toy(toys / f"base{pair[0]}", pair[1])
    start = time.monotonic()
    model, curve = (toy.model(), []) if settings is None else train(toy, settings, pair[1], steps, path.parent)
    record = {"p": success(toy, model, problems), "reward": curve, "seconds": round(time.monotonic() - start, 1)}
    write_atomic(path, json.dumps(record))


def load(out: Path, pair: tuple[int, int], settings: Settings | None) -> np.ndarray | None:
    """Return the success probabilities of a cell, or None where it has not run."""
    path = cell_path(out, pair, settings)
    return np.array(json.loads(path.read_text())["p"]) if path.exists() else None


def values(p: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Return pass@k for KS and Hard@1024: the mean weighted by the chance that the base fails 1024 times."""
    weight = 1 - exact_pass_at_k(base, 1024)
    return np.array([*(exact_pass_at_k(p, k).mean() for k in KS), np.average(exact_pass_at_k(p, 1024), weights=weight)])


def chosen(out: Path, method: str) -> Settings | None:
    """Return the try with the highest pass@1 + pass@1024 on the calibration pair; None until all have run."""
    tries = METHODS[method]
    if len(tries) == 1:
        return tries[0]
    found = [load(out, CALIBRATION, settings) for settings in tries]
    if any(p is None for p in found):
        return None
    return tries[int(np.argmax([sum(exact_pass_at_k(p, k).mean() for k in (1, 1024)) for p in found]))]


def results(out: Path, pairs: tuple[tuple[int, int], ...], *, whole: bool = True) -> dict[str, np.ndarray]:
    """Return the values [pairs, measures] of the base and of every method; nan for a pair that has not run.

    Args:
        out: folder of the cells.
        pairs: the pairs.
        whole: leave out methods that have not run on all of them.
    """
    bases = [load(out, pair, None) for pair in pairs]
    found = {"base": np.stack([values(base, base) for base in bases])}
    for method in METHODS:
        settings = chosen(out, method)
        cells = [None if settings is None else load(out, pair, settings) for pair in pairs]
        nothing = np.full(len(MEASURES), np.nan)
        rows = np.stack([nothing if p is None else values(p, base) for p, base in zip(cells, bases)])
        if not np.isnan(rows).any() if whole else not np.isnan(rows).all():
            found[method] = rows
    return found


def interval(differences: np.ndarray) -> str:
    """Return the mean over pairs and its 95 % bootstrap interval, [pairs]."""
    rng = np.random.default_rng(0)
    means = differences[rng.integers(len(differences), size=(20000, len(differences)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{differences.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Return a table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def tries_table(out: Path) -> str:
    """Return every try on the calibration pair; an x marks what was chosen."""
    base = load(out, CALIBRATION, None)
    rows = []
    for method, tries in METHODS.items():
        best = chosen(out, method)
        found = [load(out, CALIBRATION, settings) for settings in tries]
        if len(tries) == 1 or all(p is None for p in found):
            continue
        for settings, p in zip(tries, found):
            shown = ["-"] * len(MEASURES) if p is None else [f"{v:.3f}" for v in values(p, base)]
            rows.append([method, f"`{settings.name()}`", *shown, "x" if settings == best else ""])
    return markdown(["method", "setting", *MEASURES, "chosen"], rows)


def ranked(found: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """Return the methods and their values, the highest mean pass@1024 first."""
    return sorted(found.items(), key=lambda item: -item[1][:, 3].mean())


def means_table(found: dict[str, np.ndarray], out: Path) -> str:
    """Return each method's means over the pairs, by p@1024, and its differences from GRPO with veRL's usual leash."""
    rows = []
    for method, of in ranked(found):
        settings = None if method == "base" else chosen(out, method)
        against = (
            ["", ""] if method == GRPO or GRPO not in found else [interval((of - found[GRPO])[:, i]) for i in (0, 3)]
        )
        name = f"`{settings.name()}`" if settings else ""
        rows.append([method, name, *(f"{v:.3f}" for v in of.mean(0)), *against])
    return markdown(["method", "setting", *MEASURES, "p@1 − GRPO 1e-2", "p@1024 − GRPO 1e-2"], rows)


def best_grpo(found: dict[str, np.ndarray]) -> np.ndarray:
    """Return the best GRPO's values [pairs, measures], each measure's best for itself; nan where none has run."""
    return np.fmax.reduce([of for method, of in found.items() if method.startswith("GRPO")])


def summary_table(found: dict[str, np.ndarray], best: np.ndarray) -> str:
    """Return each method's means, and on how many pairs its p@1024 is above the base's and above every GRPO's."""
    rows = []
    for method, of in ranked(found):
        above = [
            f"{(of[:, 3] > bound).sum()} of {len(of)}" if method not in skipped else ""
            for bound, skipped in ((found["base"][:, 3], {"base"}), (best[:, 3], {m for m in found if "GRPO" in m}))
        ]
        rows.append([method, *(f"{of[:, i].mean():.3f}" for i in (0, 3, 4)), *above])
    return markdown(["method", "p@1", "p@1024", "Hard@1024", "p@1024 above the base's", "above every GRPO's"], rows)


def contrasts_table(found: dict[str, np.ndarray]) -> str:
    """Return the paired differences of CONTRASTS."""
    rows = []
    for a, b in CONTRASTS:
        if a in found and b in found:
            of = found[a] - found[b]
            rows.append([f"{a} − {b}", *(interval(of[:, i]) for i in (0, 3, 4))])
    return markdown(["difference", "p@1", "p@1024", "Hard@1024"], rows)


def target_table(found: dict[str, np.ndarray]) -> str:
    """Return, pair by pair, whether each method with reference answers meets the target of this ladder.

    pass@1 at least 0.95 times the best GRPO's, pass@1024 above the base's and every GRPO's, Hard@1024 at least twice
    GRPO's (the best of them).
    """
    if GRPO not in found:
        return ""
    best, rows = best_grpo(found), []
    for method, of in found.items():
        if "answers" not in method:
            continue
        tests = {
            "p@1": of[:, 0] >= 0.95 * best[:, 0],
            "p@1024": (of[:, 3] > found["base"][:, 3]) & (of[:, 3] > best[:, 3]),
            "Hard": of[:, 4] >= 2 * best[:, 4],
        }
        shown = [
            "all" if all(t[i] for t in tests.values()) else "not " + ", ".join(k for k, t in tests.items() if not t[i])
            for i in range(len(of))
        ]
        rows.append([method, *("-" if np.isnan(v[0]) else cell for cell, v in zip(shown, of))])
    return markdown(["method", *(f"base {b}" for b, _ in PAIRS[: len(found["base"])])], rows)


def by_pair_table(found: dict[str, np.ndarray]) -> str:
    """Return pass@1 / pass@1024 / Hard@1024 of every pair."""
    rows = [
        [method, *("-" if np.isnan(v[0]) else " / ".join(f"{v[i]:.2f}"[1:] for i in (0, 3, 4)) for v in of)]
        for method, of in found.items()
    ]
    return markdown(["p@1 / p@1024 / Hard", *(f"base {b}" for b, _ in PAIRS[: len(found["base"])])], rows)


def plot(found: dict[str, np.ndarray]) -> bytes:
    """Return a PNG of pass@1 against pass@1024: a large point a method, those of its pairs near them small."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    for number, (method, of) in enumerate(ranked(found)):
        style = {"color": f"C{number % 10}", "marker": "osD^vP"[number // 10 % 6]}
        axes.scatter(of[:, 0], of[:, 3], s=9, alpha=0.35, linewidths=0, **style)
        axes.scatter(*of[:, [0, 3]].mean(0), s=70, label=method, edgecolors="white", zorder=3, **style)
    axes.axhline(found["base"][:, 3].mean(), color="0.6", linewidth=0.8, linestyle="--")
    means = np.array([of[:, [0, 3]].mean(0) for of in found.values()])
    (left, bottom), (right, top) = means.min(0) - 0.05, means.max(0) + 0.1
    axes.set(xlabel="exact pass@1", ylabel="exact pass@1024", xlim=(left, right), ylim=(bottom, top))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def main() -> None:
    """Run what is missing, then write the tables and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ladder"))
    parser.add_argument(
        "--toys", type=Path, default=Path("runs/toy"), help="made where they are missing, 3 minutes each"
    )
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="the first so many")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--problems", type=int, default=PROBLEMS, help="of the evaluation, the first so many")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    if not args.table:
        run(args)
    report(args.out)


def report(out: Path) -> None:
    """Print the tables of what there is, and write them and the plot beside the cells."""
    pairs = tuple(
        pair for pair in PAIRS if load(out, pair, None) is not None and load(out, pair, METHODS[GRPO][0]) is not None
    )
    common, every, partial = results(out, pairs[:COMMON]), results(out, pairs), results(out, pairs, whole=False)
    parts = {
        "Summary": summary_table(common, best_grpo(partial)[:COMMON]),
        f"Means over {len(pairs[:COMMON])} pairs": means_table(common, out),
        f"Means over {len(pairs)} pairs": means_table(every, out),
        f"Paired differences over {len(pairs[:COMMON])} pairs": contrasts_table(common),
        f"Paired differences over {len(pairs)} pairs": contrasts_table(every),
        "The target, pair by pair": target_table(partial),
        "Pair by pair": by_pair_table(partial),
        f"The tries, base {CALIBRATION[0]}, seed {CALIBRATION[1]}": tries_table(out),
    }
    text = "\n\n".join(f"## {title}\n\n{table}" for title, table in parts.items() if table.count("\n") > 1)
    write_atomic(out / "table.md", text + "\n")
    write_atomic(out / "ladder.png", plot(common))
    print(text)


def run(args: argparse.Namespace) -> None:
    """Run what is missing: the bases, every method's tries, then pair by pair each method's chosen setting."""
    torch.set_num_threads(1)
    pairs = PAIRS[: args.pairs]
    for base, _ in (CALIBRATION, *pairs):
        if not (args.toys / f"base{base}" / "model").exists():
            make_toy(args.toys / f"base{base}", seed=base)

    def run_all(cells: list[tuple[tuple[int, int], Settings | None]]) -> None:
        todo = [cell for cell in cells if not cell_path(args.out, *cell).exists()]
        if args.jobs == 1:
            for cell in tqdm(todo, desc="cells"):
                run_cell(args.out, args.toys, *cell, args.steps, args.problems)
            return
        # Processes of one thread each.
        with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(run_cell, args.out, args.toys, *cell, args.steps, args.problems) for cell in todo]
            for job in tqdm(jobs, desc="cells"):
                job.result()

    run_all([(pair, None) for pair in (CALIBRATION, *pairs)])
    tried = [method for method in args.methods if len(METHODS[method]) > 1]
    run_all([(CALIBRATION, settings) for method in tried for settings in METHODS[method]])
    run_all(
        [
            (pair, chosen(args.out, method))
            for i, pair in enumerate(pairs)
            for method in args.methods
            if i < COMMON or method in ON_ALL
        ]
    )


if __name__ == "__main__":
    main()
