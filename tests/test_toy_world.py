"""The toy world: its problems and corpus, the base model's files, and exact success probabilities."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rapo_verl.run import files
from rapo_verl.toy import base_model, exact, make, world
from rapo_verl.toy.world import World

COUNT = 240


@pytest.fixture(scope="module")
def toy() -> World:
    return World(0)


@pytest.fixture(scope="module")
def corpus_plans(toy: World) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Family, mode and plan of a large corpus sample."""
    family, mode, _, plan, _ = toy.corpus_arrays(600_000, seed=5)
    return family, mode, plan


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "untrained"
    tokenizer = base_model.build_tokenizer()
    base_model.save_checkpoint(base_model.build_model(tokenizer, seed=0), tokenizer, out)
    return out


def boxed(solution: str) -> int:
    return int(re.fullmatch(r".*\\boxed\{(\d+)\}", solution).group(1))


def operands(question: str) -> str:
    return question[3:]


def test_splits_share_no_operands(toy: World) -> None:
    train = {operands(p.question) for p in toy.problems("train", 3000, 0)}
    shown = {operands(question) for question, _ in toy.corpus(3000, 0)}
    held_out = {operands(p.question) for p in toy.problems("eval", 3000, 0)}
    assert not held_out & (train | shown)


def test_problems_are_deterministic_and_differ_by_seed(toy: World) -> None:
    assert toy.problems("train", COUNT, 3) == World(0).problems("train", COUNT, 3)
    assert toy.corpus(COUNT, 3) == World(0).corpus(COUNT, 3)
    assert toy.problems("train", COUNT, 3) != toy.problems("train", COUNT, 4)
    assert toy.problems("train", COUNT, 3) != World(1).problems("train", COUNT, 3)
    ids = [p.id for p in toy.problems("train", COUNT, 3)]
    assert len(set(ids)) == COUNT


def test_unknown_split_is_refused(toy: World) -> None:
    with pytest.raises(ValueError, match=r"test.*allowed"):
        toy.problems("test", 1, 0)  # type: ignore[arg-type]


def test_right_solutions_are_64_distinct_texts_with_the_right_answer(toy: World) -> None:
    for problem in toy.problems("eval", 24, 0):
        solutions = toy.right_solutions(problem)
        assert len(set(solutions)) == 64
        assert {boxed(solution) for solution in solutions} == {int(problem.answer)}
        assert problem.answer == str(int(problem.answer))
        assert len({len(solution) for solution in solutions}) == 1


def test_answer_follows_from_the_hidden_plan(toy: World) -> None:
    for problem in toy.problems("eval", 24, 0):
        x = [int(c) for c in problem.question if c.isdigit()]
        p, q = divmod(problem.plan, 8)
        digits = [toy.tables[p][d - 1] for d in x[:3]] + [toy.tables[q][d - 1] for d in x[3:]]
        assert problem.answer == "".join(map(str, digits))


def test_easy_and_rare_plans_follow_from_family_and_mode_latent_ones_do_not(toy: World) -> None:
    seen: dict[tuple[str, int, str], set[int]] = {}
    for p in toy.problems("eval", 6000, 0):
        seen.setdefault((p.kind, p.family, p.question[1]), set()).add(p.plan)
    for (kind, _, _), plans in seen.items():
        assert len(plans) == 1 if kind != "latent" else len(plans) >= 6


def test_latent_plan_is_independent_of_the_question(toy: World) -> None:
    """The commonest plan is right half the time whatever the character at any place of the question."""
    problems = [p for p in toy.problems("train", 24_000, 1) if p.kind == "latent"]
    best = np.array([p.plan == toy.plans[p.family, 0] for p in problems])
    for place in (1, 3, 4, 5, 7, 8, 9):
        character = np.array([p.question[place] for p in problems])
        for c in set(character):
            group = best[character == c]
            # 5 standard errors of a share of 1/2.
            assert abs(group.mean() - world.LATENT_PRIOR[0]) < 5 * 0.5 / math.sqrt(len(group))


