"""Commands that train."""

from pathlib import Path
from typing import Annotated

import typer

from rapo_verl import Refused
from rapo_verl.cli.base import commands, composed, out_folder

app = commands("Train.")
toy = commands("The toy world: docs/toy.md.")


@app.command()
def train(
    overrides: Annotated[list[str] | None, typer.Argument(help="experiment=NAME and any key=value")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="show the log of every process")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, show the plan, start nothing")] = False,
) -> None:
    """Train; started again with the same config, a run goes on from its last checkpoint.

    Example: rapo train experiment=toy_rapo_cpu actor_rollout_ref.actor.optim.lr=1e-4
    """
    from rapo_verl.run.launch import run
    from rapo_verl.run.preflight import problems_of, too_few_cpus, without_flash_attention
    from rapo_verl.run.reference_answers import answers_of_run

    config = composed(overrides or [])
    problems = problems_of(config)
    if not dry_run and not problems:
        problems = too_few_cpus(config) + without_flash_attention(config)
    if problems:
        raise Refused(problems)
    answers = answers_of_run(config)
    if answers is not None:
        print(answers.describe(), flush=True)
    elif config.rapo.forward_kl.samples:
        print("rapo.forward_kl.samples is not used: rapo.forward_kl.samples_coef is 0", flush=True)
    if dry_run:
        from rapo_verl.run.dry_run import show_dry_run

        show_dry_run(config)
        return
    raise typer.Exit(run(config, verbose=verbose))


@app.command()
def demo(
    out: Annotated[Path, out_folder("folder of the demo")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="of the toy's world and base model")] = 0,
    n: Annotated[int, typer.Option(help="responses per problem")] = 512,
    problems: Annotated[int, typer.Option(help="held-out problems, a multiple of 12")] = 96,
    answers: Annotated[int, typer.Option(min=0, help="reference answers a training problem; 0: none")] = 32,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value for all trainings")] = None,
) -> None:
    """Train by GRPO, RAPO and RAPO with reference answers on the toy world; pass@k of each and of the base, on the CPU.

    Example: rapo demo --out runs/demo
    """
    from rapo_verl.toy.demo import demo as run_demo

    run_demo(out, seed=seed, n=n, limit=problems, answers=answers, overrides=overrides)


@app.command()
def smoke(
    out: Annotated[Path, out_folder("a folder of its own is made in it")] = Path("runs/smoke"),
    overrides: Annotated[list[str] | None, typer.Argument(help="after --: key=value for the training")] = None,
) -> None:
    """Try this machine: three steps with random weights, a save, a resume, sixteen samples; downloads nothing.

    On a GPU the one-GPU recipe with a model of 0.5B parameters, else the toy's. Exit code 1: it does not train.

    Example: rapo smoke -- actor_rollout_ref.rollout.gpu_memory_utilization=0.3
    """
    from rapo_verl.toy.smoke import smoke as run_smoke

    run_smoke(out, overrides or [])


@toy.command("make")
def toy_make(
    out: Annotated[Path, out_folder("folder; `toy_dir` of the experiments")] = Path("runs/toy/base0"),
    seed: Annotated[int, typer.Option(help="of the world and of the base model")] = 0,
) -> None:
    """Make the toy's problems (veRL parquet) and pre-train its base model.

    Example: rapo toy make --out runs/toy/base1 --seed 1
    """
    from rapo_verl.toy.make import make_toy

    make_toy(out, seed=seed)
    print(f"toy: {out}")


@toy.command("real-lm")
def toy_real_lm(
    out: Annotated[Path, out_folder("folder; `real_dir` of the experiments")] = Path("runs/real-lm"),
    model: Annotated[str | None, typer.Option(help="checkpoint folder or hub id; default: the package's")] = None,
    seed: Annotated[int, typer.Option(help="of the problems")] = 0,
) -> None:
    """Make arithmetic problems for a real language model, and the model of an installed package: docs/real-lm.md.

    Example: rapo toy real-lm --out runs/real-lm
    """
    from rapo_verl.toy.real_lm import make_real_lm

    make_real_lm(out, model=model, seed=seed)
    print(f"real language model: {out}")
