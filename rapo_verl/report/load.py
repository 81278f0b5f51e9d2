"""From judged folders to a study: counts, how each folder was made, and the samples behind each count."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rapo_verl import Refused
from rapo_verl.evaluation.score import score_path
from rapo_verl.evaluation.store import MANIFEST_FILE, Store, read_stated
from rapo_verl.report.responses import read_responses, samples_behind
from rapo_verl.report.study import EvalResult, Study


def load_result(store: Store, name: str, role: str = "") -> EvalResult:
    """Return the counts of a judged folder and what its responses look like."""
    responses = read_responses(store)
    manifest, problems = store.manifest, store.problems
    sampling = {key: manifest["sampling"][key] for key in ("temperature", "top_p", "max_tokens")}
    system = sorted({turn["content"] for p in problems for turn in p["messages"] if turn["role"] == "system"})
    made = datetime.date.fromtimestamp((store.folder / MANIFEST_FILE).stat().st_mtime).isoformat()
    return EvalResult(
        name=name,
        n=manifest["n"],
        ids=tuple(problem["id"] for problem in problems),
        groups=tuple(problem["group"] for problem in problems),
        sources=tuple(problem["source"] for problem in problems),
        asked=tuple((problem["messages"][-1]["content"], problem["gold"]) for problem in problems),
        correct=tuple(responses.problems["correct"].tolist()),
        draw=manifest["draw"],
        role=role,
        protocol=sampling | {"system prompt": "; ".join(system) or "none"},
        meta={
            "model": str(manifest["notes"].get("model", "not noted")),
            "model_sha256": manifest["model_sha256"],
            "manifest_sha256": manifest["sha256"],
            "data": ", ".join(manifest["data_sha256"]),
            "date": str(manifest["notes"].get("date", made)),
        },
        responses=responses,
    )


def load_study(
    folders: Sequence[Path],
    hard_from: Path | None = None,
    *,
    names: Sequence[str] | None = None,
    roles: Sequence[str] | None = None,
    settings: Mapping[str, str] | None = None,
    **options: Any,
) -> Study:
    """Return the study of judged folders, one a model, with the samples behind each count and how each was made.

    A model is called as its folder, or by its path where two are called alike, and has the role that its name tells.
    ``hard_from`` is another draw of one of them: of the same weights, by their sha256. Options are fields of `Study`.
    """
    last = [folder.resolve().name for folder in folders]
    names = names or [str(f) if last.count(short) > 1 else short for f, short in zip(folders, last)]
    stores = [Store.open(folder) for folder in folders]
    results = tuple(load_result(*one) for one in zip(stores, names, roles or [""] * len(stores)))
    chosen, every = None, [*zip(names, stores)]
    if hard_from is not None:
        every.append(("Hard chosen on", Store.open(hard_from)))
        chosen = load_result(every[-1][1], hard_from.name)
        same = [r.name for r in results if r.meta["model_sha256"] == chosen.meta["model_sha256"]]
        if not same:
            raise Refused(
                f"--hard-from {hard_from}: its model ({chosen.meta['model_sha256'][:12]}) is none of the report's; "
                "give the folder of the base model as well"
            )
        chosen = replace(chosen, name=same[0])
    if len({_judge(store) for _, store in every}) > 1:
        lines = [f"  {store.folder}: {_judge(store)}" for _, store in every]
        raise Refused("\n".join(["folders were judged differently; run `rapo eval score` on all:", *lines]))
    made = {name: _settings(store) for name, store in every} | {"seeds": stores[0].manifest["seeds"]}
    study = Study(results, chosen, settings={**(settings or {}), **made}, **options)
    shown = [samples_behind(store, cells=len(stores) * len(study.base.ids)) for store in stores]
    samples = [
        {"question": question, "gold": gold, "models": {name: model[i] for name, model in zip(names, shown)}}
        for i, (question, gold) in enumerate(study.base.asked)
    ]
    return replace(study, samples=samples)


def _judge(store: Store) -> str:
    basis = read_stated(score_path(store, 0))["basis"]
    return f"{basis['verifier'][:12]} {basis['strictness']}, {basis['deadline_s']:g} s, {basis['memory_mb']} MiB"


def _settings(store: Store) -> str:
    stated = {key: value for key, value in store.manifest.items() if key not in ("format", "notes", "seeds")}
    stated |= store.manifest["notes"] | {"folder": str(store.folder), "verifier": _judge(store)}
    return "\n".join(f"{key}: {value}" for key, value in stated.items())
