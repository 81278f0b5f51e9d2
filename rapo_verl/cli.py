"""The command ``rapo``."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from rapo_verl.evaluation.cli import app as evaluation

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
toy = typer.Typer(no_args_is_help=True, help="The toy world: docs/toy.md.")
app.add_typer(toy, name="toy")
data = typer.Typer(no_args_is_help=True, help="Problem sets as veRL parquet: docs/data-and-verifier.md.")
app.add_typer(data, name="data")
app.add_typer(evaluation, name="eval")

# Exit code for a config, input or environment that a run would fail on; nothing was started.
REFUSED = 2
INTERRUPTED = 130


def _refuse(problems: list[str]) -> NoReturn:
    print(f"rapo: {len(problems)} problem(s); nothing was started:", file=sys.stderr)
    for problem in problems:
        print(f"- {problem}", file=sys.stderr)
    raise typer.Exit(REFUSED)


def _compose(overrides: list[str]) -> Any:
    """Return the resolved config of the overrides, or refuse."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from rapo_verl.compose import compose_config, experiments

    if not any(override.startswith("experiment=") for override in overrides):
        _refuse([f"no experiment given; allowed: {', '.join(f'experiment={name}' for name in experiments())}"])
    try:
        return compose_config(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        _refuse([str(error)])


@app.command(context_settings={"ignore_unknown_options": True})
def train(
    overrides: Annotated[list[str] | None, typer.Argument(help="experiment=NAME and any key=value")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="show the log of every process")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, show the plan, start nothing")] = False,
) -> None:
    """Train: `rapo train experiment=toy_rapo_cpu actor_rollout_ref.actor.optim.lr=1e-4`.

    Started again with the same config, a run goes on from its last checkpoint.
    """
    from rapo_verl.checkpoints import CheckpointError
    from rapo_verl.launch import RunFolderError, run
    from rapo_verl.preflight import problems_of

    config = _compose(overrides or [])
    problems = problems_of(config)
    if problems:
        _refuse(problems)
    if dry_run:
        from rapo_verl.plan.dry_run import show_dry_run

        raise typer.Exit(0 if show_dry_run(config) else 1)
    try:
        raise typer.Exit(run(config, verbose=verbose))
    except (RunFolderError, CheckpointError) as error:
        _refuse([str(error)])


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="name of an experiment")],
    overrides: Annotated[list[str] | None, typer.Argument(help="any key=value, as for `rapo train`")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="how many; default: the recipe's")] = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, a100-40, l40s or rtx4090")] = "h100",
    response: Annotated[int, typer.Option(min=1, help="mean tokens of a response, for the times")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say what a run needs of its GPUs, whether it fits and what would: docs/scaling.md. Exit code 1: it does not."""
    from rapo_verl.plan.report import show_plan

    config = _compose([f"experiment={recipe}", *(overrides or [])])
    try:
        fits = show_plan(config, gpu=gpu, gpus=gpus, response=response, as_json=as_json)
    except ValueError as error:
        _refuse([str(error)])
    raise typer.Exit(0 if fits else 1)


@app.command()
def doctor(
    cluster: Annotated[bool, typer.Option("--cluster", help="what a node of a Slurm job needs, in a second")] = False,
) -> None:
    """Say what is installed, which platform this is, what is wrong and how to mend it; exit code 1 if anything is."""
    from rapo_verl.cluster.checks import check_node
    from rapo_verl.doctor import examine, print_findings

    findings = check_node() if cluster else examine()
    print_findings(findings)
    if any(not finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def checkpoints(
    run: Annotated[Path, typer.Argument(help="run folder")],
    verify: Annotated[bool, typer.Option("--verify", help="read every byte")] = False,
    export: Annotated[int | None, typer.Option(help="step to write as a Hugging Face model")] = None,
    to: Annotated[Path | None, typer.Option(help="folder for --export")] = None,
) -> None:
    """List a run's checkpoints; exit code 1 if one is damaged or incomplete."""
    from rapo_verl.checkpoints import CheckpointError
    from rapo_verl.run_folder import export_checkpoint, show_checkpoints

    try:
        if export is None:
            raise typer.Exit(0 if show_checkpoints(run, verify=verify) else 1)
        print(export_checkpoint(run, export, to or run / "export" / f"step_{export}"))
    except CheckpointError as error:
        _refuse([str(error)])


@app.command("inspect-batch")
def inspect_batch(
    file: Annotated[Path, typer.Argument(help="bad_batches/step_N.pt of a run that stopped on NaN")],
    rows: Annotated[int, typer.Option(help="responses to show")] = 5,
) -> None:
    """Say what in a batch is NaN or infinite, and show the responses it stands in."""
    from rapo_verl.run_folder import inspect

    print("\n".join(inspect(file, rows)))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder of the demo")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="of the toy's world and base model")] = 0,
    n: Annotated[int, typer.Option(help="responses per problem")] = 512,
    problems: Annotated[int, typer.Option(help="held-out problems, a multiple of 12")] = 96,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value for both trainings")] = None,
) -> None:
    """Train GRPO and RAPO on the toy world and compare their pass@k with the base model's, on this machine's CPU."""
    from rapo_verl.toy.demo import StageError
    from rapo_verl.toy.demo import demo as run_demo

    try:
        run_demo(out, seed=seed, n=n, limit=problems, overrides=overrides)
    except (StageError, ValueError) as error:
        print(f"rapo demo: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


@app.command()
def figures(
    out: Annotated[Path, typer.Option(help="folder for the figures, PNG and SVG")] = Path("docs/images"),
    page: Annotated[Path, typer.Option(help="the table of estimators")] = Path("docs/estimators.md"),
) -> None:
    """Draw the theory: optimal policies (the paper's Figures 1 and 2), bias and variance of the KL estimators."""
    from rapo_verl.figures import write_figures

    for path in write_figures(out, page):
        print(path)


@app.command("inspect-reference")
def inspect_reference(
    model: Annotated[str, typer.Argument(help="checkpoint folder or hub id")],
    prompts: Annotated[Path, typer.Option(help="veRL parquet with chat prompts")],
    out: Annotated[Path, typer.Option(help="folder for reference.json, .png and .svg")] = Path(
        "runs/inspect-reference"
    ),
    rows: Annotated[int, typer.Option(help="prompts to take", min=1)] = 32,
    tokens: Annotated[int, typer.Option(help="longest sampled response", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="of the rollout")] = 1.0,
    top_k: Annotated[int, typer.Option(help="rapo.reference.top_k")] = 64,
    top_p: Annotated[float, typer.Option(help="rapo.reference.top_p")] = 0.95,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
) -> None:
    """Say what tempering by phi does to a reference: mass outside its top k, KL to the untempered."""
    from rapo_verl.inspect_reference import inspect_reference as inspect

    try:
        inspect(
            model,
            prompts,
            out,
            rows=rows,
            tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
    except (ValueError, OSError) as error:
        _refuse([str(error)])


@toy.command("make")
def toy_make(
    out: Annotated[Path, typer.Option(help="folder; `toy_dir` of the experiments")] = Path("runs/toy/base0"),
    seed: Annotated[int, typer.Option(help="of the world and of the base model")] = 0,
) -> None:
    """Make the toy's problems (veRL parquet) and pre-train its base model."""
    from rapo_verl.toy.make import make_toy

    make_toy(out, seed=seed)
    print(f"toy: {out}")


@data.command("prepare")
def data_prepare(
    sources: Annotated[list[str], typer.Argument(help="simplerl-8k, aime24, aime25, math500 (from the hub) or files")],
    out: Annotated[Path, typer.Option(help="folder")] = Path("data"),
    name: Annotated[str | None, typer.Option(help="of the set, for one source; aime...: AIME's rules")] = None,
    against: Annotated[list[Path] | None, typer.Option(help="file that may share no question; repeatable")] = None,
    drop_overlap: Annotated[bool, typer.Option("--drop-overlap", help="leave overlap out, do not refuse")] = False,
    model: Annotated[str | None, typer.Option(help="folder or hub id; its tokenizer counts tokens")] = None,
    max_prompt_tokens: Annotated[int, typer.Option(help="of the rendered prompt; longer ones are dropped")] = 1024,
    prompt: Annotated[str, typer.Option(help="qwen-boxed (SimpleRL-Zoo's instruction) or bare")] = "qwen-boxed",
) -> None:
    """Check problem sets row by row and write each as OUT/NAME.parquet with a data card; exit code 2 if refused."""
    from rapo_verl.data.layouts import DataError
    from rapo_verl.data.prepare import prepare

    if name is not None and len(sources) > 1:
        _refuse(["--name is for one source"])
    for source in sources:
        try:
            path = prepare(
                source,
                out,
                name=name,
                against=against,
                drop_overlap=drop_overlap,
                model=model,
                max_prompt_tokens=max_prompt_tokens,
                prompt=prompt,
            )
        except DataError as error:
            print(f"rapo data: {source} is refused; nothing of it was written:", file=sys.stderr)
            print("\n".join(f"- {line}" for line in str(error).splitlines()), file=sys.stderr)
            raise typer.Exit(REFUSED) from error
        print(path.with_suffix(".card.md").read_text())


@data.command("show")
def data_show(
    file: Annotated[Path, typer.Argument(help="made by `rapo data prepare`")],
    model: Annotated[str | None, typer.Option(help="folder or hub id; default: Qwen2.5's template")] = None,
    rows: Annotated[int, typer.Option(help="how many")] = 3,
    start: Annotated[int, typer.Option(help="first row")] = 0,
) -> None:
    """Print prompts as the model will see them."""
    from rapo_verl.data.layouts import DataError
    from rapo_verl.data.prepare import show

    try:
        print("\n".join(show(file, model=model, rows=rows, start=start)))
    except DataError as error:
        print(f"rapo data: {error}", file=sys.stderr)
        raise typer.Exit(REFUSED) from error


def main() -> None:
    """Run the command line; Ctrl-C ends with exit code 130."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except KeyboardInterrupt:
        print("rapo: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
