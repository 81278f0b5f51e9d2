"""Commands that look: at a plan, an installation, a run, a reference, the theory."""

from pathlib import Path
from typing import Annotated

import typer

from rapo_verl import Refused
from rapo_verl.cli.base import commands, composed, out_file, out_folder

app = commands("Look.")


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="name of an experiment")],
    overrides: Annotated[list[str] | None, typer.Argument(help="any key=value, as for `rapo train`")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, max=1 << 16, help="how many; default: the recipe's")] = None,
    gpu: Annotated[str | None, typer.Option(help="h100, a100-40, rtx4090, ...; default: the card here")] = None,
    response: Annotated[int, typer.Option(min=1, help="mean tokens of a response, for the times")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say what a run needs of its GPUs, whether it fits and what would: docs/scaling.md. Exit code 1: it does not.

    Example: rapo plan qwen2.5_7b_rapo --gpus 16 --gpu h200
    """
    from rapo_verl.plan.report import show_plan
    from rapo_verl.run.compose import compose_config
    from rapo_verl.run.values import wrong_values

    config = composed([f"experiment={recipe}", *(overrides or [])])
    wrong = wrong_values(config, compose_config([]))
    if wrong:
        raise Refused(list(wrong.values()))
    fits = show_plan(config, gpu=gpu, gpus=gpus, response=response, as_json=as_json)
    raise typer.Exit(0 if fits else 1)


@app.command()
def doctor(
    cluster: Annotated[bool, typer.Option("--cluster", help="what a node of a Slurm job needs, in a second")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="try what a run does on a GPU, each thing in a process")] = False,
) -> None:
    """Say what is installed, which platform this is, what is wrong and how to mend it; exit code 1 if anything is.

    Example: rapo doctor
    """
    from rapo_verl.cluster.checks import check_node
    from rapo_verl.cluster.facts import Facts
    from rapo_verl.run.doctor import examine
    from rapo_verl.run.finding import print_findings

    if cluster and gpu:
        raise Refused("--cluster looks at a node for a second, --gpu tries its GPUs for minutes; ask for one of them")
    findings = check_node(Facts.read()) if cluster else examine(gpu)
    print_findings(findings)
    if any(not finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def checkpoints(
    run: Annotated[Path, typer.Argument(help="run folder")],
    verify: Annotated[bool, typer.Option("--verify", help="read every byte")] = False,
    export: Annotated[int | None, typer.Option(help="step to write as a Hugging Face model")] = None,
    to: Annotated[Path | None, out_folder("for --export")] = None,
) -> None:
    """List a run's checkpoints; exit code 1 if one is damaged or incomplete.

    Example: rapo checkpoints runs/toy_rapo_cpu --verify
    """
    from rapo_verl.run.inspect import export_checkpoint, show_checkpoints

    if export is None and to is not None:
        raise Refused("--to is the folder of --export STEP, which was not given")
    if export is None:
        raise typer.Exit(0 if show_checkpoints(run, verify=verify) else 1)
    print(export_checkpoint(run, export, to or run / "export" / f"step_{export}"))


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="run folder")],
    once: Annotated[Path | None, out_file("write the page to this HTML file and end")] = None,
    text: Annotated[bool, typer.Option("--text", help="print it here and end; exit code 1 if an alarm holds")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="of the page; 0: any that is free")] = 8765,
    refresh: Annotated[int, typer.Option(min=1, help="seconds after which the page reads the folder again")] = 15,
) -> None:
    """Say how a run stands and whether it collapses, on a page of this machine's: docs/watching.md.

    Example: rapo watch runs/toy_rapo_cpu --text
    """
    from rich.console import Console

    from rapo_verl.report import watch as page
    from rapo_verl.run.files import write_atomic

    if once is None and not text:
        page.serve(run, port, refresh)
        return
    shot = page.take(run)
    if once is not None:
        once.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(once, page.render(shot))
        print(once)
    if text:
        page.show(shot, Console())
        raise typer.Exit(1 if shot.alarms else 0)


@app.command("inspect-batch")
def inspect_batch(
    file: Annotated[Path, typer.Argument(help="bad_batches/step_N.pt of a run that stopped on NaN")],
    rows: Annotated[int, typer.Option(min=0, help="responses to show")] = 5,
) -> None:
    """Say what in a batch is NaN or infinite, and show the responses it stands in.

    Example: rapo inspect-batch runs/toy_rapo_cpu/bad_batches/step_3.pt
    """
    from rapo_verl.run.inspect import inspect

    print("\n".join(inspect(file, rows)))


@app.command()
def figures(
    out: Annotated[Path, out_folder("folder for the figures, PNG and SVG")] = Path("docs/images"),
) -> None:
    """Draw the theory: optimal policies (the paper's Figures 1 and 2), bias and variance of the KL estimators.

    Example: rapo figures
    """
    from rapo_verl.theory.figures import write_figures

    for path in write_figures(out):
        print(path)


@app.command("explain-kl")
def explain_kl(
    config: Annotated[str | None, typer.Argument(help="name of an experiment, or a YAML file of veRL's")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="any key=value, as for `rapo train`")] = None,
    setting: Annotated[str | None, typer.Option(help="of another framework: trl-grpo, nemo-rl, openrlhf, ...")] = None,
    updates: Annotated[int | None, typer.Option(min=0, help="updates since sampling; default: the config's")] = None,
    plot: Annotated[Path | None, out_file("PNG: where it takes policies that lost a mode")] = None,
    every: Annotated[bool, typer.Option("--all", help="write the page of all estimators and settings")] = False,
    page: Annotated[Path, typer.Option(help="that page")] = Path("docs/estimators.md"),
) -> None:
    """Say which divergence a KL setting really descends, by exact enumeration: docs/estimators.md.

    Example: rapo explain-kl toy_grpo_cpu actor_rollout_ref.actor.kl_loss_type=k2 --plot kl.png
    """
    from rich.console import Console

    from rapo_verl.report.figures import image
    from rapo_verl.run.files import write_atomic
    from rapo_verl.theory import explain_kl as theory
    from rapo_verl.theory.kl_settings import SETTINGS, read_file, read_setting

    if every:
        write_atomic(page, theory.page())
        print(page)
        return
    if (config is None) == (setting is None):
        raise Refused("give a config or --setting, one of the two; or --all")
    if setting is not None and setting not in SETTINGS:
        raise Refused(f"--setting {setting} is not known; allowed: {', '.join(SETTINGS)}")
    if setting is not None:
        found = SETTINGS[setting]
    elif config is not None and config.endswith((".yaml", ".yml")):
        found = read_setting(read_file(Path(config), overrides or []), config)
    else:
        found = read_setting(composed([f"experiment={config}", *(overrides or [])]), f"experiment={config}")
    found = found if updates is None else found._replace(updates=updates)
    theory.show(found, Console())
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(plot, image(theory.plot(found), "png"))
        print(plot)


@app.command("inspect-reference")
def inspect_reference(
    model: Annotated[str, typer.Argument(help="checkpoint folder or hub id")],
    prompts: Annotated[Path, typer.Option(help="veRL parquet with chat prompts")],
    out: Annotated[Path, out_folder("folder for reference.json, .png and .svg")] = Path("runs/inspect-reference"),
    rows: Annotated[int, typer.Option(help="prompts to take", min=1)] = 32,
    tokens: Annotated[int, typer.Option(help="longest sampled response", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="of the rollout")] = 1.0,
    top_k: Annotated[int, typer.Option(min=1, help="rapo.reference.top_k")] = 64,
    top_p: Annotated[float, typer.Option(help="rapo.reference.top_p")] = 0.95,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
) -> None:
    """Say what tempering by phi does to a reference: mass outside its top k, KL to the untempered, what it writes.

    Example: rapo inspect-reference Qwen/Qwen2.5-0.5B --prompts data/aime24.parquet
    """
    from rapo_verl.theory.inspect_reference import inspect_reference as inspect

    try:
        inspect(
            model, prompts, out, rows=rows, tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
    except (ValueError, OSError) as error:  # what transformers raises on a model that is none
        raise Refused(str(error)) from error
