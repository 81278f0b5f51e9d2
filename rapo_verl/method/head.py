"""Log-probability, entropy and forward KL of a language model's head: one chunked pass, closed-form gradient.

Pure torch, with `rapo_verl.method.head_triton` for its two sweeps over the logits on CUDA. Nothing of the size
[tokens, vocabulary] is made in the forward or kept for the backward but the logits themselves; the backward makes their
gradient and no other such tensor. The vocabulary may be split over a process group (tensor parallel): one MAX and one
packed SUM per chunk in the forward, nothing in the backward. All arithmetic is fp32 (fp64 for fp64 logits) and free of
matrix products, which autocast and TF32 would round.
"""

import os
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist

from rapo_verl.method import head_torch
from rapo_verl.method.head_torch import GradientTerms

# Elements of one chunk's fp32 buffer: it should stay in a processor's cache, and keep a GPU busy between launches.
CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}
# A chunk's buffers are about three; 1/32 of the tokens keeps them below a tenth of [tokens, vocabulary].
CHUNKS_AT_LEAST = 32
# On CUDA: Triton's kernels up to so many named tokens, since each costs them a pass over its block of columns; "torch"
# in this variable of the environment keeps them out.
TRITON_NAMED, KERNEL_VARIABLE = 512, "RAPO_HEAD_KERNEL"


class Target(NamedTuple):
    """A reference's next-token distributions: k named tokens and one outcome for all others.

    Attributes:
        ids: token ids of the whole vocabulary, shape (n, k), int, distinct within a row.
        log_prob: their log-probabilities, shape (n, k), float, nats; -inf where the reference has none.
        log_tail: log of the mass of all other tokens, shape (n,), float, nats; -inf where nothing is left.
    """

    ids: torch.Tensor
    log_prob: torch.Tensor
    log_tail: torch.Tensor


class HeadOutput(NamedTuple):
    """What the head says of each token; fp32 (fp64 for fp64 logits), nats, zero outside ``rows``.

    Attributes:
        log_prob: log pi of the label, shape (n,).
        entropy: of the next-token distribution, shape (n,).
        forward_kl: KL(target ‖ pi), shape (n,), over k + 1 outcomes; zeros without a target.
    """

    log_prob: torch.Tensor
    entropy: torch.Tensor
    forward_kl: torch.Tensor


def head(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: torch.Tensor | float = 1.0,
    target: Target | None = None,
    rows: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
    gradient_in_place: bool = False,
) -> HeadOutput:
    r"""Return log-probability, entropy and forward KL of each token under pi = softmax(logits / T).

    With q the target, Q its tail, P the mass of pi on the tail, the KL of the k + 1 outcomes is

        sum_i [q_i log(q_i / p_i) - q_i + p_i] + [Q log(Q / P) - Q + P],

    never negative, a lower bound of the KL over the vocabulary, equal to it where k is the vocabulary. (For a target
    that does not sum to one it is the generalised KL.) With g1, g2, g3 the gradients of log_prob, entropy and
    forward_kl, M = sum_i q_i + Q and S the named tokens,

        dL/dz_j = (1/T) [ p_j (g3 M - g1 - g2 (log p_j + H)) + g1 1[j = y] - g3 (q_j if j in S else p_j Q / P) ].

    Args:
        logits: shape (n, vocabulary) or this rank's equal share of its columns; float, not changed in the forward.
        labels: token whose log-probability is wanted, shape (n,), int, ids of the whole vocabulary.
        temperature: T > 0, a number or shape (n,).
        target: the reference; None leaves the KL zero. Receives no gradient.
        rows: bool, shape (n,): tokens that count; the others may hold anything, NaN included, and get no gradient.
        group: process group over whose ranks, in order, the columns are split.
        chunk_rows: tokens per chunk; a choice by device where None. It changes memory and time, not the result.
        gradient_in_place: the backward writes the gradient over the logits, for callers who know that nothing else
            reads them after the forward: one tensor less, and one backward alone.

    Returns:
        `HeadOutput`.

    Raises:
        ValueError: shapes or dtypes that do not fit; more named tokens than the vocabulary; and, named with its row: a
            token with non-finite logits, an id outside the vocabulary or named twice, a temperature that is not
            positive, a target that is NaN or +inf.

    Source: derived by hand; held against autograd in tests/test_head.py.
    """
    n, columns = _check_shapes(logits, labels, temperature, target, rows)
    vocabulary, start = columns, 0
    if group is not None:
        vocabulary, start = columns * dist.get_world_size(group), columns * dist.get_rank(group)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    inverse = torch.as_tensor(temperature, dtype=dtype, device=logits.device).reciprocal().expand(n)
    if target is None:
        nothing = logits.new_full((n,), -torch.inf, dtype=dtype)
        target = Target(labels.new_empty(n, 0), logits.new_empty(n, 0, dtype=dtype), nothing)
    if target.ids.shape[1] > vocabulary:
        raise ValueError(f"the target names {target.ids.shape[1]} tokens of a vocabulary of {vocabulary}")
    target = Target(target.ids.long(), target.log_prob.detach().to(dtype), target.log_tail.detach().to(dtype))
    index = None
    if rows is not None:
        index = rows.nonzero()[:, 0]
        labels, inverse = labels[index], inverse[index]
        target = Target(*(field[index] for field in target))
    ids, order = target.ids.sort(1)
    target = Target(ids, target.log_prob.gather(1, order), target.log_tail)
    _check_values(labels, inverse, target, vocabulary, index)
    sweeps = _sweeps(logits, ids.shape[1])
    if sweeps is not head_torch and logits.stride(1) != 1:
        logits = logits.contiguous()
    chunk = chunk_rows or (chunk_size(n, columns, logits.device) if sweeps is head_torch else max(n, 1))
    how = _How(index, group, start, sweeps, chunk, gradient_in_place)
    out = _Head.apply(logits, labels.long(), inverse, target, how)
    if not torch.isfinite(out[1]).all():
        row = int((~torch.isfinite(out[1])).nonzero()[0])
        raise ValueError(f"the logits of row {row} hold NaN or infinity; nothing can be computed from them")
    return HeadOutput(*out)


