"""The head's two sweeps over the logits in torch, a chunk of tokens at a time: `rapo_verl.method.head` calls them.

`rapo_verl.method.head_triton` has the same two functions for CUDA.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist


class GradientTerms(NamedTuple):
    """What the gradient of a token's logits is made of, each with a row for each token.

    With g1, g2, g3 / T and p of a token's softmax it is p (g3 (mass - tail_ratio) - g1 - g2 (log p + entropy)); at the
    named ids without the tail_ratio and less g3 q; at the label g1 is added.

    Attributes:
        labels: shape (n,), int.
        ids: named tokens, shape (n, k), int, ascending.
        q: the target's probabilities of them, shape (n, k).
        mass: of the target, shape (n,).
        tail_ratio: the target's tail over p's, shape (n,).
        inverse: 1 / T, shape (n,).
        log_normaliser: log sum e^(z / T), shape (n,).
        entropy: shape (n,).
        g1: the gradient that log_prob gets, shape (n,).
        g2: that of the entropy, shape (n,), or None for zeros.
        g3: that of the forward KL, shape (n,).
    """

    labels: torch.Tensor
    ids: torch.Tensor
    q: torch.Tensor
    mass: torch.Tensor
    tail_ratio: torch.Tensor
    inverse: torch.Tensor
    log_normaliser: torch.Tensor
    entropy: torch.Tensor
    g1: torch.Tensor
    g2: torch.Tensor | None
    g3: torch.Tensor

    def rows(self, part: slice | torch.Tensor) -> "GradientTerms":
        """Return the terms of some tokens."""
        return GradientTerms._make(None if x is None else x[part] for x in self)


def sums(
    logits: torch.Tensor,
    where: slice | torch.Tensor,
    inverse: torch.Tensor,
    labels: torch.Tensor,
    ids: torch.Tensor,
    group: dist.ProcessGroup | None,
    start: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the maximum m of z = logits / T over all shards and, in one tensor (c, k + 4), sums over all shards.

    They are z - m at ``ids`` and at the label, the sum of e^(z - m) off the ids, over all tokens, and of
    (z - m) e^(z - m).

    Args:
        logits: shape (n, columns), float.
        where: which c rows of them.
        inverse: 1 / T of those, shape (c,); its dtype is that of the arithmetic.
        labels: of the whole vocabulary, shape (c,), int.
        ids: of the whole vocabulary, shape (c, k), int.
        group: of the shards, or None.
        start: id of this shard's first column.
    """
    z = logits[where] * inverse[:, None]
    peak = z.amax(-1)
    if group is not None:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    z -= peak[:, None]
    local, inside = local_columns(torch.cat([ids, labels[:, None]], 1), start, z.shape[1])
    at_ids = z.gather(1, local) * inside
    p = z.exp()
    mean = z.mul_(p).sum(1, keepdim=True)
    total = tail = p.sum(1, keepdim=True)
    if ids.shape[1]:
        # The tail is a sum of what is left, not one minus the rest: in fp32 that is off by 33 % at a tail of 1e-5.
        _zero_at(p, local[:, :-1], inside[:, :-1])
        tail = p.sum(1, keepdim=True)
    packed = torch.cat([at_ids, tail, total, mean], 1)
    if group is not None:
        dist.all_reduce(packed, group=group)
    return peak, packed


def write_gradient(
    gradient: torch.Tensor, logits: torch.Tensor, where: slice | torch.Tensor, terms: GradientTerms, start: int
) -> None:
    """Write into rows ``where`` of ``gradient``, which may be the logits, what ``terms`` of those rows describe."""
    g1, g3 = terms.g1 * terms.inverse, terms.g3 * terms.inverse
    g2 = None if terms.g2 is None else terms.g2 * terms.inverse
    common = g3 * terms.mass - g1 - (0 if g2 is None else g2 * terms.entropy)
    shared = common - g3 * terms.tail_ratio
    log_p = (logits[where] * terms.inverse[:, None]).sub_(terms.log_normaliser[:, None])
    local, inside = local_columns(terms.ids, start, logits.shape[1])
    p = log_p.exp()
    named, log_named = p.gather(1, local), log_p.gather(1, local)
    # The named tokens get their gradient by themselves: Q / P, which their column must not see, may be 1e8.
    _zero_at(p, local, inside)
    if g2 is None:
        p *= shared[:, None]
        named = named * common[:, None]
    else:
        p *= log_p.mul_(-g2[:, None]).add_(shared[:, None])
        named = named * (common[:, None] - g2[:, None] * log_named)
    p.scatter_add_(1, local, (named - g3[:, None] * terms.q) * inside)
    local, inside = local_columns(terms.labels[:, None], start, logits.shape[1])
    p.scatter_add_(1, local, g1[:, None] * inside)
    gradient[where] = p.to(logits.dtype)


def local_columns(ids: torch.Tensor, start: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns of ``ids`` in this shard and whether they are in it; those of others are column 0."""
    local = ids.long() - start
    inside = (local >= 0) & (local < columns)
    return torch.where(inside, local, 0), inside


def _zero_at(values: torch.Tensor, local: torch.Tensor, inside: torch.Tensor) -> None:
    """Set non-negative ``values`` to zero at the columns inside."""
    # A minimum and not an assignment: an id of another shard, put on column 0, must not undo a zero that belongs there.
    values.scatter_reduce_(1, local, torch.where(inside, 0.0, torch.inf).to(values.dtype), "amin")
