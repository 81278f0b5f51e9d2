"""The prompts of an evaluation as token ids, and the tokens that end a response."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rapo_verl import Refused
from rapo_verl.data.chat import end_of_turn, render
from rapo_verl.evaluation.spec import Problem

# End tokens of chat formats, beside the one that the chat template writes: a base model may end with either.
_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")


def load_prompts(
    folder: Path, problems: Sequence[Problem], max_tokens: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Return each problem's prompt as token ids, and the ids that end a response of this checkpoint.

    Refused: no tokenizer or template, or a model made for shorter sequences than prompt and ``max_tokens``.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        texts = [render([dict(turn) for turn in problem.messages], tokenizer) for problem in problems]
    except (OSError, ValueError) as error:
        raise Refused(f"{folder}: {error}") from error
    prompts = tuple(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    prompt = max(map(len, prompts))
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and prompt + max_tokens > limit:
        mend = f"lower max_tokens to {limit - prompt}" if limit > prompt else "leave it out, or take another model"
        raise Refused(
            f"the longest prompt ({problems[[len(p) for p in prompts].index(prompt)].id!r}, {prompt} tokens) and "
            f"max_tokens ({max_tokens}) need {prompt + max_tokens} positions, the model has {limit}; {mend}"
        )
    vocabulary = tokenizer.get_vocab()
    known = (*_END_TOKENS, end_of_turn(tokenizer))
    ends = {tokenizer.eos_token_id, *(vocabulary[token] for token in known if token in vocabulary)}
    if (folder / "generation_config.json").is_file():
        stated = GenerationConfig.from_pretrained(folder).eos_token_id
        ends |= set(stated) if isinstance(stated, list) else {stated}
    return prompts, tuple(sorted(ends - {None}))
