"""A world whose pass@k is known exactly: its problems, a tiny base model, the demo. No other room may need it."""
