"""Prompts: a question as chat messages, what a model sees of them, and the question inside somebody else's prompt."""

import re
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from rapo_verl import Refused
from rapo_verl.data.sources import RowError

SYSTEM = "You are a helpful assistant."
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
# SimpleRL-Zoo's prompt for Qwen2.5; the same without a system message, which some templates refuse; the question alone.
PROMPTS = ("qwen-boxed", "boxed", "bare")
# The instructions that veRL's examples, DAPO's and PRIME's sets and ours put around a question.
_BEFORE = re.compile(r"\s*Solve the following math problem step by step\. The last line of your response .*\n\n")
_AFTER = re.compile(
    r"""\s*(?:Let's\ think\ step\ by\ step\ and\ output\ the\ final\ answer\ (?:within\ \\boxed\{\}|after\ "\#{4}")\.?
    |(?:Please|Let's)\ (?:reason|think)\ step\ by\ step,?\ and\ put\ your\ final\ answer\ within\ \\boxed\{\}\.?
    |Remember\ to\ put\ your\ answer\ on\ its\ own\ line\ after\ "Answer:"\.?
    |Present\ the\ answer\ in\ LaTe[xX]\ format:\ \\boxed\{Your\ answer\})\s*$""",
    re.VERBOSE,
)
_PROMPT_MARKS = re.compile(
    r"<\|[a-z_0-9]{2,}\|>|<｜|<(?:start|end)_of_turn>|<bos>|^\s*<s>|\[/?inst\]|<</?sys>>|</?think>"
    r"|### (?:instruction|response)\b|(?:put|output|present) (?:your|the) (?:final )?answer|last line of your response"
    r"|(?:think|reason) step[ -]by[ -]step|\\boxed\{\s*\}"
)
_SIGNS = ("<", "[inst", "[/inst", "### ", "answer", "last line", "step", "\\boxed")


def messages(question: str, prompt: str) -> list[dict[str, str]]:
    """Return a question as chat messages in a style of PROMPTS; the chat template is applied later, once."""
    user = {"role": "user", "content": question if prompt == "bare" else question + INSTRUCTION}
    return [{"role": "system", "content": SYSTEM}, user] if prompt == "qwen-boxed" else [user]


def prompt_mark(question: str) -> str | None:
    """Return what shows that a text is a prompt already, template or instruction, or None."""
    small = question.lower()
    # Most questions have none of these, and the search takes longer than all other checks together.
    found = any(sign in small for sign in _SIGNS) and _PROMPT_MARKS.search(small)
    return found[0] if found else None


def question_in(prompt: Any) -> str:
    """Return the question in a prompt of another set, a text or messages, known instructions around it taken off."""
    if not isinstance(prompt, str):
        if not _is_chat(prompt):
            raise RowError("prompt is neither a text nor messages with role and text")
        turns = [turn["content"] for turn in prompt if turn["role"] != "system"]
        if len(turns) != 1:
            raise RowError("prompt is a conversation of several turns")
        prompt = turns[0]
    bare = _BEFORE.sub("", prompt, count=1)
    while bare != (bare := _AFTER.sub("", bare)):
        pass
    return bare


def _is_chat(prompt: Any) -> bool:
    # Mapping, and anything that can be gone through: pandas gives arrays of dicts.
    return not isinstance(prompt, (str, Mapping, type(None))) and all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in prompt
    )


def render(turns: Any, tokenizer: Any | None) -> str:
    """Return a prompt as the model sees it; without a tokenizer, in Qwen2.5's ChatML."""
    if not _is_chat(turns):
        raise Refused(
            f"prompt is {turns!r:.60}; veRL takes messages, [{{role, content}}] with text: make them of this file with "
            "`rapo data prepare`"
        )
    turns = [dict(turn) for turn in turns]
    if tokenizer is None:
        body = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
        return f"{body}<|im_start|>assistant\n"
    if not tokenizer.chat_template:
        raise Refused(
            f"{tokenizer.name_or_path}: this model has no chat template; give it one, as chat_template.jinja in its "
            "folder, or take its instruct version"
        )
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise Refused(
            f"{tokenizer.name_or_path}: its chat template does not take this prompt ({error}); where it is the system "
            "message, `rapo data prepare --prompt boxed` makes prompts without one"
        ) from error


def end_of_turn(tokenizer: Any) -> str | None:
    """Return the special token that a model's chat template writes after an answer, None if it writes none."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
    after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("an answer")[2]
    # Not `all_special_tokens`, which are those that have a part: bos, eos, pad.
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return next((token for token in tokenizer.tokenize(after) if token in special), None)


def load_tokenizer(model: str | None) -> Any | None:
    """Return the tokenizer of a model folder or hub id, None for None."""
    if model is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise Refused(f"--model {model}: no tokenizer there ({error})") from error
