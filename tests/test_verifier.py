"""The answer check: the last box, integers only, and no input that slows it down or slips through."""

import asyncio
import random
import time

import pytest

from rapo_verl.reward import MAX_BOX, Verifier, VerifierSettings, last_boxed, parse_integer, verify_integer
from rapo_verl.reward.function import compute_integer_score


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{}", ""),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{{{7}}}", "{{7}}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2} and } }", "2"),
        (r"\boxed{\boxed{5}}", "5"),
        ("\\boxed{4\n2}", "4\n2"),
        (r"no box", None),
        (r"\boxed 42", "42"),
        (r"\boxed{42", None),
        (r"\boxed{{42}", None),
        (r"\boxed{1} then \boxed{2", None),  # the last one counts, and it never closes
        (r"\boxed{", None),
        ("", None),
    ],
)
def test_last_boxed_matches_braces_of_the_last_box(text, want):
    assert last_boxed(text) == want


def test_box_longer_than_the_limit_counts_as_unclosed():
    assert last_boxed("\\boxed{" + "1" * (MAX_BOX - 1) + "}") == "1" * (MAX_BOX - 1)
    assert last_boxed("\\boxed{" + "1" * MAX_BOX + "}") is None


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("42", 42),
        (" \t42\n", 42),
        ("-42", -42),
        ("+42", 42),
        ("-0", 0),
        ("007", 7),
        ("-007", -7),
        ("0", 0),
        ("1,234", 1234),
        ("-12,345,678", -12345678),
        ("1000000", 1000000),
    ],
)
def test_parse_integer_accepts(text, want):
    assert parse_integer(text) == want


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "-", "+", "--1", "+-1", "- 1", "1 2", "1.0", "1e3", "0x10", "1_000", "forty", "4 2"),
        *("1,23", "1,2345", "1234,567", ",123", "1,,234", "123,", "1, 234"),
        *("٤٢", "４２", "४२", "4²", "①", "−42", "42\x00", "\x0042", "4\x002", "{42}", "$42$", "42%"),
    ],
)
def test_parse_integer_refuses(text):
    assert parse_integer(text) is None


@pytest.mark.parametrize(
    ("response", "want"),
    [
        (r"\boxed{42}", "correct"),
        (r"\boxed{ 042 }", "correct"),
        (r"\boxed{+42}", "correct"),
        (r"\boxed{-42}", "wrong"),
        (r"\boxed{41} \boxed{42}", "correct"),
        (r"\boxed{42} \boxed{41}", "wrong"),
        (r"\boxed{42.0}", "wrong"),
        (r"\boxed{}", "wrong"),
        (r"\boxed{\text{42}}", "wrong"),
        ("\\boxed{٤٢}", "wrong"),
        ("\\boxed{４２}", "wrong"),
        ("\x00\\boxed{42}\x00", "correct"),
        ("\\boxed{4\x002}", "wrong"),
        ("\\boxed{42\x00}", "wrong"),
        ("42", "no_box"),
        (r"\boxed{42", "no_box"),
    ],
)
def test_verdict_on_forty_two(response, want):
    assert verify_integer(response, "42")[0] == want


@pytest.mark.parametrize("truth", ["42", " 042", "+42"])
def test_ground_truth_is_read_like_an_answer(truth):
    assert verify_integer(r"\boxed{42}", truth) == ("correct", "42")


@pytest.mark.parametrize("truth", ["", "4.2", r"\boxed{42}", "٤٢", "None", "1/2"])
def test_ground_truth_that_is_no_integer_raises_and_is_named(truth):
    for response in (r"\boxed{42}", "no box"):
        with pytest.raises(ValueError, match=r"ground truth .* is not an integer") as error:
            verify_integer(response, truth)
        assert repr(truth) in str(error.value)
        with pytest.raises(ValueError, match="is not an integer"):
            score("any", response, truth)


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" + "9" * 100_000 + "}",
        "\\boxed{" + "1," * 50_000 + "}",
        "\\boxed{" + " " * 100_000 + "}",
        "\\boxed{" + "{" * 100_000,
        "\\boxed{" * 15_000,
        "\\boxed{1}" + "x" * 100_000,
        "9" * 100_000,
        "1," * 50_000 + "234",
        " " * 100_000 + "x",
    ],
    ids=["digits", "commas", "spaces", "braces", "boxes", "tail", "bare", "bare commas", "bare spaces"],
)
def test_hundred_kilobytes_are_checked_quickly(text):
    start = time.perf_counter()
    assert verify_integer(text, "42")[0] != "correct"
    assert parse_integer(text) is None
    # Milliseconds; int() of 1e5 digits alone would take 0.1 s or raise, a quadratic search seconds.
    assert time.perf_counter() - start < 0.5


