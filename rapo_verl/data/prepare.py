"""`rapo data prepare` and `rapo data show`: veRL parquet with a data card, and prompts as the model sees them."""

import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rapo_verl import Refused
from rapo_verl.data.chat import PROMPTS, load_tokenizer, messages, render
from rapo_verl.data.layouts import Row, to_problems
from rapo_verl.data.overlap import HeldOut
from rapo_verl.data.sources import HUB, iter_records, read_hub
from rapo_verl.data.validate import Checked, RowFinding, bar, check_problems, chunks, first_of_each_kind, listed
from rapo_verl.reward import Verifier, VerifierSettings, shared_verifier
from rapo_verl.run.files import file_sha256, filled, write_atomic

# SimpleRL-Zoo's limit for Qwen2.5.
MAX_PROMPT_TOKENS = 1024
# How the names of evaluation sets begin, and how many problems those have that are named like the whole; small letters
# and digits alone.
EVALUATION_SETS = ("aime", "math500")
_WHOLE = ((re.compile(r"aime(?:20)?2[45]"), 30), (re.compile(r"aime(?:20)?2[45]ii?"), 15), (re.compile("math500"), 500))
# Rows of a kind that a refusal and a card name one by one, and how many rows are made parquet at once.
_REFUSED_SHOWN, _CARD_SHOWN, _TEXTS_SHOWN, _ROW_GROUP = 20, 1000, 100, 1 << 15
# Written out, since veRL joins the files of a list and a column without values would have another type.
SCHEMA = pa.schema(
    {
        "data_source": pa.string(),
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "ability": pa.string(),
        "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),
        "extra_info": pa.struct(
            {
                "index": pa.int64(),
                "id": pa.string(),
                "row": pa.int64(),
                "level": pa.int64(),
                "subject": pa.string(),
                "source_sha256": pa.string(),
            }
        ),
    }
)


def name_of(source: str) -> str:
    """Return the name that a set gets from its source, a name of `HUB` or a file."""
    return source if source in HUB else Path(source).stem


def held_out(paths: Iterable[Path]) -> HeldOut:
    """Return the questions of prepared or raw files, each known as "file, row n (id)"."""
    questions = HeldOut()
    for path in paths:
        for problem in to_problems(bar(iter_records(path), f"reading {path.name}"), path.stem)[0]:
            if problem.fault is None:
                questions.add(problem.question, f"{path.name}, row {problem.row} ({problem.id})")
    return questions


