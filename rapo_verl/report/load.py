"""From judged folders to a study: counts, how each folder was made, and the samples behind each count."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rapo_verl.evaluation.score import score_path
from rapo_verl.evaluation.spec import PlanError
from rapo_verl.evaluation.store import MANIFEST_FILE, Store, read_stated
from rapo_verl.report.responses import read_responses, samples_behind
from rapo_verl.report.study import EvalResult, Study


def load_result(store: Store, name: str, role: str = "") -> EvalResult:
    """Return the counts of a judged folder and what its responses look like.

    Raises:
        PlanError: a problem is not judged, or by another verifier than the first.
    """
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
        correct=tuple(responses.verdicts["correct"].tolist()),
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
    """Return the study of judged folders, with the samples behind each count and how each folder was made.

    Args:
        folders: judged, one a model.
        hard_from: another draw of one of the models; the same weights, told by their sha256.
        names: of the models in the report; default: the folder's name, or its path where two are called alike.
        roles: of the models; default: told from the name.
        settings: what the page says first of how the study was made.
        options: further fields of `Study`.

    Raises:
        Refused: a folder is not judged, judged by another verifier than the others, hard_from is of no model here, or
            the results may not be compared.
    """
    last = [folder.resolve().name for folder in folders]
    names = names or [str(f) if last.count(short) > 1 else short for f, short in zip(folders, last)]
    stores = [Store.open(folder) for folder in folders]
    results = tuple(load_result(*one) for one in zip(stores, names, roles or [""] * len(stores)))
    judges = {folder: _judge(Store.open(folder)) for folder in [*folders, *([hard_from] if hard_from else [])]}
    if len(set(judges.values())) > 1:
        lines = [f"  {folder}: {judge}" for folder, judge in judges.items()]
        raise PlanError("\n".join(["folders were judged differently; run `rapo eval score` on all:", *lines]))
    chosen, beside = None, []
    if hard_from is not None:
        beside = [("Hard chosen on", Store.open(hard_from))]
        chosen = load_result(beside[0][1], hard_from.name)
        same = [r.name for r in results if r.meta["model_sha256"] == chosen.meta["model_sha256"]]
        if not same:
            raise PlanError(
                f"--hard-from {hard_from}: its model ({chosen.meta['model_sha256'][:12]}) is none of the report's; "
                "give the folder of the base model as well"
            )
        chosen = replace(chosen, name=same[0])
    made = {name: _settings(store) for name, store in [*zip(names, stores), *beside]}
    made["seeds"] = stores[0].manifest["seeds"]
    study = Study(results, chosen, settings={**(settings or {}), **made}, **options)
    return replace(study, samples=_samples(stores, names))


def _judge(store: Store) -> str:
    basis = read_stated(score_path(store, 0))["basis"]
    return f"{basis['verifier'][:12]} {basis['strictness']}"


def _settings(store: Store) -> str:
    stated = {key: value for key, value in store.manifest.items() if key not in ("format", "notes", "seeds")}
    stated |= store.manifest["notes"] | {"folder": str(store.folder), "verifier": _judge(store)}
    return "\n".join(f"{key}: {value}" for key, value in stated.items())


def _samples(stores: Sequence[Store], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return what stands behind the coverage matrix: of each problem the question, the right answer, the samples."""
    shown = [samples_behind(store, cells=len(stores) * len(stores[0].problems)) for store in stores]
    return [
        {
            "question": problem["messages"][-1]["content"],
            "gold": problem["gold"],
            "models": {name: samples[i] for name, samples in zip(names, shown)},
        }
        for i, problem in enumerate(stores[0].problems)
    ]
