"""What a reference pass must tell of each token, so that any phi can be applied to it afterwards.

Pure torch. One pass at the rollout's temperature names the k most likely tokens, their log-probabilities and, of all
others together, log sum_v p(v)^phi at a few values of phi. That function of phi is the cumulant generating function of
log p in the tail: smooth, so that a polynomial through the nodes gives it in between (exactly at both ends). Nothing
here waits for a reward, and logits are divided by the temperature in fp32.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from rapo_verl.method.head import chunk_size
from rapo_verl.method.head_torch import local_columns

# Chebyshev-Lobatto nodes in [phi_min, 1]: between them the error is below 1e-4 nats at phi_min = 0.5 (tests).
TAIL_NODES = 5


class ReferenceTokens(NamedTuple):
    """The reference's next-token distributions at the rollout's temperature; fp32 (fp64 for fp64 logits), nats.

    Attributes:
        label_log_prob: log p of the label, shape (n,).
        ids: the k most likely tokens, most likely first, shape (n, k), int32.
        log_prob: log p of them, shape (n, k).
        log_tail: log sum of p^phi over all other tokens at each node, shape (n, nodes); -inf where there are none.
    """

    label_log_prob: torch.Tensor
    ids: torch.Tensor
    log_prob: torch.Tensor
    log_tail: torch.Tensor


def phi_nodes(phi_min: float) -> tuple[float, ...]:
    """Return the values of phi at which a tail is measured: 1 first, ``phi_min`` last; only 1 where phi is always 1."""
    if phi_min == 1:
        return (1.0,)
    middle, half = (1 + phi_min) / 2, (1 - phi_min) / 2
    inner = (middle + half * math.cos(math.pi * i / (TAIL_NODES - 1)) for i in range(1, TAIL_NODES - 1))
    return (1.0, *inner, phi_min)


def tail_at(log_tail: torch.Tensor, phi: torch.Tensor, nodes: tuple[float, ...]) -> torch.Tensor:
    """Return log sum of p^phi over the tail at any phi, from its values at ``nodes``.

    Args:
        log_tail: shape (n, nodes), nats.
        phi: shape (n,), between the first and the last node.
        nodes: as `phi_nodes` gave them to the reference pass.

    Returns:
        Shape (n,), nats; -inf where the tail is empty. Exact where phi is a node.
    """
    x = torch.tensor(nodes, dtype=torch.float64, device=phi.device)
    difference = phi.double()[:, None] - x
    weights = torch.stack(
        [
            torch.cat([difference[:, :m], difference[:, m + 1 :]], 1).prod(1) / (x[m] - x[x != x[m]]).prod()
            for m in range(len(nodes))
        ],
        1,
    )
    empty = (log_tail == -torch.inf).any(1)
    value = (weights * torch.where(empty[:, None], 0, log_tail).double()).sum(1).to(log_tail.dtype)
    return value.masked_fill(empty, -torch.inf)


@torch.no_grad()
def reference_tokens(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    k: int,
    temperature: torch.Tensor | float = 1.0,
    nodes: tuple[float, ...] = (1.0,),
    rows: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> ReferenceTokens:
    """Return what `rapo_verl.method.reweighting` needs of each of the n tokens of a reference pass.

    Args:
        logits: shape (n, vocabulary) or this rank's equal share of its columns; not changed.
        labels: sampled token, shape (n,), int.
        k: how many tokens to name.
        temperature: T > 0 of the rollout, a number or shape (n,).
        nodes: values of phi for the tail, 1 first.
        rows: bool, shape (n,): tokens that count; the others come back as zeros.
        group: process group over whose ranks, in order, the columns are split.
        chunk_rows: tokens per chunk; a choice by device where None.

    Raises:
        ValueError: k outside 1..vocabulary; a token with non-finite logits, named with its row.
    """
    n, columns = logits.shape
    size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    if not 1 <= k <= columns * size:
        raise ValueError(f"k is {k}; allowed: 1 to the vocabulary's {columns * size} tokens")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    inverse = torch.as_tensor(temperature, dtype=dtype, device=logits.device).reciprocal().expand(n)
    index = torch.arange(n, device=logits.device) if rows is None else rows.nonzero()[:, 0]
    out = ReferenceTokens(
        logits.new_zeros(n, dtype=dtype),
        labels.new_zeros(n, k, dtype=torch.int32),
        logits.new_zeros(n, k, dtype=dtype),
        logits.new_zeros(n, len(nodes), dtype=dtype),
    )
    for where in index.split(chunk_rows or chunk_size(n, columns, logits.device)):
        told = _chunk(logits[where], inverse[where, None], labels[where], k, nodes, group, columns * rank)
        for field, value in zip(out, told):
            field[where] = value.to(field.dtype)
    bad = ~torch.isfinite(out.log_prob).all(1) & torch.isin(torch.arange(n, device=index.device), index)
    if bad.any():
        raise ValueError(f"the reference's logits of row {int(bad.nonzero()[0])} hold NaN or infinity")
    return out


def _chunk(
    x: torch.Tensor,
    inverse: torch.Tensor,
    labels: torch.Tensor,
    k: int,
    nodes: tuple[float, ...],
    group: dist.ProcessGroup | None,
    start: int,
) -> ReferenceTokens:
    """Return the same for logits x (c, columns), from ``start`` of the vocabulary on, and 1 / T, shape (c, 1)."""
    # By the logits as they are: a temperature keeps their order, and a GPU selects in bf16 in half the passes of fp32.
    top, ids = x.topk(min(k, x.shape[1]), 1)
    log_prob = top * inverse
    peak = log_prob[:, :1].clone()
    # Or a token that is never drawn would pass; NaN and plus infinity stand first among the largest.
    log_prob.masked_fill_((x.amin(1) == -torch.inf)[:, None], torch.nan)
    if group is not None:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    log_prob -= peak
    z = (x * inverse).sub_(peak)
    ids = ids + start
    if group is not None:
        log_prob, ids = (_gathered(x, group) for x in (log_prob, ids))
        log_prob, order = log_prob.topk(k, 1)
        ids = ids.gather(1, order)
    column, here = local_columns(labels[:, None], start, z.shape[1])
    label = torch.where(here, z.gather(1, column), 0)
    # Named tokens leave the tail. A minimum: an id of another shard, put on column 0, must not undo what belongs there.
    column, here = local_columns(ids, start, z.shape[1])
    z.scatter_reduce_(1, column, torch.where(here, -torch.inf, torch.inf).to(z.dtype), "amin")
    tails = [(z * phi).exp_().sum(1, keepdim=True) for phi in nodes]
    sums = torch.cat([label, *tails], 1)  # one reduction for both
    if group is not None:
        dist.all_reduce(sums, group=group)
    label, tail = sums[:, :1], sums[:, 1:]
    log_mass = (tail[:, :1] + log_prob.exp().sum(1, keepdim=True)).log()
    log_tail = tail.log() - torch.tensor(nodes, dtype=z.dtype, device=z.device) * log_mass
    return ReferenceTokens((label - log_mass)[:, 0], ids, log_prob - log_mass, log_tail)


def _gathered(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, 1)
