"""The file of a base model's own answers to the training problems: read, checked against a run, described.

Made by `rapo reference-answers`; read by the trainer (`rapo_verl.training.answers`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from omegaconf import DictConfig, OmegaConf

from rapo_verl import Refused
from rapo_verl.method.reference_answers import answer_shares, token_weights
from rapo_verl.plan.job import files_of
from rapo_verl.reward import VerifierSettings
from rapo_verl.run.export import model_sha256, resolve_model
from rapo_verl.run.files import file_sha256
from rapo_verl.run.inputs import OUR_REWARD, read_table, tokenizer_of

ANSWERS_FILE = "answers.parquet"
FORMAT = "rapo_verl.reference_answers/1"
_TOKENS = pa.large_list(pa.int32())
# A row for each problem: its prompt, its distinct answers as token ids with their ends, and how often each was given.
SCHEMA = pa.schema(
    [
        ("prompt", _TOKENS),
        ("right", pa.large_list(_TOKENS)),
        ("right_counts", _TOKENS),
        ("wrong", pa.large_list(_TOKENS)),
        ("wrong_counts", _TOKENS),
    ]
)
HOW = (
    "make them with `rapo eval generate --model BASE --data TRAIN.parquet --n 32 --token-ids --out FOLDER`, then `rapo "
    "reference-answers FOLDER`"
)


class AnswersOf(NamedTuple):
    """Distinct answers to one problem, their shares of the reference (`answer_shares`), and how many are too long."""

    tokens: list[np.ndarray]
    shares: torch.Tensor
    too_long: int


@dataclass(frozen=True)
class ReferenceAnswers:
    """A file of answers.

    Attributes:
        stated: where they come from: model, data and sampling.
        table: SCHEMA, without the wrong answers where they have no weight.
        limit: longest answer that is taken, in tokens.
        weight_of_wrong: omega of an answer that is not right.
    """

    stated: dict[str, Any]
    table: pa.Table
    limit: int
    weight_of_wrong: float

    @classmethod
    def read(cls, folder: str | Path, *, limit: int, weight_of_wrong: float = 0.0) -> "ReferenceAnswers":
        """Return the answers of a folder; Refused if there are none, or of another format."""
        path = Path(folder) / ANSWERS_FILE
        columns = [name for name in SCHEMA.names if weight_of_wrong > 0 or not name.startswith("wrong")]
        try:
            stated = json.loads((pq.read_metadata(path).metadata or {})[b"rapo"])
            table = pq.read_table(path, columns=columns)
        except (OSError, pa.ArrowException, KeyError, json.JSONDecodeError) as error:
            raise Refused(f"rapo.forward_kl.samples: no reference answers in {folder} ({error}); {HOW}") from error
        if stated.get("format") != FORMAT:
            raise Refused(f"{path}: the format must be {FORMAT!r}; got {stated.get('format')!r}; {HOW}")
        return cls(stated, table.combine_chunks(), limit, weight_of_wrong)

    @cached_property
    def row_of(self) -> dict[bytes, int]:
        """Row of each prompt, by `prompt_key`: no template or tokenizer but the one that made the prompt finds it."""
        return {prompt_key(prompt.values): row for row, prompt in enumerate(self.table["prompt"])}

    def of(self, row: int) -> AnswersOf:
        """Return the answers to one problem that have a weight and are no longer than the limit."""
        tokens, counts, right = [], [], []
        kinds = (("right", True), ("wrong", False)) if self.weight_of_wrong > 0 else (("right", True),)
        for name, is_right in kinds:
            answers = self.table[name][row].values
            tokens += [answers[i].values.to_numpy() for i in range(len(answers))]
            counts += self.table[f"{name}_counts"][row].as_py()
            right += [is_right] * len(answers)
        kept = [i for i, answer in enumerate(tokens) if 0 < len(answer) <= self.limit]
        shares = answer_shares(
            torch.tensor([counts[i] for i in kept]),
            torch.tensor([right[i] for i in kept], dtype=torch.bool),
            weight_of_wrong=self.weight_of_wrong,
        )
        return AnswersOf([tokens[i] for i in kept], shares, len(tokens) - len(kept))

    def describe(self) -> str:
        """Return one line: how many problems have answers, and how many answers are left out."""
        found = [self.of(row) for row in range(self.table.num_rows)]
        kind = "any" if self.weight_of_wrong > 0 else "right ones"
        return (
            f"reference answers: {sum(bool(f.tokens) for f in found)} of {len(found)} prompts have {kind}, "
            f"{sum(len(f.tokens) for f in found)} distinct from {self.stated['n']} samples a prompt; "
            f"{sum(f.too_long for f in found)} longer than {self.limit} tokens left out"
        )


def prompt_key(tokens: Any) -> bytes:
    """Return a prompt's token ids as a key."""
    return np.asarray(tokens, dtype=np.int32).tobytes()


