"""RAPO (arXiv 2510.03865): reward-aware exploration RL for language models, as a training recipe on veRL."""

__version__ = "0.1.0"


class Failed(RuntimeError):
    """What was asked for was begun and ended badly; what it finished is kept. Every command ends with code 1 on it."""


class Refused(ValueError):
    """What was asked for cannot be done as it was asked; nothing was started. Every command ends with code 2 on it.

    Args:
        problems: each says what, got, allowed and how to mend it; one, or all that were found.
    """

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))
