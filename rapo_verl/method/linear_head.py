"""Log-probability and entropy of a language model's linear head straight from its hidden states, without gradient.

Pure torch. A chunk of tokens meets a chunk of the vocabulary at a time under an online softmax, so that no tensor of
size [tokens, vocabulary] is ever made, and each token may have a temperature of its own. The vocabulary may be split
over a process group: one MAX and one packed SUM per chunk of tokens.
"""

import torch
import torch.distributed as dist

from rapo_verl.method.head_torch import local_columns

# Tokens and columns of one product: large enough for a GPU's matrix units, 32 MiB in fp32.
CHUNK_ROWS, CHUNK_COLUMNS = 1024, 8192


@torch.no_grad()
def linear_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: torch.Tensor | float = 1.0,
    rows: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int = CHUNK_ROWS,
    chunk_columns: int = CHUNK_COLUMNS,
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
        chunk_rows: tokens per product.
        chunk_columns: vocabulary per product. Both change memory and time, not the result.

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
    start = 0 if group is None else weight.shape[0] * dist.get_rank(group)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    temperature = torch.as_tensor(temperature, dtype=dtype, device=hidden.device).expand(n)
    index = torch.arange(n, device=hidden.device) if rows is None else rows.nonzero()[:, 0]
    out = temperature.new_zeros(2, n)
    for part in index.split(chunk_rows):
        out[:, part] = _chunk(hidden[part], labels[part], temperature[part], weight, start, group, chunk_columns)
    problems = {
        "a label outside the vocabulary": (labels < 0) | (labels >= weight.shape[0] * size),
        "a temperature that is not positive and finite": ~(torch.isfinite(temperature) & (temperature > 0)),
        "non-finite logits": ~torch.isfinite(out).all(0),
    }
    found = torch.stack(list(problems.values()))[:, index]
    if found.any():
        problem, row = found.nonzero()[0].tolist()
        raise ValueError(f"row {int(index[row])} has {list(problems)[problem]}")
    return out[0], out[1]


def _chunk(hidden, labels, temperature, weight, start, group, chunk_columns) -> torch.Tensor:
    """Return log-probability and entropy of one chunk of tokens."""
    peak = torch.full_like(temperature, torch.finfo(temperature.dtype).min)
    total, mean, at_label = (torch.zeros_like(peak) for _ in range(3))
    inverse = temperature.reciprocal()[:, None]
    for first in range(0, weight.shape[0], chunk_columns):
        z = (hidden @ weight[first : first + chunk_columns].T).to(peak.dtype).mul_(inverse)
        local, inside = local_columns(labels[:, None], start + first, z.shape[1])
        at_label += torch.where(inside, z.gather(1, local), 0)[:, 0]
        total, mean, peak = _at_peak(total, mean, peak, torch.maximum(peak, z.amax(1)))
        z -= peak[:, None]
        p = z.exp()
        total += p.sum(1)
        mean += z.mul_(p).sum(1)
    if group is not None:
        highest = peak.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        total, mean, peak = _at_peak(total, mean, peak, highest)
        packed = torch.stack([total, mean, at_label])
        dist.all_reduce(packed, group=group)
        total, mean, at_label = packed
    log_total = total.log()
    return torch.stack([at_label - peak - log_total, log_total - mean / total])


def _at_peak(total, mean, peak, new) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return sums of e^(z - peak) and (z - peak) e^(z - peak) as they are at another peak, and that."""
    shrink = (peak - new).exp()
    return total * shrink, (mean + total * (peak - new)) * shrink, new
