"""Exact success probabilities of a toy model by enumeration."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, Qwen2ForCausalLM

from rapo_verl.toy.base_model import encode_prompts, encode_solutions
from rapo_verl.toy.world import Puzzle, World

FloatArray = NDArray[np.float64]


def success_probabilities(
    model_dir: str | os.PathLike[str], world: World, problems: Sequence[Puzzle], batch_size: int
) -> FloatArray:
    """Return each problem's success probability at temperature 1, float64 [len(problems)].

    p(x) = sum over right solutions y of prod_t pi(y_t | x, y_<t), the end token included. Right answers in some other
    form than the 64 canonical solutions are left out, so this is a lower bound. A batch of problems is 64 times as many
    sequences.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = Qwen2ForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    found: list[FloatArray] = []
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        prompts = encode_prompts(tokenizer, [problem.question for problem in batch])
        solutions = [solution for problem in batch for solution in world.right_solutions(problem)]
        log_prob = response_log_prob(model, prompts, encode_solutions(tokenizer, solutions))
        found.append(log_prob.exp().view(len(batch), -1).sum(dim=1).numpy())
    # A sum of rounded terms may pass 1 by a rounding error.
    return np.minimum(np.concatenate(found), 1.0) if found else np.zeros(0)


@torch.inference_mode()
def response_log_prob(model: Qwen2ForCausalLM, prompts: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    """Return log pi(response | prompt), float64 [n * m], in nats; the forward pass is in the model's own precision.

    Args:
        model: the language model.
        prompts: ids [n, prompt tokens], no padding; each is run once and its cache shared by its m responses.
        responses: ids [n * m, response tokens], no padding, the m responses of a prompt adjacent.
    """
    each = len(responses) // len(prompts)
    head = model(prompts, use_cache=True, logits_to_keep=1)
    head.past_key_values.batch_repeat_interleave(each)
    tail = model(responses[:, :-1], past_key_values=head.past_key_values, use_cache=True)
    first = head.logits.repeat_interleave(each, dim=0)
    log_probs = torch.cat([first, tail.logits], dim=1).double().log_softmax(dim=-1)
    return log_probs.gather(2, responses[..., None]).squeeze(2).sum(dim=1)
