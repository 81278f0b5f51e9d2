"""All that runs inside veRL's processes, under veRL's names; only this room imports its trainers, workers, engines."""
