"""Reference answers in a run: what file is taken, which rows join a batch, and what they add to."""

import json
from functools import partial

import pyarrow.parquet as pq
import pytest
import torch
from reference_answers import PROBLEMS, write_answers
from tensordict import TensorDict
from test_policy_loss import ALL, Batch, actor_config, rapo_config
from test_runs import comparable, train
from transfer_queue import KVBatchMeta
from transformers import AutoTokenizer, Qwen2ForCausalLM
from typer.testing import CliRunner
from verl.utils.metric import Metric
from verl.workers.utils.losses import ppo_loss

from rapo_verl import Refused
from rapo_verl.cli import app
from rapo_verl.evaluation.store import Store
from rapo_verl.run.compose import compose_config
from rapo_verl.run.reference_answers import ReferenceAnswers, problems_of_answers, prompt_key
from rapo_verl.training.answers import ROWS, WEIGHT, _interleaved, _row_like, with_reference_answers
from rapo_verl.training.loss import rapo_policy_loss


@pytest.fixture(scope="module")
def written(toy_dir, tmp_path_factory):
    return write_answers(toy_dir, tmp_path_factory.mktemp("reference") / "here")


def settings(train_file, folder, *more):
    return [f"data.train_files={train_file}", f"rapo.forward_kl.samples={folder}", *more]


def config_of(toy_dir, written, *more):
    return compose_config(["experiment=toy_rapo_answers_cpu", f"toy_dir={toy_dir}", *settings(*written, *more)])


def test_file_holds_distinct_answers_with_counts_and_leaves_out_what_is_too_long(written, toy_dir):
    answers = ReferenceAnswers.read(written[1], limit=24)
    found = [answers.of(row) for row in range(PROBLEMS)]
    assert [len(f.tokens) for f in found] == [0, 1, *[3] * (PROBLEMS - 3), 2]
    assert found[1].shares.tolist() == [1.0] and found[2].shares.tolist() == [0.25, 0.5, 0.25]
    assert found[-1].too_long == 1 and found[-1].shares.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert f"{PROBLEMS - 1} of {PROBLEMS} prompts have right ones" in answers.describe()
    assert "1 longer than 24 tokens left out" in answers.describe()
    tokenizer = AutoTokenizer.from_pretrained(toy_dir / "model")
    prompt = pq.read_table(written[0], columns=["prompt"])["prompt"][2].as_py()
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert answers.row_of[prompt_key(tokenizer(text, add_special_tokens=False)["input_ids"])] == 2
    assert tokenizer.decode(found[2].tokens[0].tolist()).endswith(f"}}{tokenizer.eos_token}")
    # With a weight for wrong answers, the first prompt has some: three distinct ones of four.
    every = ReferenceAnswers.read(written[1], limit=24, weight_of_wrong=1.0).of(0)
    assert sorted(every.shares.tolist()) == [0.25, 0.25, 0.5]


def test_run_takes_its_own_bases_answers_and_no_others(toy_dir, written, tmp_path):
    assert problems_of_answers(config_of(toy_dir, written)) == []
    other = tmp_path / "model"
    other.mkdir()
    for file in (toy_dir / "model").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 3.0}))
    for changes, said in (
        ([f"actor_rollout_ref.model.path={other}"], "another base's"),
        ([f"data.train_files={toy_dir / 'train.parquet'}"], "another file"),
        (["actor_rollout_ref.rollout.top_k=50"], "the run samples from 50"),
        (["data.train_files=/no/such.parquet"], "another file"),
        (["actor_rollout_ref.rollout.temperature=0.7"], "temperature 1.0, the run samples at 0.7"),
        (["actor_rollout_ref.model.custom_chat_template='{{ messages[0].content }}x'"], "chat template"),
        (["reward.custom_reward_function.name=compute_score"], "judged with strictness integer"),
        (["actor_rollout_ref.actor.loss_agg_mode=token-sum"], "no mean"),
        (["trainer.v1.trainer_mode=sync"], "trainer_mode=rapo_sync"),
        ([f"rapo.forward_kl.samples={tmp_path}"], "rapo reference-answers FOLDER"),
    ):
        found = problems_of_answers(config_of(toy_dir, written, *changes))
        assert any(said in line for line in found), (changes, found)
    # A run of the same problems in a file of another form is told by its sums, not by an exception of the reader.
    lines = tmp_path / "train.jsonl"
    lines.write_text("\n".join(map(json.dumps, pq.read_table(written[0]).to_pylist())))
    (problem,) = problems_of_answers(config_of(toy_dir, written, f"data.train_files={lines}"))
    assert "another file" in problem
    assert (
        problems_of_answers(
            config_of(toy_dir, written, "rapo.forward_kl.samples_coef=0", f"data.train_files={tmp_path}")
        )
        == []
    )


