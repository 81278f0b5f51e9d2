"""From judged folders to a report."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rapo_verl.evaluation.score import score_path
from rapo_verl.evaluation.spec import PlanError
from rapo_verl.evaluation.store import Store, read_stated
from rapo_verl.report.responses import Responses, load
from rapo_verl.report.results import EvalResult
from rapo_verl.report.samples import samples_behind


def load_study(
    folders: Sequence[Path],
    hard_from: Path | None,
    *,
    names: Mapping[Path, str] | None = None,
    metas: Mapping[Path, Mapping[str, Any]] | None = None,
) -> tuple[list[EvalResult], EvalResult | None, dict[str, Responses]]:
    """Return the results of folders, the draw that chooses Hard under its model's name, and the responses.

    Args:
        folders: judged, one a model.
        hard_from: another draw of one of the models; the same weights, told by their sha256.
        names: of the models in the report; default: the folder's name.
        metas: added to a result's meta.

    Raises:
        PlanError: a folder is not judged, judged by another verifier than the others, or hard_from is of no model here.
    """
    loaded = {
        folder: load(
            Store.open(folder), (names or {}).get(folder, folder.resolve().name), dict((metas or {}).get(folder, {}))
        )
        for folder in folders
    }
    results = [result for result, _ in loaded.values()]
    judges = {folder: _judge(folder) for folder in [*folders, *([hard_from] if hard_from else [])]}
    if len(set(judges.values())) > 1:
        lines = [f"  {folder}: {judge}" for folder, judge in judges.items()]
        raise PlanError("\n".join(["folders were judged differently; run `rapo eval score` on all:", *lines]))
    chosen = None
    if hard_from is not None:
        chosen, _ = load(Store.open(hard_from), hard_from.name)
        same = [r.name for r in results if r.meta["model_sha256"] == chosen.meta["model_sha256"]]
        if not same:
            raise PlanError(
                f"--hard-from {hard_from}: its model ({chosen.meta['model_sha256'][:12]}) is none of the report's; "
                "give the folder of the base model as well"
            )
        chosen = replace(chosen, name=same[0])
    return results, chosen, {result.name: found for result, found in loaded.values()}


def _judge(folder: Path) -> str:
    basis = read_stated(score_path(Store.open(folder), 0))["basis"]
    return f"{basis['verifier'][:12]} {basis['strictness']}"


def study_samples(folders: Sequence[Path], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return what stands behind the coverage matrix: of each problem the question, the right answer, the samples.

    Args:
        folders: judged, on the same problems.
        names: of the models.
    """
    stores = [Store.open(folder) for folder in folders]
    cells = len(stores) * len(stores[0].problems)
    shown = [samples_behind(store, cells=cells) for store in stores]
    return [
        {
            "question": problem["messages"][-1]["content"],
            "gold": problem["gold"],
            "models": {name: samples[i] for name, samples in zip(names, shown)},
        }
        for i, problem in enumerate(stores[0].problems)
    ]


def study_settings(folders: Sequence[Path], names: Sequence[str], hard_from: Path | None) -> dict[str, str]:
    """Return what the report says of how each folder was made: model, data, sampling, seeds, versions, verifier."""
    settings = {}
    for folder, name in [*zip(folders, names), *([(hard_from, "Hard chosen on")] if hard_from else [])]:
        store = Store.open(folder)
        stated = {key: value for key, value in store.manifest.items() if key not in ("format", "notes", "seeds")}
        stated |= store.manifest["notes"] | {"folder": str(folder), "verifier": _judge(folder)}
        settings[name] = "\n".join(f"{key}: {value}" for key, value in stated.items())
    settings["seeds"] = Store.open(folders[0]).manifest["seeds"]
    return settings
