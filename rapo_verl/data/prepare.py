"""`rapo data prepare` and `rapo data show`: veRL parquet with a data card, and prompts as the model sees them."""

import io
import json
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rapo_verl.data.layouts import HUB, DataError, Problem, read_hub, read_records, to_problems
from rapo_verl.data.validate import Checked, check_problems, normalized
from rapo_verl.reward import Verifier
from rapo_verl.run.files import write_atomic

SYSTEM = "You are a helpful assistant."
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
# SimpleRL-Zoo's instruction for Qwen2.5, and the question alone, for models that know no instructions.
PROMPTS = ("qwen-boxed", "bare")
# SimpleRL-Zoo's limit for Qwen2.5.
MAX_PROMPT_TOKENS = 1024
# How the names of evaluation sets begin.
EVALUATION_SETS = ("aime", "math500", "math-500", "math_500")
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
# Written out, since veRL joins the files of a list and a column without values would have another type.
SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(_MESSAGE)),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [
                    ("index", pa.int64()),
                    ("id", pa.string()),
                    ("row", pa.int64()),
                    ("level", pa.int64()),
                    ("subject", pa.string()),
                    ("source_sha256", pa.string()),
                ]
            ),
        ),
    ]
)


def messages(question: str, prompt: str) -> list[dict[str, str]]:
    """Return a question as chat messages in a style of PROMPTS; the chat template is applied later, once."""
    if prompt == "bare":
        return [{"role": "user", "content": question}]
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question + INSTRUCTION}]


def render(turns: list[dict[str, str]], tokenizer: Any | None) -> str:
    """Return a prompt as the model sees it; without a tokenizer, in Qwen2.5's ChatML."""
    turns = [dict(turn) for turn in turns]
    if tokenizer is not None:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    body = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    return f"{body}<|im_start|>assistant\n"


def load_tokenizer(model: str | None) -> Any | None:
    """Return the tokenizer of a model folder or hub id, None for None.

    Raises:
        DataError: there is none.
    """
    if model is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise DataError(f"--model {model}: no tokenizer there ({error})") from error


def questions_of(path: Path) -> dict[str, str]:
    """Return normalised question -> "file, row n (id)" of a prepared or raw file.

    Raises:
        DataError: the file cannot be read.
    """
    records, _ = read_records(path)
    if "prompt" in records[0] and "reward_model" in records[0]:
        texts = [(record["prompt"][-1]["content"].removesuffix(INSTRUCTION), "") for record in records]
    else:
        texts = [(problem.question, f" ({problem.id})") for problem in to_problems(records, path.stem)[0]]
    return {normalized(text): f"{path.name}, row {row}{name}" for row, (text, name) in enumerate(texts)}