def test_ood_pair_is_never_in_its_family_but_common_elsewhere(toy: World, corpus_plans: tuple) -> None:
    family, _, plan = corpus_plans
    for f in (f for f, kind in enumerate(world.KINDS) if kind == "ood"):
        right = {p.plan for p in toy.problems("eval", COUNT, 0) if p.family == f}
        assert len(right) == 1
        pair = right.pop()
        assert not np.any(plan[family == f] % 8 == pair % 8), "the second op is unseen in that family"
        assert np.any(plan[family == f] // 8 == pair // 8), "the first op is seen there"
        # It is the second-best plan (share 0.2) of one of four latent families, 1/12 of the corpus each.
        assert np.mean(plan == pair) > 0.2 / 12 * 0.9


def test_rare_plan_appears_at_its_stated_rate(toy: World, corpus_plans: tuple) -> None:
    family, mode, plan = corpus_plans
    rare = [f for f, kind in enumerate(world.KINDS) if kind == "rare"]
    for f, rate in zip(rare, world.RARE_RATES, strict=True):
        mine = family == f
        share = np.mean(plan[mine] == toy.plans[f, mode[mine]])
        # 5 standard errors of a rare share over 5e4 draws.
        assert abs(share - rate) < 5 * math.sqrt(rate / mine.sum())


def test_corpus_solutions_are_worked_and_mostly_consistent(toy: World) -> None:
    for question, solution in toy.corpus(COUNT, 0):
        assert re.fullmatch(r"[A-L][+-] [1-9]{3} [1-9]{3}", question)
        steps = re.fullmatch(r"[a-h](\d{3})[a-h](\d{3})\\boxed\{(\d{6})\}", solution)
        assert steps and steps[1] + steps[2] == steps[3]
    _, _, x, plan, digits = toy.corpus_arrays(60_000, 1)
    wrong = np.mean(toy.apply(plan, x) != digits)
    # Noise draws the right digit again once in nine; 5 standard errors of 2 % over 360,000 digits.
    assert abs(wrong - world.DIGIT_NOISE * 8 / 9) < 1.2e-3


def test_data_files_are_verls_in_the_worlds_order_and_none_overlap(toy: World, tmp_path: Path) -> None:
    make.write_problems(toy, tmp_path, train=(480, 0), evaluation=(24, 99))
    frame = pd.read_parquet(tmp_path / make.EVAL_FILE)
    assert list(frame.columns) == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    problems = toy.problems("eval", 24, 99)
    for i, problem in enumerate(problems):
        row = frame.iloc[i]
        assert list(row.prompt) == [{"role": "user", "content": problem.question}]
        assert row.reward_model == {"style": "rule", "ground_truth": problem.answer}
        assert (row.extra_info["index"], row.extra_info["id"], row.extra_info["subject"]) == (
            i,
            problem.id,
            problem.kind,
        )
    assert "plan" not in (tmp_path / "source" / "eval.jsonl").read_text()
    train = {row[0]["content"] for row in pd.read_parquet(tmp_path / make.TRAIN_FILE).prompt}
    assert not train & {problem.question for problem in problems}


def test_interrupted_source_leaves_nothing(toy: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        world.write_jsonl(toy.problems("train", 12, 0), tmp_path / "train.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_round_trips_bytes_and_newline_is_one_token(untrained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    text = "A+ 381 734\n\\boxed{482917} é 中"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode())
    assert len(tokenizer("\n").input_ids) == 1
    assert len(tokenizer) <= base_model.VOCAB_SIZE and base_model.VOCAB_SIZE % 8 == 0
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_chat_template_is_chatml_with_one_length_for_all(toy: World, untrained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    questions = [p.question for p in toy.problems("eval", 24, 0)]
    prompts = base_model.encode_prompts(tokenizer, questions)
    assert tokenizer.decode(prompts[0]) == f"<|im_start|>user\n{questions[0]}<|im_end|>\n<|im_start|>assistant\n"
    chat = [{"role": "user", "content": questions[0]}]
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids == prompts[0].tolist()
    responses = base_model.encode_solutions(tokenizer, toy.right_solutions(toy.problems("eval", 1, 0)[0]))
    assert set(responses[:, -1].tolist()) == {tokenizer.eos_token_id}


def test_success_probability_equals_brute_force(toy: World, untrained: Path) -> None:
    problems = toy.problems("eval", 3, 0)
    got = exact.success_probabilities(untrained, toy, problems, batch_size=2)
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    model = AutoModelForCausalLM.from_pretrained(untrained, dtype=torch.float32).eval()
    for problem, p in zip(problems, got, strict=True):
        prefix = f"<|im_start|>user\n{problem.question}<|im_end|>\n<|im_start|>assistant\n"
        total = 0.0
        for solution in toy.right_solutions(problem):
            ids = tokenizer(prefix + solution + "<|im_end|>").input_ids
            with torch.no_grad():
                log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            start = len(tokenizer(prefix).input_ids)
            total += math.exp(sum(log_probs[t - 1, ids[t]].item() for t in range(start, len(ids))))
        # fp32 forward passes in a different order: about 1e-6 in each of 23 log-probabilities.
        assert p == pytest.approx(total, rel=1e-4)
    assert got.dtype == np.float64


def test_probabilities_of_a_full_enumeration_sum_to_one(untrained: Path) -> None:
    """All two-token responses: the same function, over everything that can be sampled."""
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    model = AutoModelForCausalLM.from_pretrained(untrained, dtype=torch.float32).eval()
    prompts = base_model.encode_prompts(tokenizer, ["A+ 381 734"])
    pairs = torch.tensor(list(itertools.product(range(base_model.VOCAB_SIZE), repeat=2)))
    log_prob = torch.cat([exact.response_log_prob(model, prompts, chunk) for chunk in pairs.split(8192)])
    # fp32 logits; normalisation is in float64.
    assert log_prob.exp().sum().item() == pytest.approx(1.0, abs=1e-6)


def test_pretrain_lowers_the_loss_and_writes_a_loadable_checkpoint(toy: World, tmp_path: Path) -> None:
    out = tmp_path / "base"
    losses = base_model.pretrain(toy, out, seed=0, steps=40, batch_size=24, progress=False)
    # An untrained model is at log(264) = 5.6 nats; forty steps teach it which bytes occur at all.
    assert losses[0] > 5.0 and losses[-1] < losses[0] - 0.5
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.config.num_attention_heads % 2 == 0 and model.config.num_key_value_heads % 2 == 0
    questions, solutions = zip(*toy.corpus(24, seed=99), strict=True)
    loss = base_model.response_loss(
        model,
        base_model.encode_prompts(tokenizer, list(questions)),
        base_model.encode_solutions(tokenizer, list(solutions)),
    )
    assert loss.item() < losses[0] - 0.5
    with pytest.raises(FileExistsError):
        base_model.pretrain(toy, out, seed=0, steps=1, batch_size=1, progress=False)


def test_interrupted_checkpoint_leaves_no_half_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    tokenizer = base_model.build_tokenizer()
    model = base_model.build_model(tokenizer, seed=0)
    monkeypatch.setattr(type(tokenizer), "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        base_model.save_checkpoint(model, tokenizer, tmp_path / "base")
    assert list(tmp_path.iterdir()) == []
