"""Log-probability and entropy of a language model's linear head straight from its hidden states, without gradient.

A chunk of tokens at a time: its logits in the model's own dtype, then one sweep over them, the head's
(`rapo_verl.method.head`). No tensor of size [tokens, vocabulary] is ever made, and each token may have a temperature of
its own. The vocabulary may be split over a process group.
"""

import torch
import torch.distributed as dist

from rapo_verl.method.head import How, inverse_of, log_prob_and_entropy, refuse_first, sweeps_for

# A chunk has a 16th of the tokens (docs/benchmarks.md has what others cost), but at least so many logits: what keeps a
# processor's or a GPU's product at its speed, 32 MiB in fp32. From 128 tokens on it has a multiple of 128, the tile of
# a GPU's matrix product.
CHUNK_ELEMENTS, CHUNKS, TILE = 1 << 23, 16, 128


@torch.no_grad()
def linear_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: torch.Tensor | float = 1.0,
    rows: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probability of each label and entropy under softmax(hidden @ weight.T / T).

    The products are made in the dtype in which the model's own head would make them, autocast included, so that a
    policy and a reference with equal weights agree; everything after them, the temperature first, is fp32 (fp64 for
    fp64 products).

    Args:
        hidden: shape (n, width), float.
        weight: of the head, shape (vocabulary, width), or this rank's equal share of its rows.
        labels: token ids of the whole vocabulary, shape (n,), int.
        temperature: T > 0, a number or shape (n,).
        rows: bool, shape (n,): tokens that count; the others may hold anything, and come back as zeros.
        group: process group over whose ranks, in order, the vocabulary is split.

    Returns:
        Two of shape (n,), nats, fp32 (fp64): log-probability and entropy.

    Raises:
        ValueError: shapes that do not fit; and, named with its row: a label outside the vocabulary, a temperature that
            is not positive, a token with non-finite logits.
    """
    (n, width), size = hidden.shape, 1 if group is None else dist.get_world_size(group)
    if weight.dim() != 2 or weight.shape[1] != width or labels.shape != (n,):
        raise ValueError(
            f"hidden states {tuple(hidden.shape)} need a weight (vocabulary, {width}) and labels ({n},), not "
            f"{tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if torch.is_autocast_enabled(hidden.device.type):
        # Once, and not in each chunk's product.
        hidden, weight = (x.to(torch.get_autocast_dtype(hidden.device.type)) for x in (hidden, weight))
    start = 0 if group is None else weight.shape[0] * dist.get_rank(group)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    inverse = inverse_of(temperature, n, dtype, hidden.device)
    out = inverse.new_zeros(2, n)
    counted = slice(None) if rows is None else rows.nonzero()[:, 0]
    hidden, own_inverse, own_labels = hidden[counted], inverse[counted], labels[counted]
    most = chunk_size(len(hidden), weight.shape[0])
    memory = hidden.new_empty(min(most, len(hidden)), weight.shape[0])
    packed = [inverse.new_empty(0, 4)]
    for first in range(0, len(hidden), most):
        chunk = slice(first, first + most)
        logits = torch.mm(hidden[chunk], weight.T, out=memory[: len(hidden[chunk])])
        how = How(None, group, start, sweeps_for(logits, 0))
        for part, where in how.chunks(logits):
            label = own_labels[chunk][part]
            none = label.new_empty(len(label), 0)
            packed.append(how.sweeps.sums(logits, where, own_inverse[chunk][part], label, none, group, start)[1])
    out[:, counted] = torch.stack(log_prob_and_entropy(torch.cat(packed))[:2])
    problems = {
        "row %d has a label outside the vocabulary": (labels < 0) | (labels >= weight.shape[0] * size),
        "row %d has a temperature that is not positive and finite": ~(torch.isfinite(inverse) & (inverse > 0)),
        "row %d has non-finite logits": ~torch.isfinite(out).all(0),
    }
    refuse_first(problems, rows)
    return out[0], out[1]


def chunk_size(n: int, columns: int) -> int:
    """Return how many tokens to take at a time."""
    size = max(n // CHUNKS, CHUNK_ELEMENTS // columns, 1)
    return size if size < TILE else size // TILE * TILE
