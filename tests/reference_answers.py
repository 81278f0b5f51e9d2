"""A folder of reference answers written by hand: the toy's base hardly gives a right one."""

import pyarrow.parquet as pq

from rapo_verl.evaluation.collect import collect_answers
from rapo_verl.evaluation.score import score
from rapo_verl.evaluation.session import read_plan
from rapo_verl.evaluation.spec import Sampling
from rapo_verl.evaluation.store import Samples, Store
from rapo_verl.reward import VerifierSettings

PROBLEMS = 8


def right_answer(gold, letter):
    return f"a{gold[:3]}{letter}{gold[3:]}\\boxed{{{gold}}}"


def write_answers(toy_dir, folder, *, token_ids=True):
    """Write a training file of the toy's first problems and the base's answers to it; return both paths.

    The first problem has no right answer, the second the same one four times, the others up to three distinct ones; one
    of the last problem's is too long.
    """
    from transformers import AutoTokenizer

    folder.mkdir()
    train = folder / "train.parquet"
    pq.write_table(pq.read_table(toy_dir / "train.parquet").slice(0, PROBLEMS), train)
    plan = read_plan(str(toy_dir / "model"), [train], Sampling(max_tokens=24, token_ids=token_ids), n=4, shard=4)
    store = Store.create(folder / "answers", plan)
    tokenizer = AutoTokenizer.from_pretrained(toy_dir / "model")
    for shard in plan.shards:
        gold = plan.problems[shard.problem].gold
        texts = [right_answer(gold, letter) for letter in "abbc"]
        if shard.problem == 0:
            texts = ["a123b456", "none", "none", "z"]
        if shard.problem == 1:
            texts = [right_answer(gold, "d")] * 4
        if shard.problem == PROBLEMS - 1:
            texts[0] = "a" * 30 + texts[0]
        ids = [[*tokenizer(t, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for t in texts]
        kept = ids if token_ids else None
        store.write(shard, Samples([len(i) for i in ids], ["stop"] * 4, [None] * 4, texts, kept))
    score(store, VerifierSettings(strictness="integer", workers=1), jobs=1)
    if token_ids:
        collect_answers(store)
    return train, folder / "answers"
