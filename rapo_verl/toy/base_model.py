"""The toy base model: a byte-level tokenizer, a tiny Qwen2 and its supervised training on the toy corpus.

With that tokenizer also larger models of random weights, to measure and to try a machine with.
"""

import logging
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rapo_verl.plan.model import config_of
from rapo_verl.run.progress import bar_interval
from rapo_verl.toy.world import World

logger = logging.getLogger(__name__)

END_OF_TEXT: Final = "<|endoftext|>"
IM_START: Final = "<|im_start|>"
IM_END: Final = "<|im_end|>"
SPECIAL_TOKENS: Final = (END_OF_TEXT, IM_START, IM_END)
# 3 special tokens + 256 bytes, rounded up so that 2, 4 or 8 vocabulary shards are equal.
VOCAB_SIZE: Final = 264
CHAT_TEMPLATE: Final = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LEARNING_RATE: Final = 3e-3
WARMUP_STEPS: Final = 50
FINAL_LR_SHARE: Final = 0.02


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per byte with Qwen's special tokens and ChatML.

    A turn ends with <|im_end|>, which is eos; <|endoftext|> pads.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIAL_TOKENS),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Qwen2ForCausalLM:
    """Return an untrained fp32 Qwen2; heads and KV heads split over two tensor-parallel ranks."""
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32: the smallest head that vLLM has kernels for
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config).float()


def random_checkpoint(shape: str, out_dir: Path, *, layers: int | None = None, device: str = "cpu") -> None:
    """Write a checkpoint of a published shape with random bf16 weights and the byte-level tokenizer.

    The shape is a name of `rapo_verl.plan.model.PUBLISHED`, or the first ``layers`` of it; its vocabulary is wider than
    the tokenizer's, as Qwen's is. Weights are drawn on ``device``: 3B take seconds on a GPU, minutes on a processor.
    """
    tokenizer, config = build_tokenizer(), config_of(shape)
    config.architectures = ["Qwen2ForCausalLM"]
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, tokenizer.eos_token_id, tokenizer.pad_token_id
    if layers is not None:
        config.num_hidden_layers, config.layer_types = layers, config.layer_types[:layers]
    devices = [device] if device != "cpu" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    save_checkpoint(model, tokenizer, out_dir)


def encode_prompts(tokenizer: PreTrainedTokenizerFast, questions: list[str]) -> torch.Tensor:
    """Return prompt ids [len(questions), prompt tokens] int64, generation prompt included; all of one length."""
    conversations = [[{"role": "user", "content": question}] for question in questions]
    texts = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
    return torch.tensor(tokenizer(texts).input_ids)


def encode_solutions(tokenizer: PreTrainedTokenizerFast, solutions: list[str]) -> torch.Tensor:
    """Return response ids [len(solutions), response tokens] int64, closing <|im_end|> included; all of one length."""
    return torch.tensor(tokenizer([solution + IM_END for solution in solutions]).input_ids)


def pretrain(
    world: World, out_dir: str | os.PathLike[str], *, seed: int, steps: int, batch_size: int, progress: bool
) -> list[float]:
    """Train a base model on fresh corpus batches and save it; return the loss of each step in nats per response token.

    The seed is that of the initial weights and of the corpus. The checkpoint, tokenizer and generation config with
    it, appears whole or not at all, in a new folder.
    """
    if Path(out_dir).exists():
        raise FileExistsError(f"{out_dir} exists: remove it or choose another checkpoint folder")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []
    bar = tqdm(range(steps), desc="toy base", disable=not progress, unit="step", mininterval=bar_interval())
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, steps)
        questions, solutions = zip(*world.corpus(batch_size, seed=seed * 1_000_003 + step), strict=True)
        loss = response_loss(
            model, encode_prompts(tokenizer, list(questions)), encode_solutions(tokenizer, list(solutions))
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
    save_checkpoint(model, tokenizer, out_dir)
    logger.info("toy base model of %d parameters written to %s", model.num_parameters(), out_dir)
    return losses


def response_loss(model: Qwen2ForCausalLM, prompts: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of response tokens, nats; prompts and responses [n, tokens] without padding."""
    width = responses.shape[1]
    # The last prompt position predicts the first response token, the last response token predicts nothing.
    logits = model(torch.cat([prompts, responses[:, :-1]], dim=1), logits_to_keep=width, use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), responses.flatten())


def save_checkpoint(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, out_dir: str | os.PathLike[str]
) -> None:
    """Write model, tokenizer and generation config to a temporary folder, then rename it to `out_dir`."""
    target = Path(out_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        model.generation_config = GenerationConfig(
            do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)  # mkdtemp makes it 0700, unreadable for a worker under another user.
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step: linear warm-up times cosine decay to 2 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)
