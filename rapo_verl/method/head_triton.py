"""The head's two sweeps over the logits as Triton kernels: the functions of `rapo_verl.method.head_torch` for CUDA.

One program for each token, a block of its columns at a time and the next on its way. The forward reads the logits once,
with an online softmax of each thread's own, so that threads meet at a row's end only; the backward reads them once and
writes the gradient once, over the logits where the caller allows it. Columns are neighbours in memory; `head` sees to
it. A target's ids ascend, so that the forward meets each in its block.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from rapo_verl.method.head_torch import GradientTerms, local_columns

# Warps of a program, and loads of a thread for a block: each is of eight logits, which are 16 bytes in bf16.
THREADS_OF_WARP = 32
SUMS_WARPS, SUMS_LOADS = 4, 1
GRADIENT_WARPS, GRADIENT_LOADS = 16, 2
# Below any logit: minus infinity as the first maximum would give inf - inf.
_LOWEST = tl.constexpr(-1e38)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _columns_of_block(THREADS: tl.constexpr, LOADS: tl.constexpr):
    """Return columns (LOADS, THREADS, 8): sums over all axes but the middle one stay in a thread."""
    load, thread = tl.arange(0, LOADS)[:, None, None], tl.arange(0, THREADS)[None, :, None]
    return (load * THREADS + thread) * 8 + tl.arange(0, 8)[None, None, :]


@triton.jit
def _sum_of_thread(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _named_column(ids, at, last, columns, start):
    """Return the column of the id at a place, or one behind all columns where a token's ids end."""
    return (tl.load(ids + at, mask=at < last, other=start + columns) - start).to(tl.int32)


@triton.jit
def _write_known(
    row, row_packed, labels, ids, top, scale, columns, start, vocabulary, named,
    NAMED: tl.constexpr,
):  # fmt: skip
    """Write the scaled logits of the named columns and of the label, less the maximum; 0 for another shard's.

    Returns whether label, ids and temperature are what they must be.
    """
    label = tl.load(labels)
    good = (scale > 0) & (scale < float("inf")) & (label >= 0) & (label < vocabulary)
    label -= start
    inside = (label >= 0) & (label < columns)
    z = (tl.load(row + label, mask=inside, other=0.0).to(scale.dtype) - top) * scale
    tl.store(row_packed + named, tl.where(inside, z, 0.0))
    name = tl.arange(0, NAMED)
    column = tl.load(ids + name, mask=name < named, other=0)
    before = tl.load(ids + name - 1, mask=(name > 0) & (name < named), other=-1)
    good &= tl.min(((column > before) & (column < vocabulary) | (name >= named)).to(tl.int32), 0) > 0
    column = tl.where(name < named, column - start, -1)
    inside = (column >= 0) & (column < columns)
    z = (tl.load(row + column, mask=inside, other=0.0).to(scale.dtype) - top) * scale
    tl.store(row_packed + name, tl.where(inside, z, 0.0), mask=name < named)
    return good


