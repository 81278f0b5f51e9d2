"""Reference answers in a training step: rows that join a batch for the update alone, and the term they bring.

veRL has made every pass, advantage and statistic of a step when it updates the actor. Just before, answers to the
step's problems enter its queue as rows that veRL itself sees as padding (an empty response mask: no
surrogate, no entropy, no KL, no token of a normaliser) and that carry one number more, the weight of -log pi of each of
their tokens. They leave after the update, so that no metric counts them. docs/reference-answers.md argues it.
"""

import math
import uuid
from collections.abc import Callable
from typing import Any

import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import build_padding_position_ids
from verl.utils.metric import AggregationType, Metric
from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.utils.padding import no_padding_2_padding

from rapo_verl.method.reference_answers import drawn_shares, reference_answers_loss, token_weights
from rapo_verl.run.reference_answers import ReferenceAnswers, prompt_key
from rapo_verl.run.seeds import sampling_seed

# The weight of -log pi of each of a row's tokens, shape (batch,); zero for the rollout's rows.
WEIGHT = "rapo_answer_weight"
# Rows that each mini-batch is larger for them, over all ranks.
ROWS = "rapo_answer_rows"
METRICS = "rapo/reference_answers/"


def with_reference_answers(
    model_output: dict, data: TensorDict, dp_group: Any = None, *, policy_loss: Callable, coef: float
) -> tuple[torch.Tensor, dict]:
    """Return a policy loss plus ``coef`` times the answers' term, in the signature that veRL's engines call."""
    loss, metrics = policy_loss(model_output=model_output, data=data, dp_group=dp_group)
    if WEIGHT not in data:
        return loss, metrics
    log_prob = no_padding_2_padding(model_output["log_probs"], data)
    lengths = data["responses"].offsets().diff()
    mask = torch.arange(log_prob.shape[1], device=lengths.device) < lengths[:, None]
    # Ranks' gradients are averaged; a rank holds its share of the sum over answers.
    term = reference_answers_loss(log_prob, mask, data[WEIGHT]) * data["dp_size"]
    return loss + coef * term, metrics | {f"{METRICS}loss": Metric(AggregationType.SUM, term)}