def test_command_judges_and_writes_and_refuses_samples_without_tokens(toy_dir, written, tmp_path):
    done = CliRunner().invoke(app, ["reference-answers", str(written[1]), "--strictness", "integer"])
    assert done.exit_code == 0 and "prompts have right ones" in done.output, done.output
    _, bare = write_answers(toy_dir, tmp_path / "bare", token_ids=False)
    done = CliRunner().invoke(app, ["reference-answers", str(bare), "--strictness", "integer"])
    assert done.exit_code == 2 and "--token-ids" in done.output
    with pytest.raises(Refused, match="rapo reference-answers"):
        ReferenceAnswers.read(bare, limit=24)
    assert "token_ids" in Store.open(written[1]).manifest["sampling"]


def test_a_row_has_every_field_in_the_answers_length():
    template = TensorDict(
        {
            "input_ids": torch.arange(9), "position_ids": torch.arange(9), "responses": torch.arange(5),
            "advantages": torch.ones(5), "rapo_ids": torch.ones(5, 2, dtype=torch.int32), "phi": torch.tensor(0.9),
            "log_probs": torch.ones(9), "response_mask": torch.ones(5, dtype=torch.int64),
        }, batch_size=[],
    )  # fmt: skip
    row = _row_like(template, torch.tensor([7, 8]), torch.tensor([1, 2, 3]))
    assert row["input_ids"].tolist() == [7, 8, 1, 2, 3] and row["position_ids"].tolist() == [0, 1, 2, 3, 4]
    assert row["responses"].tolist() == [1, 2, 3] and row["prompts"].tolist() == [7, 8]
    assert row["advantages"].tolist() == row["response_mask"].tolist() == [0, 0, 0]
    assert row["rapo_ids"].shape == (3, 2) and row["rapo_ids"].dtype == torch.int32
    assert row["log_probs"].shape == (5,) and row["phi"] == torch.tensor(0.9)


def test_every_rank_and_mini_batch_gets_as_many_answers_spread_over_it():
    batch = KVBatchMeta(
        keys=[f"r{i}" for i in range(8)], tags=[{} for _ in range(8)], partition_id="train", fields=["x"]
    )
    mixed = _interleaved(batch, [f"a{i}" for i in range(4)], [{"is_padding": True}] * 4, 2, rows=4)
    assert mixed.keys == ["r0", "a0", "r1", "r2", "a1", "r3", "r4", "a2", "r5", "r6", "a3", "r7"]
    assert [bool(tag) for tag in mixed.tags] == [key[0] == "a" for key in mixed.keys]
    assert mixed.fields == ["x", WEIGHT] and mixed.extra_info == {ROWS: 4} and batch.extra_info != mixed.extra_info


