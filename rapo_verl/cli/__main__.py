"""``python -m rapo_verl.cli`` is ``rapo``."""

from rapo_verl.cli import main

main()
