"""What `rapo doctor` finds: one thing looked at, how it is, how to mend it."""

import sys
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what it is, what was found, and how to mend it where it is wrong."""

    what: str
    found: str
    ok: bool = True
    mend: str = ""


def gib(count: float) -> str:
    """Return a number of bytes in words."""
    return f"{count / (1 << 30):.1f} GiB"


def print_findings(findings: list[Finding]) -> None:
    """Print a table, what is wrong last and with how to mend it."""
    table = Table("", "what", "found", "to mend")
    for finding in sorted(findings, key=lambda finding: not finding.ok):
        mark, mend = ("ok", "") if finding.ok else ("[red]WRONG[/red]", finding.mend)
        table.add_row(mark, finding.what, finding.found, mend)
    # In a job's log nothing tells a width, and 80 columns would fold the table.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