def answers_of_run(config: DictConfig) -> ReferenceAnswers | None:
    """Return the answers that a run trains on, None for none."""
    kl = config.rapo.forward_kl
    if kl.samples_coef == 0:
        return None
    limit = int(config.data.max_response_length)
    return ReferenceAnswers.read(kl.samples, limit=limit, weight_of_wrong=kl.samples_weight_of_wrong)


def problems_of_answers(config: DictConfig) -> list[str]:
    """Return why a run must not train on its reference answers: another base, prompt, file or sampling."""
    kl = config.rapo.forward_kl
    if kl.samples_coef == 0:
        return []
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    mode, model = config.trainer.v1.trainer_mode, config.actor_rollout_ref.model.path
    found = []
    if not mode.startswith("rapo_"):
        found.append(f"rapo.forward_kl.samples_coef > 0 needs trainer.v1.trainer_mode=rapo_{mode}")
    try:
        token_weights(torch.ones(1), torch.ones(1), loss_agg_mode=actor.loss_agg_mode, horizon=actor.loss_scale_factor)
    except ValueError as error:
        found.append(f"rapo.forward_kl.samples_coef > 0 with actor_rollout_ref.actor.{error}")
    try:
        answers, base = answers_of_run(config), model_sha256(resolve_model(model))
    except Refused as error:
        return [*found, str(error)]
    assert answers is not None
    stated, strictness = answers.stated, _strictness(config)
    if strictness not in (None, stated["strictness"]):
        found.append(
            f"rapo.forward_kl.samples were judged with strictness {stated['strictness']}, the run's reward has "
            f"{strictness}; `rapo reference-answers {kl.samples} --strictness {strictness}`"
        )
    for name in ("temperature", "top_p"):
        if stated["sampling"][name] != rollout[name]:
            found.append(
                f"rapo.forward_kl.samples were drawn at {name} {stated['sampling'][name]}, the run samples at "
                f"{rollout[name]}: the reference would be another one; {HOW}, with --{name.replace('_', '-')}"
            )
    if rollout.top_k > 0:
        found.append(
            f"rapo.forward_kl.samples were drawn from all tokens, the run samples from {rollout.top_k}: the reference "
            "would be another one; set actor_rollout_ref.rollout.top_k=-1"
        )
    if stated["model_sha256"] != base:
        found.append(
            f"rapo.forward_kl.samples {kl.samples} are another base's ({stated['model']}) than actor_rollout_ref.model."
            f"path {model}: its weights, tokenizer or chat template differ; {HOW}"
        )
    files = files_of(config, "train_files")
    if sorted(file_sha256(file) for file in files if file.is_file()) != sorted(stated["data_sha256"].values()):
        found.append(f"rapo.forward_kl.samples {kl.samples} answer another file than data.train_files; {HOW}")
    return found or _unknown_prompts(config, answers, files)


def _strictness(config: DictConfig) -> str | None:
    """Return how the run's reward compares answers, None if it is not ours."""
    reward = config.reward.custom_reward_function
    if reward.path != OUR_REWARD:
        return None
    given = (reward.get("reward_kwargs") or {}).get("verifier") or {}
    integer = reward.name == "compute_integer_score"
    return "integer" if integer else given.get("strictness", VerifierSettings().strictness)


def _unknown_prompts(config: DictConfig, answers: ReferenceAnswers, files: Sequence[Path]) -> list[str]:
    """Return whether any training prompt, rendered as veRL does, is none of those that were answered."""
    tokenizer = tokenizer_of(config.actor_rollout_ref.model)
    options: Any = OmegaConf.to_container(config.data.get("apply_chat_template_kwargs") or OmegaConf.create({}))
    chats = [chat for file in files for chat in read_table(file, [config.data.prompt_key])[0].to_pylist()]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True, **options)
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    unknown = sum(prompt_key(prompt) not in answers.row_of for prompt in prompts)
    if not unknown:
        return []
    return [
        f"{unknown} of {len(prompts)} prompts of data.train_files, with this run's chat template, are not among those "
        "that rapo.forward_kl.samples answer (or were left out with --limit)"
    ]