def prepare(
    source: str,
    out: Path,
    *,
    name: str | None = None,
    against: list[Path] | None = None,
    drop_overlap: bool = False,
    model: str | None = None,
    max_prompt_tokens: int = MAX_PROMPT_TOKENS,
    prompt: str = "qwen-boxed",
    verifier: Verifier | None = None,
) -> Path:
    """Write ``NAME.parquet`` in veRL's layout, with ``NAME.card.json`` and ``NAME.card.md`` beside it.

    Args:
        source: a name of `HUB` or a local file.
        out: folder.
        name: data_source and file name; default: the source's. One that begins as in `EVALUATION_SETS` makes it an
            evaluation set, "aime" an AIME set.
        against: files whose questions must not be in this one.
        drop_overlap: leave out what overlaps instead of refusing the file.
        model: whose tokenizer counts the prompt's tokens; None: not counted, and the card says so.
        max_prompt_tokens: limit of the rendered prompt.
        prompt: a style of PROMPTS.
        verifier: default: one of the default settings, closed at the end.

    Returns:
        The parquet file.

    Raises:
        DataError: the source cannot be read or must not be used; nothing was written.
    """
    if prompt not in PROMPTS:
        raise DataError(f"prompt is {prompt!r}; allowed: {', '.join(PROMPTS)}")
    name = name or (source if source in HUB else Path(source).stem)
    records, source_sha = read_hub(HUB[source]) if source in HUB else read_records(Path(source))
    problems, layout = to_problems(records, name)
    others: dict[str, str] = {}
    for path in against or []:
        others.update(questions_of(path))
    tokenizer = load_tokenizer(model)
    asked = verifier or Verifier()
    try:
        checked = check_problems(
            problems,
            aime=name.lower().startswith("aime"),
            evaluation=name.lower().startswith(EVALUATION_SETS),
            against=others,
            drop_overlap=drop_overlap,
            count_tokens=tokenizer and (lambda p: _count_tokens(tokenizer, p, prompt)),
            max_prompt_tokens=max_prompt_tokens,
            verifier=asked,
        )
    finally:
        if verifier is None:
            asked.close()
    if checked.refused:
        raise DataError("\n".join(f"{source}: {finding}" for finding in checked.refused))
    if not checked.kept:
        raise DataError(f"{source}: no row is left of {len(problems)}")
    data = _to_parquet(checked.kept, name, source_sha, prompt)
    card = {
        "name": name,
        "source": source if source in HUB else Path(source).name,
        "source_sha256": source_sha,
        "layout": layout.name,
        "output": f"{name}.parquet",
        "output_sha256": sha256(data).hexdigest(),
        "rows_in_source": len(problems),
        "rows": len(checked.kept),
        "prompt": prompt,
        "token_limit": f"{max_prompt_tokens} tokens of {Path(model).name}" if model else "not checked (no --model)",
        "checked_against": sorted(path.name for path in against or []),
        **_counts(checked),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / f"{name}.card.json", json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    write_atomic(out / f"{name}.card.md", card_markdown(card))
    # Last, so that a parquet file always has its card.
    write_atomic(out / f"{name}.parquet", data)
    return out / f"{name}.parquet"


def _count_tokens(tokenizer: Any, problem: Problem, prompt: str) -> int:
    return len(tokenizer(render(messages(problem.question, prompt), tokenizer), add_special_tokens=False)["input_ids"])


def _to_parquet(problems: list[Problem], name: str, source_sha: str, prompt: str) -> bytes:
    rows = [
        {
            "data_source": name,
            "prompt": messages(p.question, prompt),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": p.answer},
            "extra_info": {
                "index": index,
                "id": p.id,
                "row": p.row,
                "level": p.level,
                "subject": p.subject,
                "source_sha256": source_sha,
            },
        }
        for index, p in enumerate(problems)
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer)
    return buffer.getvalue()


def _counts(checked: Checked) -> dict[str, Any]:
    levels = Counter("none" if p.level is None else str(p.level) for p in checked.kept)
    subjects = Counter(p.subject or "none" for p in checked.kept)
    return {
        "by_level": dict(sorted(levels.items())),
        "by_subject": dict(sorted(subjects.items())),
        "dropped": [vars(finding) for finding in checked.dropped],
        "suspect_but_kept": [vars(finding) for finding in checked.suspect],
        "answers_compared_as_text": [p.row for p in checked.text_answers],
    }


def card_markdown(card: dict[str, Any]) -> str:
    """Return a data card as markdown."""
    keys = ("source", "source_sha256", "layout", "output", "output_sha256", "rows_in_source", "rows", "prompt")
    lines = [f"# {card['name']}", ""]
    lines += [f"* {key.replace('_', ' ')}: {card[key]}" for key in (*keys, "token_limit")]
    lines += [f"* checked against: {', '.join(card['checked_against']) or 'nothing'}"]
    lines += [f"* answers compared as text, rows: {', '.join(map(str, card['answers_compared_as_text'])) or 'none'}"]
    for title, counts in (("level", card["by_level"]), ("subject", card["by_subject"])):
        lines += ["", f"| {title} | rows |", "|---|---|", *(f"| {key} | {count} |" for key, count in counts.items())]
    lines += ["", f"Dropped: {len(card['dropped'])}", ""]
    lines += [f"* row {d['row']} ({d['id']}): {d['reason']}" for d in card["dropped"]]
    lines += ["", f"Suspect, but kept: {len(card['suspect_but_kept'])}", ""]
    lines += [f"* row {d['row']} ({d['id']}): {d['reason']}" for d in card["suspect_but_kept"]]
    return "\n".join(lines).rstrip() + "\n"


def show(path: Path, *, model: str | None, rows: int, start: int) -> list[str]:
    """Return rendered prompts of a prepared file, each with its right answer.

    Raises:
        DataError: the file is not in veRL's layout.
    """
    records, _ = read_records(path)
    if "prompt" not in records[0] or "reward_model" not in records[0]:
        raise DataError(f"{path}: not in veRL's layout; make it with `rapo data prepare {path}`")
    tokenizer = load_tokenizer(model)
    shown = []
    for i, record in list(enumerate(records))[start : start + rows]:
        text = render(record["prompt"], tokenizer)
        count = f", {len(tokenizer(text, add_special_tokens=False)['input_ids'])} tokens" if tokenizer else ""
        identity = (record.get("extra_info") or {}).get("id", "no id")
        answer = record["reward_model"]["ground_truth"]
        shown.append(f"--- row {i} ({identity}{count}), answer {answer!r}\n{text}")
    return shown
