"""The command ``rapo``: parse, call a room, print. No work is done in here, and heavy imports stand inside commands."""

import logging
import sys

from rapo_verl.cli import data, evaluate, look, train, verify
from rapo_verl.cli.base import commands
from rapo_verl.run.names import INTERRUPTED

app = commands("RAPO (arXiv 2510.03865) on veRL: train, evaluate, look.")
panels = (("Train", train.app), ("Train", evaluate.top), ("Evaluate", verify.app), ("Look", look.app))
for panel, source in panels:
    for command in source.registered_commands:
        command.rich_help_panel = panel
        app.registered_commands.append(command)
app.add_typer(train.toy, name="toy", rich_help_panel="Train")
app.add_typer(evaluate.app, name="eval", rich_help_panel="Evaluate")
app.add_typer(data.app, name="data", rich_help_panel="Data")


def main() -> None:
    """Run the command line; Ctrl-C ends with exit code 130."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # It has a handler of its own, and would say everything twice.
    logging.getLogger("huggingface_hub").propagate = False
    try:
        app()
    except KeyboardInterrupt:
        print(
            "rapo: interrupted; a run or an evaluation goes on where it stopped with the same command", file=sys.stderr
        )
        raise SystemExit(INTERRUPTED) from None