def oracle_box(text: str) -> str | None:
    parts = text.split("\\boxed{")
    if len(parts) == 1:
        return None
    open_braces, content = 1, ""
    for character in parts[-1]:
        open_braces += {"{": 1, "}": -1}.get(character, 0)
        if open_braces == 0:
            return content
        content += character
    return None


def oracle_integer(text: str) -> int | None:
    text = text.strip()
    sign = -1 if text[:1] == "-" else 1
    body = text[1:] if text[:1] in ("-", "+") else text
    groups = body.split(",")
    if any(not group or set(group) - set("0123456789") for group in groups):
        return None
    if len(groups) > 1 and (len(groups[0]) > 3 or any(len(group) != 3 for group in groups[1:])):
        return None
    value = 0
    for digit in "".join(groups):
        value = 10 * value + "0123456789".index(digit)
    return sign * value


def test_random_strings_agree_with_an_independent_oracle():
    rng = random.Random(0)
    pieces = ["\\boxed{", "}", "{", *"0123456789-+, \n.x\x00٣", "12", "345", "1,234"]
    weights = [4, 8] + [1] * (len(pieces) - 2)
    integers = verdicts = 0
    for _ in range(2000):
        answer = "".join(rng.choices(pieces[3:], k=rng.randint(1, 4)))
        assert parse_integer(answer) == oracle_integer(answer), repr(answer)
        integers += parse_integer(answer) is not None
        text = "".join(rng.choices(pieces, weights, k=rng.randint(0, 12)))
        text += rng.choice(["", "\\boxed{" + answer + "}", "\\boxed{" + answer])
        box = oracle_box(text)
        assert last_boxed(text) == box, repr(text)
        truth = str(rng.choice([rng.randint(-20, 2000), oracle_integer(box) or 0 if box else 0]))
        right = box is not None and oracle_integer(box) == int(truth)
        want = "no_box" if box is None else "correct" if right else "wrong"
        assert verify_integer(text, truth) == (want, box), (text, truth)
        verdicts += want == "correct"
    assert integers > 200 and verdicts > 100  # the strings reach both outcomes often


def score(*args, **kwargs):
    return asyncio.run(compute_integer_score(*args, **kwargs))


def test_reward_record_has_score_verdict_and_answer():
    right = score("any", r"\boxed{42}", "42", {"index": 3}, reward_model=None)
    assert right == {"score": 1.0, "acc": 1.0, "verdict": "correct", "answer": "42", "truncated": False}
    assert score("any", r"\boxed{x}", "42").items() >= {"score": 0.0, "verdict": "wrong", "answer": "x"}.items()
    assert score("any", "42", "42").items() >= {"score": 0.0, "verdict": "no_box", "answer": ""}.items()
    assert type(right["score"]) is float and type(right["verdict"]) is str


def test_reward_ignores_the_name_of_the_data_set():
    assert len({str(score(name, r"\boxed{42}", "42")) for name in ("", "gsm8k", "math_dapo", "aime", "math")}) == 1


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("50-13 = 37.", "correct"), ("so \\boxed{37} it is", "correct"), ("she has 37 cards, 37", "correct"),
        ("first 37, then 38", "wrong"), ("= -37", "wrong"), ("37.5", "wrong"), ("0.37", "wrong"), ("1,037", "wrong"),
        ("B37", "no_box"), ("none of them", "no_box"), ("", "no_box"), ("90-53=37", "correct"),
        ("costs $37", "correct"), ("(50)-37", "correct"), ("37" * 600, "wrong"),
    ],
)  # fmt: skip
def test_last_integer_reads_the_last_number_of_the_text(text, verdict):
    verifier = Verifier(VerifierSettings(strictness="last_integer"))
    assert verifier.verify(text, "37")[0] == verdict
    assert verifier.verify_many([text, text], ["37", "38"])[0][0] == verdict
