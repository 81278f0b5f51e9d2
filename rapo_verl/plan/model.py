"""The shape of a model and its exact parameter counts, from its config alone: nothing is downloaded or allocated."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapo_verl import Refused

# The shapes of the published Qwen2.5 models (config.json of Qwen/Qwen2.5-*), so that a plan needs no network:
# hidden, layers, heads, KV heads, feed-forward, vocabulary, embeddings shared with the head.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "Qwen/Qwen2.5-1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen/Qwen2.5-3B": (2048, 36, 16, 2, 11008, 151936, True),
    "Qwen/Qwen2.5-7B": (3584, 28, 28, 4, 18944, 152064, False),
    "Qwen/Qwen2.5-14B": (5120, 48, 40, 8, 13824, 152064, False),
    "Qwen/Qwen2.5-32B": (5120, 64, 40, 8, 27648, 152064, False),
}


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder. Counts are of parameters; ``heads * head_dim`` may differ from ``hidden``."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    parameters: int  # of the whole model, a shared head counted once
    layer_parameters: int  # of one layer
    layer_replicated: int  # of these, what tensor parallel does not split: the norms
    positions: int | None = None  # tokens of the longest sequence that it was made for; None: not said
    linears: tuple[tuple[str, int, int], ...] = ()  # of one layer: name, features in, features out

    @property
    def embedding(self) -> int:
        """Parameters of the input embedding, and of the head where it is not shared."""
        return self.vocab * self.hidden


def shape_of(path: str) -> ModelShape:
    """Return the shape of a model of `config_of`; Refused: it is no dense decoder of equal layers."""
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(path)
    text = config.get_text_config()
    experts = [name for name in ("num_experts", "num_local_experts", "n_routed_experts") if getattr(text, name, 0)]
    if experts:
        raise Refused(f"{path} is a mixture of experts ({experts[0]}), which the plan does not know")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
        raise Refused(f"{path}: transformers does not build it as a language model ({error})") from error
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    layers: Counter[str] = Counter()
    for name, count in counts.items():
        if place := re.match(r"[\w.]*?(?:layers|h|blocks)\.(\d+)\.", name):
            layers[place[0]] += count
    equal = len(layers) == text.num_hidden_layers and len(set(layers.values())) == 1
    if not equal or not all(hasattr(text, name) for name in ("intermediate_size", "num_attention_heads")):
        raise Refused(
            f"{path}: the plan knows dense decoders of equal layers, which {type(model).__name__} is not; plan it by "
            "hand with docs/scaling.md"
        )
    first = next(iter(layers))
    return ModelShape(
        name=path,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        ffn=text.intermediate_size,
        vocab=text.vocab_size,
        tied=config.tie_word_embeddings,
        parameters=sum(counts.values()),
        layer_parameters=layers[first],
        layer_replicated=sum(n for name, n in counts.items() if name.startswith(first) and "norm" in name),
        positions=getattr(text, "max_position_embeddings", None),
        linears=tuple(
            (name.rpartition(".")[2], module.in_features, module.out_features)
            for name, module in model.named_modules()
            if name.startswith(first) and isinstance(module, torch.nn.Linear)
        ),
    )


def config_of(path: str) -> Any:
    """Return the transformers config of a published name, a checkpoint folder or a hub id; Refused without one."""
    from transformers import AutoConfig, Qwen2Config

    if path in PUBLISHED and not Path(path).exists():
        hidden, layers, heads, kv_heads, ffn, vocab, tied = PUBLISHED[path]
        return Qwen2Config(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            intermediate_size=ffn,
            vocab_size=vocab,
            tie_word_embeddings=tied,
        )
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise Refused(
            f"no config of the model {path} to be had ({type(error).__name__}); give a checkpoint folder, a hub id, "
            f"or one of {', '.join(PUBLISHED)}"
        ) from error
