"""The commands `rapo eval ...`; heavy imports are inside them."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rapo_verl import Refused
from rapo_verl.cli.base import commands, out_folder

app = commands("pass@k of any model on any problem set: docs/evaluating.md.")
top = commands("What stands beside `rapo train`.")

# n and what else a protocol fixes; an option given beside it wins.
PRESETS = {
    # arXiv 2510.03865, figure 3: k up to 2^10 from n = 2048. Temperature and limits are not in the paper.
    "rapo-paper": {"n": 2048, "temperature": 1.0, "top_p": 1.0, "max_tokens": 8192},
    "quick": {"n": 64, "temperature": 1.0, "top_p": 1.0, "max_tokens": 8192},
}
Folders = Annotated[list[Path], typer.Argument(help="made by `rapo eval generate`")]
Strictness = Annotated[str, typer.Option(help="of the verifier: integer, last_integer, symmetric or math_verify")]
DEADLINE_S = 5.0


@app.command("generate")
def eval_generate(
    model: Annotated[str, typer.Option(help="run's folder, checkpoint (Hugging Face, veRL's global_step_N) or hub id")],
    data: Annotated[list[Path], typer.Option(help="parquet of `rapo data prepare`; more files may follow")],
    out: Annotated[Path, out_folder("folder of the samples")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="[DATA]...", help="more files")] = None,
    preset: Annotated[str, typer.Option(help=f"one of {', '.join(PRESETS)}")] = "rapo-paper",
    n: Annotated[int | None, typer.Option(min=1, help="samples a problem")] = None,
    temperature: Annotated[float | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="of a response")] = None,
    stop_id: Annotated[
        list[int] | None, typer.Option(help="token that ends a response, beside the model's own")
    ] = None,
    draw: Annotated[int, typer.Option(help="number of the draw: another one has other seeds throughout")] = 1,
    shard: Annotated[int, typer.Option(min=1, help="samples a file")] = 128,
    part: Annotated[str, typer.Option(help="i/count: the i-th part, for processes side by side; from 0")] = "0/1",
    limit: Annotated[int | None, typer.Option(min=1, help="only the first problems of each file")] = None,
    logprobs: Annotated[bool, typer.Option(help="keep each response's cumulative log-prob")] = True,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="keep each response's tokens, to train on")] = False,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs of one engine")] = 1,
    ray: Annotated[str | None, typer.Option(help="auto: an existing cluster; local: one on this machine")] = None,
    engines: Annotated[int, typer.Option(min=0, help="with --ray: at most so many; 0: all that fit")] = 0,
    engine_arg: Annotated[list[str] | None, typer.Option(help="key=value for vLLM's engine; repeatable")] = None,
) -> None:
    """Sample; the same command goes on where it stopped.

    Example: rapo eval generate --model runs/toy_rapo_cpu --data aime24.parquet --out evals/rapo --n 64
    """
    from omegaconf import OmegaConf

    from rapo_verl.evaluation.engines import EngineSpec, local_fleet, ray_fleet
    from rapo_verl.evaluation.generate import Draw
    from rapo_verl.evaluation.session import generate_draw, read_plan
    from rapo_verl.evaluation.spec import Sampling
    from rapo_verl.evaluation.store import Store

    bare = [text for text in engine_arg or [] if "=" not in text]
    index, _, count = part.partition("/")
    is_part = index.isdigit() and count.isdigit() and int(index) < int(count)
    checks = [
        (preset in PRESETS, f"--preset is {preset!r}; allowed: {', '.join(PRESETS)}"),
        (not bare, f"--engine-arg is {bare}; allowed: key=value"),
        (ray in (None, "auto", "local"), f"--ray is {ray!r}; allowed: auto or local"),
        (is_part, f"--part is {part!r}; allowed: i/count with 0 <= i < count"),
    ]
    if not all(ok for ok, _ in checks):
        raise Refused([fault for ok, fault in checks if not ok])
    given = {"n": n, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
    chosen = PRESETS[preset] | {key: value for key, value in given.items() if value is not None}
    samples = int(chosen.pop("n"))
    sampling = Sampling(**chosen, stop_token_ids=tuple(stop_id or ()), logprobs=logprobs, token_ids=token_ids)  # type: ignore[arg-type]
    plan = read_plan(model, [*data, *(more or [])], sampling, n=samples, draw=draw, shard=shard, limit=limit)
    print(f"model: {plan.notes['model']}", flush=True)
    sampled = Draw(plan, Store.create(out, plan), (int(index), int(count)))
    options: Any = OmegaConf.to_container(OmegaConf.from_dotlist(engine_arg or []))
    spec = EngineSpec(plan.notes["weights"], plan.longest, tensor_parallel, options)
    damaged = generate_draw(sampled, local_fleet(spec) if ray is None else ray_fleet(spec, ray, engines=engines))
    if damaged:
        print(f"{len(damaged)} damaged shard(s) were made again; the old files end in .damaged", file=sys.stderr)
    if int(count) > 1:
        print(f"{out}: part {part} is complete; the others are made by other processes")
        return
    print(f"{out}: {samples} samples of each of {len(plan.problems)} problems; next: rapo eval score {out}")


def _score(folders: list[Path], strictness: str, deadline: float, jobs: int | None) -> None:
    from tqdm import tqdm

    from rapo_verl.evaluation.score import score
    from rapo_verl.evaluation.store import MANIFEST_FILE, Store
    from rapo_verl.reward import VerifierSettings
    from rapo_verl.run.progress import bar_interval

    settings = VerifierSettings(strictness=strictness, deadline_s=deadline, workers=1)
    if settings.problems():
        raise Refused(settings.problems())
    foreign = [folder for folder in folders if folder.exists() and not (folder / MANIFEST_FILE).exists()]
    if len(foreign) == len(folders):
        raise Refused(f"no evaluation in {', '.join(map(str, folders))}; make one with `rapo eval generate`")
    faults = []
    for folder in folders:
        if folder in foreign:
            print(f"{folder}: no evaluation, left out", file=sys.stderr)
            continue
        try:
            store = Store.open(folder)
            with tqdm(desc=f"scoring {folder}", unit="problem", total=0, mininterval=bar_interval()) as bar:
                judged = score(store, settings, jobs=jobs, started=bar.reset, done=bar.update)
        except Refused as error:
            # The others are judged all the same.
            faults += error.problems
            continue
        print(f"{folder}: {judged} problems judged, {len(store.problems) - judged} were already")
    if faults:
        raise Refused(faults)


@app.command("score")
def eval_score(
    folders: Folders,
    strictness: Strictness = "symmetric",
    deadline: Annotated[float, typer.Option(help="seconds that one comparison may take")] = DEADLINE_S,
    jobs: Annotated[int | None, typer.Option(min=1, help="processes; default: one a core")] = None,
) -> None:
    """Judge samples; what was judged by this verifier already is kept.

    Example: rapo eval score evals/base evals/rapo
    """
    _score(folders, strictness, deadline, jobs)


@top.command("reference-answers")
def reference_answers(
    folder: Annotated[Path, typer.Argument(help="made by `rapo eval generate --token-ids` with the base model")],
    strictness: Strictness = "symmetric",
    deadline: Annotated[float, typer.Option(help="seconds that one comparison may take")] = DEADLINE_S,
    jobs: Annotated[int | None, typer.Option(min=1, help="processes; default: one a core")] = None,
) -> None:
    """Judge a base model's answers to the training problems and put them into one file, for rapo.forward_kl.samples.

    Example: rapo reference-answers answers/base
    """
    from rapo_verl.evaluation.collect import collect_answers, need_tokens
    from rapo_verl.evaluation.store import Store
    from rapo_verl.run.reference_answers import ReferenceAnswers

    store = Store.open(folder)
    need_tokens(store)
    _score([folder], strictness, deadline, jobs)
    path = collect_answers(store)
    print(f"{path}: {ReferenceAnswers.read(folder, limit=store.manifest['sampling']['max_tokens']).describe()}")


@app.command("report")
def eval_report(
    folders: Folders,
    out: Annotated[Path, out_folder("folder of the report")],
    hard_from: Annotated[Path | None, typer.Option(help="another draw of the base, which chooses Hard")] = None,
    force_same_draw: Annotated[
        bool, typer.Option("--force-same-draw", help="let a scored draw choose Hard; the report says so")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="compare models that were sampled differently; the report says so")
    ] = False,
    score: Annotated[bool, typer.Option("--score", help="first judge what `rapo eval score` would")] = False,
    strictness: Strictness = "symmetric",
    title: Annotated[str, typer.Option()] = "pass@k",
    draws: Annotated[int, typer.Option(min=100, help="of each interval")] = 2000,
) -> None:
    """Write report.html, figures, JSON, CSV and a LaTeX table from judged folders, the first is the base by default.

    Example: rapo eval report evals/base evals/rapo --out evals/report
    """
    from rapo_verl.report.load import load_study
    from rapo_verl.report.page import print_table, write_report

    if score:
        _score([*folders, *([hard_from] if hard_from else [])], strictness, DEADLINE_S, None)
    study = load_study(
        folders,
        hard_from,
        settings={"command": " ".join(["rapo", *sys.argv[1:]])},
        title=title,
        force=force,
        force_same_draw=force_same_draw,
        draws=draws,
    )
    print_table(write_report(out, study))
    print(f"report: {out / 'report.html'}")