@pytest.mark.parametrize("alone", [True, False], ids=["beside GRPO", "beside RAPO"])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_answers_add_their_term_and_change_nothing_else(alone, mode):
    # Rows 1 and 4 are answers: an empty response mask and a weight. The others' loss must be that without them.
    batch, weights = Batch(masked_rows=(1, 4)), torch.tensor([0.0, 0.5, 0.0, 0.0, 0.125])
    actor = actor_config(loss_agg_mode=mode, entropy_coeff=0.05)
    plain = partial(ppo_loss, config=actor) if alone else partial(rapo_policy_loss, config=actor, rapo=rapo_config())
    output, data = batch.micro(ALL)
    want, _ = plain(model_output=output, data=data)
    want.backward()
    without = batch.gradients()
    output, data = batch.micro(ALL)
    bare, metrics = with_reference_answers(output, data, policy_loss=plain, coef=2.0)
    assert torch.equal(bare, want) and "rapo/reference_answers/loss" not in metrics
    data[WEIGHT] = weights
    loss, metrics = with_reference_answers(output, data, policy_loss=plain, coef=2.0)
    loss.backward()
    term = -0.5 * batch.log_probs[1][0:2].sum() - 0.125 * batch.log_probs[4][1:5].sum()
    torch.testing.assert_close(loss, want + 2.0 * term)
    found = metrics["rapo/reference_answers/loss"]
    assert isinstance(found, Metric) and found.aggregate() == pytest.approx(float(term.detach()))
    got = batch.gradients()
    for row in (0, 2, 3):
        assert torch.equal(got[row], without[row])
    assert got[1].tolist() == [-1.0, -1.0, 0.0] and got[4].tolist() == [0.0, -0.25, -0.25, -0.25, -0.25, 0.0]


def test_split_over_ranks_and_micro_batches_gives_the_same_gradient():
    batch, weights = Batch(masked_rows=(1, 4)), torch.tensor([0.0, 0.5, 0.0, 0.0, 0.125])
    plain = partial(ppo_loss, config=actor_config())

    def gradients(parts, dp_size):
        for rows in parts:
            output, data = batch.micro(rows, dp_size=dp_size)
            data[WEIGHT] = weights[list(rows)]
            loss, _ = with_reference_answers(output, data, policy_loss=plain, coef=1.0)
            (loss / dp_size).backward()  # what averaging over ranks does
        return batch.gradients()

    whole = gradients([ALL], 1)
    for parts, dp_size in (([[0, 1], [2, 3, 4]], 1), ([[4, 2], [3, 1, 0]], 2)):
        for a, b in zip(whole, gradients(parts, dp_size)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_real_run_learns_from_the_answers_and_counts_them_nowhere(toy_dir, written, tmp_path):
    # One learning rate of zero, so that both steps' update is at the base; every step has all problems.
    still = ["actor_rollout_ref.actor.optim.lr=0", "rapo.forward_kl.samples_per_prompt=4"]
    runs = {}
    for name, coef in (("on", 1.0), ("off", 0.0)):
        more = settings(*written, f"rapo.forward_kl.samples_coef={coef}", *still)
        code, output = train(toy_dir, tmp_path / name, "toy_rapo_answers_cpu", 2, *more)
        assert code == 0, output[-4000:]
        runs[name] = comparable(tmp_path / name)
    answers = ReferenceAnswers.read(written[1], limit=24)
    model = Qwen2ForCausalLM.from_pretrained(toy_dir / "model").eval()
    means = [token_mean(model, answers, row) for row in range(PROBLEMS)]
    for on, off in zip(runs["on"], runs["off"]):
        assert on["rapo/reference_answers/prompts_with_any"] == PROBLEMS - 1
        assert on["rapo/reference_answers/rows"] == 1 + 3 * (PROBLEMS - 3) + 2
        # The mean over all prompts of the answers' mean over tokens, by a plain forward pass.
        assert on["rapo/reference_answers/loss"] == pytest.approx(sum(means) / PROBLEMS, rel=1e-4)
        for key in off:
            if not key.startswith(("actor/grad_norm", "actor/loss", "actor/pg_clipfrac", "actor/ppo_kl")):
                assert on[key] == pytest.approx(off[key], rel=1e-4, abs=1e-6), key  # fp32 sums over other micro-batches
        assert on["actor/grad_norm"] != off["actor/grad_norm"]


def token_mean(model, answers, row):
    tokens, shares, _ = answers.of(row)
    prompt = torch.tensor(answers.table["prompt"][row].as_py())
    total = length = 0.0
    for answer, share in zip(tokens, shares.tolist()):
        whole = torch.cat([prompt, torch.tensor(answer).long()])
        with torch.no_grad():
            logits = model(whole[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total -= share * float(logits.gather(1, whole[len(prompt) :, None]).sum())
        length += share * len(answer)
    return total / length if length else 0.0