@triton.jit
def _sums_kernel(
    logits, rows, inverse, labels, ids, peaks, packed, columns, start, vocabulary, named, row_stride,
    THREADS: tl.constexpr, LOADS: tl.constexpr, NAMED: tl.constexpr,
):  # fmt: skip
    """Write to peaks (tokens,) and packed (tokens, named + 4) what `sums` returns, of this shard alone."""
    token = tl.program_id(0).to(tl.int64)
    if rows is not None:  # noqa: SIM102 - decided when it is compiled
        if tl.load(rows + token) == 0:
            return
    row = logits + token * row_stride
    scale = tl.load(inverse + token)
    rate = scale * _LOG2E
    at, last = token * named, (token + 1) * named
    next_named = _named_column(ids, at, last, columns, start)
    while next_named < 0:  # of the shards before
        at += 1
        next_named = _named_column(ids, at, last, columns, start)
    peak = tl.full((THREADS,), _LOWEST, scale.dtype)
    total = tl.zeros((THREADS,), scale.dtype)
    tail = tl.zeros((THREADS,), scale.dtype)
    mean = tl.zeros((THREADS,), scale.dtype)
    offset = _columns_of_block(THREADS, LOADS)
    # What no logit counts beside, and a number of their dtype.
    nothing = -65504.0 if logits.dtype.element_ty == tl.float16 else _LOWEST
    block = row + offset
    coming = tl.load(block, mask=offset < columns, other=nothing)
    for first in range(0, columns, THREADS * LOADS * 8):
        x = coming.to(scale.dtype)
        left = columns - first - THREADS * LOADS * 8
        block += THREADS * LOADS * 8
        coming = tl.load(block, mask=offset < left, other=nothing)
        higher = tl.maximum(peak, tl.max(tl.max(x, 2), 0))
        # Less the maximum before they are scaled: as precise, and no overflow of what a model masks by the lowest bf16.
        x -= higher[None, :, None]
        p = tl.exp2(x * rate)
        shift = peak - higher
        shrink = tl.exp2(shift * rate)
        mean = mean * shrink + shift * shrink * total + _sum_of_thread(x * p)
        of_block = _sum_of_thread(p)
        total = total * shrink + of_block
        end = tl.minimum(first + THREADS * LOADS * 8, columns)
        if next_named < end:
            # A sum of what is left, not one minus the rest: see head_torch.
            while next_named < end:
                p = tl.where(offset == next_named - first, 0.0, p)
                at += 1
                next_named = _named_column(ids, at, last, columns, start)
            of_block = _sum_of_thread(p)
        tail = tail * shrink + of_block
        peak = higher
    # A thread that has seen no column has the lowest peak, which must meet its zero before it meets a sum.
    top = tl.max(peak, 0)
    shift = peak - top
    shrink = tl.exp2(shift * rate)
    tl.store(peaks + token, top * scale)
    row_packed = packed + token * (named + 4)
    good = _write_known(
        row, row_packed, labels + token, ids + token * named, top, scale, columns, start, vocabulary, named, NAMED
    )
    tl.store(row_packed + named + 1, tl.sum(tail * shrink, 0))
    tl.store(row_packed + named + 2, tl.where(good, tl.sum(total * shrink, 0), float("nan")))
    tl.store(row_packed + named + 3, tl.sum(mean * shrink + shift * shrink * total, 0) * scale)


@triton.jit
def _by_softmax(x, scale, normaliser, factor, g2):
    log_p = x * scale - normaliser
    return tl.exp2(log_p * _LOG2E) * (factor - g2 * log_p)