class AnswerRows:
    """Adds the answers to a step's problems to its batch."""

    def __init__(self, answers: ReferenceAnswers, config: DictConfig):
        self.answers = answers
        self._k = config.rapo.forward_kl.samples_per_prompt
        self._actor, self._rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout

    def added(self, batch: KVBatchMeta, step: int, *, dp_size: int) -> tuple[KVBatchMeta, dict[str, float]]:
        """Return the batch with answers to its problems in the queue, and metrics; the batch itself if there are none.

        Args:
            batch: rows laid out for the ranks, each rank's mini-batches one after another.
            step: of the trainer; the same step draws the same answers.
            dp_size: data-parallel ranks.
        """
        prompts = self._prompts_of(batch)
        mini_batches = len(batch) // (self._actor.ppo_mini_batch_size * self._rollout.n)
        rows, answered = self._draw(prompts, step, per_prompt=mini_batches / len(prompts))
        metrics = {f"{METRICS}prompts_with_any": float(answered), f"{METRICS}rows": float(len(rows))}
        if not rows:
            return batch, metrics
        slots = dp_size * mini_batches
        each = math.ceil(len(rows) / slots)
        if not self._actor.use_dynamic_bsz:
            micro = self._actor.ppo_micro_batch_size_per_gpu
            each = math.ceil(each / micro) * micro
        # Rows of no weight fill the mini-batches up; the shortest thing there is.
        rows += [(prompts[0][:1], prompts[0][:1], 0.0)] * (each * slots - len(rows))
        lengths = [len(prompt) + len(answer) for prompt, answer, _ in rows]
        parts = get_seqlen_balanced_partitions(lengths, k_partitions=slots, equal_size=True)
        keys, tags = self._put(batch, [rows[i] for part in parts for i in part])
        return _interleaved(batch, keys, tags, slots, rows=each * dp_size), metrics

    def _prompts_of(self, batch: KVBatchMeta) -> list[torch.Tensor]:
        """Return the prompt of each of the batch's problems, in an order that a resumed run repeats."""
        first: dict[str, str] = {}
        for key, tag in zip(batch.keys, batch.tags):
            if not tag.get("is_padding"):
                first.setdefault(key.split("_")[0], key)
        data = tq.kv_batch_get(
            keys=list(first.values()), partition_id=batch.partition_id, select_fields=["prompts", "index"]
        )
        order = sorted(range(len(first)), key=lambda i: int(data["index"][i]))
        prompts = data["prompts"].unbind()  # indexing a nested tensor splits it whole each time
        return [prompts[i] for i in order]

    def _draw(self, prompts: list[torch.Tensor], step: int, *, per_prompt: float) -> tuple[list, int]:
        """Return (prompt, answer, weight) of each answer drawn, and how many prompts have any."""
        rows, answered = [], 0
        for prompt in prompts:
            row = self.answers.row_of.get(prompt_key(prompt))
            if row is None:
                raise RuntimeError(
                    f"the reference was never asked the prompt {prompt.tolist()[:16]}... of this step; its file of "
                    "answers was made with another chat template, or with --limit"
                )
            found = self.answers.of(row)
            uniform = sampling_seed("reference answers", int(self._rollout.seed), step, row) / 2**62
            shares = drawn_shares(found.shares, self._k, uniform)
            weights = per_prompt * token_weights(
                shares,
                torch.tensor([len(answer) for answer in found.tokens]),
                loss_agg_mode=self._actor.loss_agg_mode,
                horizon=self._actor.loss_scale_factor,
            )
            taken = shares.nonzero().flatten().tolist()
            answered += bool(taken)
            rows += [(prompt, torch.tensor(found.tokens[i]).long(), float(weights[i])) for i in taken]
        return rows, answered

    def _put(self, batch: KVBatchMeta, rows: list) -> tuple[list[str], list[dict]]:
        """Put rows into the queue beside the batch's, and the weight 0 on those; return the rows' keys and tags."""
        # The longest response, so that a field of one number a row is not taken for one of a number a token.
        source = max(range(len(batch)), key=lambda i: batch.tags[i]["response_len"])
        template = tq.kv_batch_get(
            keys=[batch.keys[source]], partition_id=batch.partition_id, select_fields=batch.fields
        )[0]
        samples, tags = [], []
        for prompt, answer, weight in rows:
            samples.append(_row_like(template, prompt, answer) | {WEIGHT: torch.tensor(weight, dtype=torch.float32)})
            lengths = {"prompt_len": len(prompt), "response_len": len(answer), "seq_len": len(prompt) + len(answer)}
            tags.append({**batch.tags[source], **lengths, "is_padding": True})
        name = f"answer{uuid.uuid4().hex}"
        keys = [f"{name}_{i}_0" for i in range(len(rows))]
        zeros = TensorDict({WEIGHT: torch.zeros(len(batch))}, batch_size=len(batch))
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=zeros)
        fields = list_of_dict_to_tensordict(samples)
        tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=fields, tags=tags)
        return keys, tags


def _row_like(template: TensorDict, prompt: torch.Tensor, answer: torch.Tensor) -> dict[str, Any]:
    """Return a row with all fields of another one: the answer's tokens, and zero for what was said of the other's."""
    lengths = {len(template["input_ids"]): len(prompt) + len(answer), len(template["responses"]): len(answer)}
    row: dict[str, Any] = {}
    for name, value in template.items():
        per_token = isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) in lengths
        row[name] = value.new_zeros(lengths[len(value)], *value.shape[1:]) if per_token else value
    input_ids = torch.cat([prompt, answer])
    position_ids = build_padding_position_ids(template["position_ids"], torch.ones_like(input_ids))
    return row | {"prompts": prompt, "responses": answer, "input_ids": input_ids, "position_ids": position_ids}


def _interleaved(batch: KVBatchMeta, keys: list[str], tags: list[dict], slots: int, *, rows: int) -> KVBatchMeta:
    """Return a batch whose mini-batches, on every rank, each hold an equal part of the added rows, spread evenly."""
    own, more = len(batch) // slots, len(keys) // slots
    chosen: list[int] = []
    for slot in range(slots):
        places = [((i + 0.5) / own, slot * own + i) for i in range(own)]
        places += [((i + 0.5) / more, len(batch) + slot * more + i) for i in range(more)]
        chosen += [i for _, i in sorted(places)]
    both_keys, both_tags = [*batch.keys, *keys], [*batch.tags, *tags]
    return KVBatchMeta(
        keys=[both_keys[i] for i in chosen],
        tags=[both_tags[i] for i in chosen],
        partition_id=batch.partition_id,
        fields=[*(batch.fields or []), WEIGHT] if batch.fields else None,
        extra_info={**batch.extra_info, ROWS: rows},
    )
