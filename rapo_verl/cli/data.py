"""The commands `rapo data ...`."""

from pathlib import Path
from typing import Annotated

import typer

from rapo_verl import Refused
from rapo_verl.cli.base import commands, out_folder

app = commands("Problem sets as veRL parquet: docs/data-and-verifier.md.")


@app.command("prepare")
def data_prepare(
    sources: Annotated[list[str], typer.Argument(help="simplerl-8k, aime24, aime25, math500 (from the hub) or files")],
    out: Annotated[Path, out_folder("folder")] = Path("data"),
    name: Annotated[str | None, typer.Option(help="of the set, for one source; aime...: AIME's rules")] = None,
    against: Annotated[list[Path] | None, typer.Option(help="file that may share no question; repeatable")] = None,
    drop_overlap: Annotated[bool, typer.Option("--drop-overlap", help="leave overlap out, do not refuse")] = False,
    model: Annotated[str | None, typer.Option(help="folder or hub id; its tokenizer counts tokens")] = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="of the rendered prompt; longer are dropped")] = 1024,
    prompt: Annotated[str, typer.Option(help="qwen-boxed, boxed (no system message) or bare")] = "qwen-boxed",
) -> None:
    """Check problem sets row by row and write each as OUT/NAME.parquet with a data card; exit code 2 if refused.

    Example: rapo data prepare train.jsonl --against aime24.parquet --out data
    """
    from rapo_verl.data.prepare import name_of, prepare

    if name is not None and len(sources) > 1:
        raise Refused("--name is for one source")
    names = [name_of(source) for source in sources]
    if len(set(names)) < len(names):
        raise Refused(f"sources of one name: {', '.join(names)}; give them one at a time, with --name")
    for source in sources:
        path = prepare(
            source,
            out,
            name=name,
            against=against or [],
            drop_overlap=drop_overlap,
            model=model,
            max_prompt_tokens=max_prompt_tokens,
            prompt=prompt,
        )
        print(path.with_suffix(".card.md").read_text())


@app.command("show")
def data_show(
    file: Annotated[Path, typer.Argument(help="made by `rapo data prepare`")],
    model: Annotated[str | None, typer.Option(help="folder or hub id; default: Qwen2.5's template")] = None,
    rows: Annotated[int, typer.Option(min=1, help="how many")] = 3,
    start: Annotated[int, typer.Option(min=0, help="first row")] = 0,
) -> None:
    """Print prompts as the model will see them.

    Example: rapo data show data/train.parquet --rows 1
    """
    from rapo_verl.data.prepare import show

    print("\n".join(show(file, model=model, rows=rows, start=start)))