def prepare(
    source: str,
    out: Path,
    *,
    name: str | None = None,
    against: Sequence[Path] = (),
    drop_overlap: bool = False,
    model: str | None = None,
    max_prompt_tokens: int = MAX_PROMPT_TOKENS,
    prompt: str = "qwen-boxed",
    verifier: Verifier | None = None,
) -> Path:
    """Write ``NAME.parquet`` in veRL's layout, ``NAME.card.json`` and ``NAME.card.md`` beside it; return the first.

    Args:
        source: a name of `HUB` or a local file.
        out: folder.
        name: data_source and file name; default: the source's. One that begins as in `EVALUATION_SETS` makes it an
            evaluation set, "aime" an AIME set.
        against: files whose questions must not be in this one, and which ``drop_overlap`` leaves out.
        drop_overlap: instead of refusing the file.
        model: whose tokenizer counts the rendered prompt's tokens; None: not counted, and the card says so.
        max_prompt_tokens: their limit.
        prompt: a style of PROMPTS.
        verifier: default: this process's of the default settings.
    """
    name = name or name_of(source)
    target = out / f"{name}.parquet"
    _check_target(source, name, target, prompt)
    if source in HUB:
        records, source_sha = read_hub(source)
        problems, layouts = to_problems(records, name)
    else:
        problems, layouts = to_problems(bar(iter_records(Path(source)), f"reading {Path(source).name}"), name)
        source_sha = file_sha256(Path(source))
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    checked = check_problems(
        problems,
        aime=plain.startswith("aime"),
        evaluation=plain.startswith(EVALUATION_SETS),
        against=held_out(against),
        drop_overlap=drop_overlap,
        count_tokens=_token_counter(model, prompt),
        max_prompt_tokens=max_prompt_tokens,
        verifier=verifier or shared_verifier(VerifierSettings()),
    )
    _check_left(checked, source, name, plain)
    kept = _with_own_ids(checked.kept)
    data = _to_parquet(kept, name, source_sha, prompt)
    levels = Counter("none" if p.level is None else str(p.level) for p in kept)
    subjects = Counter(p.subject or "none" for p in kept)
    card = {
        "name": name,
        "source": source if source in HUB else Path(source).name,
        "source_sha256": source_sha,
        "layout": "; ".join(f"{columns}: {count}" for columns, count in layouts.most_common()),
        "output": target.name,
        "output_sha256": sha256(data).hexdigest(),
        "rows_in_source": len(problems),
        "rows": len(kept),
        "prompt": prompt,
        "token_limit": f"{max_prompt_tokens} tokens of {Path(model).name}" if model else "not checked (no --model)",
        "checked_against": sorted(path.name for path in against),
        "by_level": dict(sorted(levels.items())),
        "by_subject": dict(sorted(subjects.items())),
        "dropped_by_reason": dict(Counter(finding.kind for finding in checked.dropped).most_common()),
        "dropped": _told(checked.dropped),
        "suspect_but_kept": _told(checked.suspect),
        "answers_compared_as_text": [p.row for p in checked.text_answers],
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / f"{name}.card.json", json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    template = Path(__file__).parent / "card.md.j2"
    told = filled(template, card=card, shown=_TEXTS_SHOWN, suspect=len(checked.suspect))
    write_atomic(out / f"{name}.card.md", told.rstrip() + "\n")
    # Last, so that a parquet file always has its card.
    write_atomic(target, data)
    return target


def _told(findings: Sequence[RowFinding]) -> list[dict[str, Any]]:
    return [{"row": f.row, "id": f.id, "reason": f.reason} for f in first_of_each_kind(findings, _CARD_SHOWN)]


def _check_target(source: str, name: str, target: Path, prompt: str) -> None:
    """Refuse what would be wrong however good the data are."""
    problems = []
    if prompt not in PROMPTS:
        problems.append(f"prompt is {prompt!r}; allowed: {', '.join(PROMPTS)}")
    if source not in HUB and not Path(source).is_file():
        problems.append(f"{source}: no such file; allowed: a file, or one of {', '.join(HUB)}")
    elif not name or "/" in name or name.startswith("."):
        problems.append(f"name is {name!r}; allowed: a file name that does not begin with a dot")
    if source not in HUB and target.resolve() == Path(source).resolve():
        problems.append(f"{target} is its own source; give another --name or --out")
    if problems:
        raise Refused(problems)


def _check_left(checked: Checked, source: str, name: str, plain: str) -> None:
    """Refuse a file for what its check found."""
    if checked.refused:
        raise Refused([f"{source}: {line}" for line in listed(checked.refused, _REFUSED_SHOWN)])
    rows = len(checked.kept)
    if not rows:
        reasons = Counter(finding.kind for finding in checked.dropped)
        why = "; ".join(f"{count} {kind}" for kind, count in reasons.most_common())
        raise Refused(f"{source}: no row is left of {len(checked.dropped)}: {why}")
    whole = next((size for pattern, size in _WHOLE if pattern.fullmatch(plain)), rows)
    if rows != whole:
        raise Refused(f"{source}: {rows} problems; {name} has {whole}. Name a part otherwise: --name {name}-part")


def _with_own_ids(problems: list[Row]) -> list[Row]:
    """Return the problems, an id that several share followed by a hash of the question."""
    count = Counter(problem.id for problem in problems)
    return [
        p if count[p.id] == 1 else p._replace(id=f"{p.id}-{sha256(p.question.encode()).hexdigest()[:8]}")
        for p in problems
    ]


def _token_counter(model: str | None, prompt: str) -> Callable[[Sequence[Row]], list[int]] | None:
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        return None

    def count(problems: Sequence[Row]) -> list[int]:
        texts = [render(messages(problem.question, prompt), tokenizer) for problem in problems]
        return list(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))

    return count


def _to_parquet(problems: list[Row], name: str, source_sha: str, prompt: str) -> bytes:
    buffer, index = io.BytesIO(), itertools.count()
    with pq.ParquetWriter(buffer, SCHEMA) as writer:
        for some in chunks(problems, "writing", _ROW_GROUP):
            rows = [
                verl_row(
                    name,
                    messages(p.question, prompt),
                    p.answer,
                    {**p._asdict(), "index": next(index), "source_sha256": source_sha},
                )
                for p in some
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
    return buffer.getvalue()


def verl_row(source: str, turns: list[dict[str, str]], answer: str, extra: dict[str, Any]) -> dict[str, Any]:
    """Return a problem as a row of SCHEMA."""
    judged = {"style": "rule", "ground_truth": answer}
    return {"data_source": source, "prompt": turns, "ability": "math", "reward_model": judged, "extra_info": extra}


def show(path: Path, *, model: str | None, rows: int, start: int) -> list[str]:
    """Return rendered prompts of a prepared file, each with its right answer."""
    tokenizer = load_tokenizer(model)
    shown = []
    for i, record in islice(enumerate(iter_records(path)), start, start + rows):
        if "prompt" not in record:
            raise Refused(f"{path}: not in veRL's layout; make it with `rapo data prepare {path}`")
        try:
            text = render(record["prompt"], tokenizer)
        except Refused as error:
            raise Refused(f"{path}, row {i}: {error}") from error
        count = f", {len(tokenizer(text, add_special_tokens=False)['input_ids'])} tokens" if tokenizer else ""
        extra, reward = (x if isinstance(x := record.get(key), dict) else {} for key in ("extra_info", "reward_model"))
        answer = reward.get("ground_truth")
        shown.append(f"--- row {i} ({extra.get('id') or 'no id'}{count}), answer {answer!r}\n{text}")
    if not shown:
        raise Refused(f"{path}: has no row {start}")
    return shown