@triton.jit
def _gradient_kernel(
    logits, rows, gradient, upstream, inverse, log_normaliser, entropy, mass, tail_ratio, labels, ids, q,
    columns, start, named, row_stride, gradient_row_stride,
    THREADS: tl.constexpr, LOADS: tl.constexpr, NAMED: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one token's logits: see `GradientTerms`."""
    token, tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    row, gradient_row = logits + token * row_stride, gradient + token * gradient_row_stride
    kind = gradient.dtype.element_ty
    offset = _columns_of_block(THREADS, LOADS)
    if rows is not None:  # noqa: SIM102 - decided when it is compiled
        if tl.load(rows + token) == 0:
            for first in range(0, columns, THREADS * LOADS * 8):
                nothing = tl.zeros((LOADS, THREADS, 8), kind)
                tl.store(gradient_row + first + offset, nothing, mask=first + offset < columns)
            return
    scale, normaliser = tl.load(inverse + token), tl.load(log_normaliser + token)
    g1, g2 = tl.load(upstream + token) * scale, tl.load(upstream + tokens + token) * scale
    g3 = tl.load(upstream + 2 * tokens + token) * scale
    of_named = g3 * tl.load(mass + token) - g1 - g2 * tl.load(entropy + token)
    of_others = of_named - g3 * tl.load(tail_ratio + token)
    # The named tokens and the label get theirs by themselves, after the sweep, from logits read before it.
    label = tl.load(labels + token) - start
    has_label = (label >= 0) & (label < columns)
    x = tl.load(row + label, mask=has_label, other=0.0).to(scale.dtype)
    at_label = _by_softmax(x, scale, normaliser, of_others, g2) + g1
    name = tl.arange(0, NAMED)
    column = tl.load(ids + token * named + name, mask=name < named, other=start - 1) - start
    inside = (column >= 0) & (column < columns)
    x_named = tl.load(row + column, mask=inside, other=0.0).to(scale.dtype)
    at_named = _by_softmax(x_named, scale, normaliser, of_named, g2) + tl.where(column == label, g1, 0.0)
    at_named -= g3 * tl.load(q + token * named + name, mask=inside, other=0.0)
    has_label = has_label & (tl.max((column == label).to(tl.int32), 0) == 0)
    block, block_of_gradient = row + offset, gradient_row + offset
    coming = tl.load(block, mask=offset < columns, other=0.0)
    tl.debug_barrier()
    for first in range(0, columns, THREADS * LOADS * 8):
        found = _by_softmax(coming.to(scale.dtype), scale, normaliser, of_others, g2)
        left = columns - first
        block += THREADS * LOADS * 8
        coming = tl.load(block, mask=offset < left - THREADS * LOADS * 8, other=0.0)
        tl.store(block_of_gradient, found.to(kind), mask=offset < left)
        block_of_gradient += THREADS * LOADS * 8
    tl.debug_barrier()
    tl.store(gradient_row + column, at_named.to(kind), mask=inside)
    tl.store(gradient_row + label, at_label.to(kind), mask=has_label)


def sums(
    logits: torch.Tensor,
    where: slice | torch.Tensor,
    inverse: torch.Tensor,
    labels: torch.Tensor,
    ids: torch.Tensor,
    group: dist.ProcessGroup | None,
    start: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `head_torch.sums` does, for all tokens: those off the mask ``where`` hold anything.

    Ids ascend. A token with a label, an id or a temperature that `head` refuses has NaN for the sum over all tokens.
    """
    (n, columns), k = logits.shape, ids.shape[1]
    vocabulary = columns * (1 if group is None else dist.get_world_size(group))
    peak, packed = inverse.new_empty(n), inverse.new_empty(n, k + 4)
    settings = {"THREADS": THREADS_OF_WARP * SUMS_WARPS, "LOADS": SUMS_LOADS, "num_warps": SUMS_WARPS}
    arguments = (inverse, labels, ids, peak, packed, columns, start, vocabulary, k, logits.stride(0))
    _launch(_sums_kernel, logits, where, k, settings, arguments)
    if group is not None:
        own = peak.clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
        # From this shard's maximum to that of all.
        shift = (own - peak)[:, None]
        packed[:, -3:] *= shift.exp()
        packed[:, -1:] += shift * packed[:, -2:-1]
        packed[:, :-3] += shift * local_columns(torch.cat([ids, labels[:, None]], 1), start, columns)[1]
        dist.all_reduce(packed, group=group)
    return peak, packed


def write_gradient(
    gradient: torch.Tensor, logits: torch.Tensor, where: slice | torch.Tensor, terms: GradientTerms, start: int
) -> None:
    """Do what `head_torch.write_gradient` does, for all tokens: those off the mask ``where`` get zeros."""
    columns, k = logits.shape[1], terms.ids.shape[1]
    g2 = torch.zeros_like(terms.g1) if terms.g2 is None else terms.g2
    settings = {"THREADS": THREADS_OF_WARP * GRADIENT_WARPS, "LOADS": GRADIENT_LOADS, "num_warps": GRADIENT_WARPS}
    arguments = (
        gradient, torch.stack([terms.g1, g2, terms.g3]), terms.inverse, terms.log_normaliser, terms.entropy, terms.mass,
        terms.tail_ratio, terms.labels, terms.ids, terms.q, columns, start, k, logits.stride(0), gradient.stride(0),
    )  # fmt: skip
    _launch(_gradient_kernel, logits, where, k, settings, arguments)
    # PyTorch does not see a kernel write: this is what stops a second backward over logits that are no more.
    torch.autograd.graph.increment_version(gradient)


def _launch(
    kernel, logits: torch.Tensor, where: slice | torch.Tensor, k: int, settings: dict, arguments: tuple
) -> None:
    rows = where if isinstance(where, torch.Tensor) else None
    # Where the logits are, which may not be the current device.
    with torch.cuda.device_of(logits):
        kernel[(len(logits),)](logits, rows, *arguments, NAMED=triton.next_power_of_2(max(k, 1)), **settings)
