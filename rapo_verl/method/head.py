"""Log-probability, entropy and forward KL of a language model's head: one chunked pass, closed-form gradient.

Pure torch, with `rapo_verl.method.head_triton` for its two sweeps over the logits on CUDA. Nothing of the size
[tokens, vocabulary] is made in the forward or kept for the backward but the logits themselves; the backward makes their
gradient and no other such tensor. The vocabulary may be split over a process group (tensor parallel): one MAX and one
packed SUM per chunk in the forward, nothing in the backward. All arithmetic is fp32 (fp64 for fp64 logits) and free of
matrix products, which autocast and TF32 would round.
"""

import math
from collections.abc import Iterator
from functools import partial
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
# On CUDA: Triton's kernels up to so many named tokens, since each costs them a pass over its block of columns.
TRITON_NAMED = 512


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
    inverse = inverse_of(temperature, n, dtype, logits.device)
    k = 0 if target is None else target.ids.shape[1]
    if k > vocabulary:
        raise ValueError(f"the target names {k} tokens of a vocabulary of {vocabulary}")
    sweeps = sweeps_for(logits, k)
    if sweeps is not head_torch and logits.stride(1) != 1:
        logits = logits.contiguous()
    how = How(rows, group, start, sweeps, gradient_in_place, vocabulary, target is not None)
    return HeadOutput(*_Head.apply(logits, labels.contiguous(), inverse, _ascending(target, inverse), how))


