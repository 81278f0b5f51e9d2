"""What every command shares: one refusal, and the config of a run from its overrides."""

import os
import sys
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from rapo_verl import Failed, Refused
from rapo_verl.run.names import FAILED, REFUSED

# Of `rapo --help`, in this order; a group's commands have none.
PANELS = ("Train", "Evaluate", "Data", "Look")


class Commands(TyperGroup):
    """Commands that end with code 2 on `Refused` and with code 1 on `Failed`, wherever it was raised, and say why."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of their panels."""
        order: dict[Any, int] = {panel: place for place, panel in enumerate(PANELS)}
        panel = {name: getattr(command, "rich_help_panel", None) for name, command in self.commands.items()}
        return sorted(super().list_commands(ctx), key=lambda name: order.get(panel[name], -1))

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except Refused as error:
            print(f"rapo: {len(error.problems)} problem(s); nothing was started:", file=sys.stderr)
            for problem in error.problems:
                print(f"- {problem}", file=sys.stderr)
            raise typer.Exit(REFUSED) from error
        except Failed as error:
            print(f"rapo: {error}", file=sys.stderr)
            raise typer.Exit(FAILED) from error


def commands(help: str) -> typer.Typer:
    """Return a group of commands."""
    return typer.Typer(
        cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=help
    )


def out_folder(help: str) -> Any:
    """Return an option for a folder that a command writes: it is there, or can be made."""
    return typer.Option(file_okay=False, callback=_can_be_made, help=help)


def out_file(help: str) -> Any:
    """Return an option for a file that a command writes: it is there, or can be made."""
    return typer.Option(dir_okay=False, callback=_can_be_made, help=help)


def _can_be_made(path: Path | None) -> Path | None:
    if path is not None and not os.path.exists(path):
        above = next(above for above in path.absolute().parents if os.path.exists(above))
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise Refused(f"{path} cannot be made: {above} is {'not writable' if above.is_dir() else 'no folder'}")
    return path


def composed(overrides: list[str]) -> Any:
    """Return the resolved config of the overrides."""
    from rapo_verl.run.compose import compose_or_refuse, experiments

    named = [override.removeprefix("experiment=") for override in overrides if override.startswith("experiment=")]
    if not named or named[-1] not in experiments():
        what = f"experiment {named[-1]!r} is not known" if named else "no experiment given"
        raise Refused(f"{what}; allowed: experiment=NAME, one of {', '.join(experiments())}")
    return compose_or_refuse(overrides)
