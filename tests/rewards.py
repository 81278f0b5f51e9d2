"""Reward functions for the end-to-end tests, given to veRL by path."""

from pathlib import Path


def early_letter(data_source, solution_str, ground_truth, extra_info=None, **_):
    # Something a barely trained model does often and not always, so that groups have advantages.
    return float(solution_str[:1] in "abcd")


def raises(data_source, solution_str, ground_truth, extra_info=None, **_):
    raise KeyError(f"no such rubric for {ground_truth}")


def early_letter_before_marker(data_source, solution_str, ground_truth, extra_info=None, *, marker, **_):
    return 0.0 if Path(marker).exists() else early_letter(data_source, solution_str, ground_truth, extra_info)


def not_a_number(data_source, solution_str, ground_truth, extra_info=None, **_):
    return float("nan")


def raises_after_marker(data_source, solution_str, ground_truth, extra_info=None, *, marker, **_):
    if Path(marker).exists():
        raise KeyError("rubric lost")
    return early_letter(data_source, solution_str, ground_truth)