def chunk_size(n: int, columns: int, device: torch.device) -> int:
    """Return how many tokens to take at a time."""
    elements = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"])
    return max(1, min(elements // columns, n // CHUNKS_AT_LEAST))


def _sweeps(logits: torch.Tensor, named: int) -> ModuleType:
    """Return the module whose `sums` and `write_gradient` read the logits."""
    if not logits.is_cuda or named > TRITON_NAMED or os.environ.get(KERNEL_VARIABLE) == "torch":
        return head_torch
    # Here, since it needs Triton, which a machine without CUDA need not have.
    from rapo_verl.method import head_triton

    return head_triton


class _How(NamedTuple):
    """``taken``: rows of the logits to take, or None for all; the other tensors have those alone."""

    taken: torch.Tensor | None
    group: dist.ProcessGroup | None
    start: int
    sweeps: ModuleType
    chunk: int
    in_place: bool

    def chunks(self, n: int) -> Iterator[tuple[slice, slice | torch.Tensor]]:
        """Yield the places of a chunk of the n tokens, and its rows of the logits."""
        for s in range(0, n, self.chunk):
            part = slice(s, min(s + self.chunk, n))
            yield part, part if self.taken is None else self.taken[part]


class _Head(torch.autograd.Function):
    """The three outputs of `head`."""

    @staticmethod
    def forward(ctx, logits, labels, inverse, target, how):
        n, k = len(labels), target.ids.shape[1]
        out = inverse.new_empty(3, n)
        log_normaliser, tail_ratio = inverse.new_empty(n), inverse.new_empty(n)
        for part, where in how.chunks(n):
            ids, log_q, log_tail = (field[part] for field in target)
            ids = torch.cat([ids, labels[part, None]], 1)
            peak, packed = how.sweeps.sums(logits, where, inverse[part], ids, how.group, how.start)
            z_named, z_label, tail, mass, z_mean = packed.split([k, 1, 1, 1, 1], 1)
            # Of all tokens and not of tail and named: with and without a target a log-prob has the same bits.
            log_mass = mass[:, 0].log()
            log_p = z_named - log_mass[:, None]
            # A tail below the smallest number counts as that number: a finite KL and gradient.
            log_tail_p = tail[:, 0].clamp_min(torch.finfo(tail.dtype).tiny).log() - log_mass
            out[0, part] = z_label[:, 0] - log_mass
            out[1, part] = log_mass - z_mean[:, 0] / log_mass.exp()
            out[2, part] = _divergence(log_q, log_p).sum(1) + _divergence(log_tail, log_tail_p)
            log_normaliser[part] = peak + log_mass
            tail_ratio[part] = (log_tail - log_tail_p).exp()
        has_target = (target.log_prob.amax(1) if k else target.log_tail).maximum(target.log_tail) > -torch.inf
        out[2].masked_fill_(~has_target, 0)
        ctx.save_for_backward(logits)
        ctx.kept = labels, inverse, target, how, out[1].clone(), log_normaliser, tail_ratio
        ctx.set_materialize_grads(False)
        if how.taken is not None:
            out = out.new_zeros(3, len(logits)).index_copy_(1, how.taken, out)
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        (logits,) = ctx.saved_tensors
        labels, inverse, target, how, entropy, log_normaliser, tail_ratio = ctx.kept
        g1, g2, g3 = (torch.zeros_like(inverse) if g is None else _taken(g, how.taken) * inverse for g in upstream)
        common = g3 * (target.log_prob.exp().sum(1) + target.log_tail.exp()) - g1 - g2 * entropy
        terms = GradientTerms(
            labels, target.ids, inverse, log_normaliser, shared=common - g3 * tail_ratio, common=common, g1=g1,
            g2=None if upstream[1] is None else g2, named=g3[:, None] * target.log_prob.exp(),
        )  # fmt: skip
        # .detach(): the gradient is no more than that, also where it lies in the logits' memory.
        gradient = logits.detach() if how.in_place else torch.empty_like(logits)
        if how.taken is not None:
            others = torch.ones(len(logits), dtype=torch.bool, device=logits.device).index_fill_(0, how.taken, False)
            gradient.index_fill_(0, others.nonzero()[:, 0], 0)
        for part, where in how.chunks(len(labels)):
            how.sweeps.write_gradient(gradient, logits, where, terms.rows(part), how.start)
        return gradient, None, None, None, None


def _taken(values: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    return values if index is None else values[index]


def _divergence(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Return q log(q / p) - q + p of each outcome, without a NaN where q = 0."""
    q = log_q.exp()
    return torch.where(q > 0, q * (log_q - log_p) - q, 0) + log_p.exp()


def _check_shapes(logits, labels, temperature, target, rows) -> tuple[int, int]:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be float of shape (tokens, vocabulary), got {logits.dtype} {tuple(logits.shape)}"
        )
    n = len(logits)
    named = {"labels": labels} | ({} if rows is None else {"rows": rows})
    if isinstance(temperature, torch.Tensor) and temperature.dim():
        named["temperature"] = temperature
    if target is not None:
        if target.ids.dim() != 2 or target.ids.shape != target.log_prob.shape:
            raise ValueError(
                "target.ids and target.log_prob must have one shape (tokens, k), got "
                f"{tuple(target.ids.shape)} and {tuple(target.log_prob.shape)}"
            )
        named |= {"target.ids": target.ids[:, 0] if target.ids.shape[1] else labels, "target.log_tail": target.log_tail}
    for name, value in named.items():
        if value.shape != (n,):
            raise ValueError(f"{name} must have {n} rows as the logits, got shape {tuple(value.shape)}")
        allowed = {"labels": "int", "target.ids": "int", "rows": "bool"}.get(name, "float")
        is_one = "float" if value.is_floating_point() else "bool" if value.dtype == torch.bool else "int"
        if is_one != allowed:
            raise ValueError(f"{name} has dtype {value.dtype}; allowed: {allowed}")
    return n, logits.shape[1]


def _check_values(labels, inverse, target, vocabulary, index) -> None:
    """Refuse what `head` says it refuses; the target's ids ascend."""
    problems = {
        f"a label outside the vocabulary of {vocabulary}": (labels < 0) | (labels >= vocabulary),
        f"a target id outside the vocabulary of {vocabulary}": ((target.ids < 0) | (target.ids >= vocabulary)).any(1),
        "a target id twice": (target.ids[:, 1:] == target.ids[:, :-1]).any(1),
        "a temperature that is not positive and finite": ~(torch.isfinite(inverse) & (inverse > 0)),
        "a target log-probability that is NaN or +inf": ~(
            (target.log_prob < torch.inf).all(1) & (target.log_tail < torch.inf)
        ),
    }
    found = torch.stack(list(problems.values()))
    if found.any():
        problem, row = found.nonzero()[0].tolist()
        row = row if index is None else int(index[row])
        raise ValueError(f"row {row} has {list(problems)[problem]}")