def chunk_size(n: int, columns: int, device: torch.device) -> int:
    """Return how many tokens to take at a time."""
    elements = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"])
    return max(1, min(elements // columns, n // CHUNKS_AT_LEAST))


def sweeps_for(logits: torch.Tensor, named: int) -> ModuleType:
    """Return the module whose `sums` and `write_gradient` read the logits."""
    if not logits.is_cuda or named > TRITON_NAMED:
        return head_torch
    # Here, since it needs Triton, which a machine without CUDA need not have.
    from rapo_verl.method import head_triton

    return head_triton


def inverse_of(temperature: torch.Tensor | float, n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return 1 / T of each of n tokens."""
    if not isinstance(temperature, torch.Tensor):
        temperature = torch.full((), temperature, dtype=dtype, device=device)  # made there: a copy would wait for it
    return temperature.to(dtype).reciprocal().expand(n).contiguous()


def _ascending(target: Target | None, inverse: torch.Tensor) -> Target:
    """Return the target in the dtype of ``inverse`` with ids that ascend in each row; none named for None."""
    if target is None:
        names = inverse.new_empty(len(inverse), 0)
        return Target(names.long(), names, torch.full_like(inverse, -torch.inf))
    ids, order = target.ids.sort(1)
    log_prob = target.log_prob.detach().to(inverse.dtype).gather(1, order)
    return Target(ids, log_prob, target.log_tail.detach().to(inverse.dtype))


class How(NamedTuple):
    """By which sweeps, and over which rows of the logits; ``start`` is the id of this shard's first column."""

    rows: torch.Tensor | None
    group: dist.ProcessGroup | None
    start: int
    sweeps: ModuleType
    in_place: bool = False
    vocabulary: int = 0
    has_target: bool = False

    def chunks(self, logits: torch.Tensor) -> Iterator[tuple[slice | torch.Tensor, slice | torch.Tensor]]:
        """Yield the tokens to take at a time, and those again for the sweeps; Triton's take all, with a mask."""
        n, columns = logits.shape
        if self.sweeps is not head_torch:
            yield slice(None), slice(None) if self.rows is None else self.rows
            return
        size = chunk_size(n, columns, logits.device)
        parts = (
            [slice(s, s + size) for s in range(0, n, size)] if self.rows is None else _indices(self.rows).split(size)
        )
        yield from zip(parts, parts)


class _Head(torch.autograd.Function):
    """The three outputs of `head`."""

    @staticmethod
    def forward(ctx, logits, labels, inverse, target, how):
        found = inverse.new_empty(6, len(labels))
        for part, where in how.chunks(logits):
            ids, log_q, log_tail = (field[part] for field in target)
            peak, packed = how.sweeps.sums(logits, where, inverse[part], labels[part], ids, how.group, how.start)
            found[:, part] = torch.stack(_of_sums(peak, packed, log_q, log_tail, how.has_target))
        if how.rows is not None:
            found.masked_fill_(~how.rows, 0)
        log_prob, entropy, forward_kl, log_normaliser, mass, tail_ratio = found
        # After the sweep, which is safe against what is refused: the host then waits for the device once. Triton's
        # gives NaN for that, and its few numbers are cheaper to look at than all that may be wrong.
        if how.sweeps is head_torch or not math.isfinite((entropy + mass).sum().item()):
            _check_values(labels, inverse, target, how.vocabulary, entropy, how.rows)
        ctx.save_for_backward(logits)
        ctx.how = how
        q = target.log_prob.exp()
        ctx.terms_of = partial(
            GradientTerms, labels, target.ids, q, mass, tail_ratio, inverse, log_normaliser, entropy.clone()
        )
        ctx.set_materialize_grads(False)
        return log_prob, entropy, forward_kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        (logits,), how = ctx.saved_tensors, ctx.how
        zeros = logits.new_zeros(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
        g1, g2, g3 = upstream
        terms = ctx.terms_of(zeros if g1 is None else g1, g2, zeros if g3 is None else g3)
        # .detach(): the gradient is no more than that, also where it lies in the logits' memory.
        gradient = logits.detach() if how.in_place else torch.empty_like(logits)
        if how.rows is not None and how.sweeps is head_torch:
            gradient.index_fill_(0, _indices(~how.rows), 0)
        for part, where in how.chunks(logits):
            how.sweeps.write_gradient(gradient, logits, where, terms.rows(part), how.start)
        return gradient, None, None, None, None


def _of_sums(
    peak: torch.Tensor, packed: torch.Tensor, log_q: torch.Tensor, log_tail: torch.Tensor, has_target: bool
) -> tuple[torch.Tensor, ...]:
    """Return log-prob, entropy, forward KL, log sum e^z, the target's mass and its tail over p's, each (c,)."""
    log_prob, entropy, log_mass = log_prob_and_entropy(packed)
    if not has_target:
        zero = torch.zeros_like(entropy)
        return log_prob, entropy, zero, peak + log_mass, zero, zero
    # A tail below the smallest number counts as that number: a finite KL and gradient.
    log_tail_p = packed[:, -3].clamp_min(torch.finfo(packed.dtype).tiny).log() - log_mass
    log_p = torch.cat([packed[:, : log_q.shape[1]] - log_mass[:, None], log_tail_p[:, None]], 1)
    log_q = torch.cat([log_q, log_tail[:, None]], 1)
    q = log_q.exp()
    mass = q.sum(1)
    divergence = (torch.where(q > 0, q * (log_q - log_p) - q, 0) + log_p.exp()).sum(1).masked_fill(mass == 0, 0)
    return log_prob, entropy, divergence, peak + log_mass, mass, (log_tail - log_tail_p).exp()


def log_prob_and_entropy(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-prob of the label, entropy and log sum e^(z - m) from the sums of a sweep, each of shape (c,)."""
    z_label, _, mass, z_mean = packed[:, -4:].unbind(1)
    # Of all tokens and not of tail and named: with and without a target a log-prob has the same bits.
    log_mass = mass.log()
    return z_label - log_mass, log_mass - z_mean / mass, log_mass


def _indices(rows: torch.Tensor) -> torch.Tensor:
    return rows.nonzero()[:, 0]


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


def _check_values(labels, inverse, target, vocabulary, entropy, rows) -> None:
    """Refuse what `head` says it refuses; the target's ids ascend."""
    problems = {
        f"row %d has a label outside the vocabulary of {vocabulary}": (labels < 0) | (labels >= vocabulary),
        f"row %d has a target id outside the vocabulary of {vocabulary}": (
            (target.ids < 0) | (target.ids >= vocabulary)
        ).any(1),
        "row %d has a target id twice": (target.ids[:, 1:] == target.ids[:, :-1]).any(1),
        "row %d has a temperature that is not positive and finite": ~(torch.isfinite(inverse) & (inverse > 0)),
        "row %d has a target log-probability that is NaN or +inf": ~(
            (target.log_prob < torch.inf).all(1) & (target.log_tail < torch.inf)
        ),
        "the logits of row %d hold NaN or infinity; nothing can be computed from them": ~torch.isfinite(entropy),
    }
    refuse_first(problems, rows)


def refuse_first(problems: dict[str, torch.Tensor], rows: torch.Tensor | None) -> None:
    """Raise ValueError with the first problem that any token has and that token's row; waits for the device once.

    Args:
        problems: for each text, with the row as %d, which tokens have it, bool, shape (n,).
        rows: tokens that count, bool, shape (n,), or None for all.
    """
    found = torch.stack(list(problems.values()))
    found = found if rows is None else found & rows
    if found.any():
        problem, row = found.nonzero()[0].tolist()
        raise ValueError(list(problems)[problem] % row)
