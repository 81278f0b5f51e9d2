"""The head's two sweeps over the logits as Triton kernels: the functions of `rapo_verl.method.head_torch` for CUDA.

One program for each token, block by block over its columns. The forward reads the logits once, with an online softmax;
the backward reads them once and writes the gradient once, over the logits where the caller allows it. The named tokens
ascend, so that a sweep meets each in its block and needs no mask of the size of the logits. Columns are neighbours in
memory; `head` sees to it.

Seen to compile for sm_80, sm_90 and sm_100 and to agree with torch in Triton's interpreter; not yet run on a GPU.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from rapo_verl.method.head_torch import GradientTerms, local_columns

# Columns of a block and warps of a program. Eight bf16 logits for each thread of the gradient are one load of 16 bytes;
# with sixteen the compiler spills registers.
BLOCK, SUMS_WARPS, GRADIENT_WARPS = 4096, 8, 16
# Below any logit: minus infinity as the first maximum would give inf - inf.
_LOWEST = tl.constexpr(-3e38)


@triton.jit
def _sums_kernel(logits, index, inverse, ids, out, columns, start, named, row_stride, BLOCK: tl.constexpr):
    """Write to out (4, tokens) of z = logits / T over this shard's columns: see `sums`."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + tl.load(index + token) * row_stride
    scale = tl.load(inverse + token)
    # The label is the last of a token's ids, and not for this sweep.
    at, last = token * (named + 1), token * (named + 1) + named
    next_column = tl.load(ids + at, mask=at < last, other=start + columns) - start
    while next_column < 0:  # of the shards before
        at += 1
        next_column = tl.load(ids + at, mask=at < last, other=start + columns) - start
    peak = tl.full((), _LOWEST, scale.dtype)
    tail = tl.zeros((), scale.dtype)
    total = tl.zeros((), scale.dtype)
    mean = tl.zeros((), scale.dtype)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        real = column < columns
        z = tl.load(row + column, mask=real, other=-float("inf")).to(scale.dtype) * scale
        higher = tl.maximum(peak, tl.max(z, 0))
        z -= higher
        p = tl.exp(z)
        shrink = tl.exp(peak - higher)
        mean = (mean + (peak - higher) * total) * shrink + tl.sum(tl.where(real, z * p, 0.0), 0)
        total = total * shrink + tl.sum(p, 0)
        # A sum of what is left, not one minus the rest: see head_torch.
        while next_column < tl.minimum(first + BLOCK, columns):
            p = tl.where(column == next_column, 0.0, p)
            at += 1
            next_column = tl.load(ids + at, mask=at < last, other=start + columns) - start
        tail = tail * shrink + tl.sum(p, 0)
        peak = higher
    tokens = tl.num_programs(0)
    tl.store(out + token, peak)
    tl.store(out + tokens + token, tail)
    tl.store(out + 2 * tokens + token, total)
    tl.store(out + 3 * tokens + token, mean)


@triton.jit
def _gradient_kernel(
    logits, gradient, index, inverse, log_normaliser, shared, common, g1, g2, labels, ids, values,
    columns, start, named, row_stride, gradient_row_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one token's logits: see `GradientTerms`."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(index + token)
    row, gradient_row = logits + place * row_stride, gradient + place * gradient_row_stride
    scale, normaliser = tl.load(inverse + token), tl.load(log_normaliser + token)
    of_others, of_named = tl.load(shared + token), tl.load(common + token)
    of_label, of_entropy = tl.load(g1 + token), tl.load(g2 + token)
    label_column = tl.load(labels + token) - start
    at, last = token * named, (token + 1) * named
    next_column = tl.load(ids + at, mask=at < last, other=start + columns) - start
    while next_column < 0:
        at += 1
        next_column = tl.load(ids + at, mask=at < last, other=start + columns) - start
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        real = column < columns
        z = tl.load(row + column, mask=real, other=0.0).to(scale.dtype)
        log_p = z * scale - normaliser
        factor = tl.zeros((BLOCK,), scale.dtype) + of_others
        added = tl.where(column == label_column, of_label, 0.0)
        while next_column < tl.minimum(first + BLOCK, columns):
            hit = column == next_column
            factor = tl.where(hit, of_named, factor)
            added = tl.where(hit, added - tl.load(values + at), added)
            at += 1
            next_column = tl.load(ids + at, mask=at < last, other=start + columns) - start
        found = tl.exp(log_p) * (factor - of_entropy * log_p) + added
        tl.store(gradient_row + column, found.to(gradient.dtype.element_ty), mask=real)


def sums(
    logits: torch.Tensor, where: slice | torch.Tensor, inverse: torch.Tensor, ids: torch.Tensor, group, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `head_torch.sums` does; the ids but the last ascend."""
    index, inverse = _index(where, logits.device), inverse.contiguous()
    out = inverse.new_empty(4, len(index))
    columns, named = logits.shape[1], ids.shape[1] - 1
    # Kernels are launched where the logits are, which may not be the current device.
    with torch.cuda.device_of(logits):
        _sums_kernel[(len(index),)](
            logits, index, inverse, ids, out, columns, start, named, logits.stride(0), BLOCK=_block(columns),
            num_warps=SUMS_WARPS,
        )  # fmt: skip
    own, tail, total, mean = out
    peak = own
    if group is not None:
        peak = own.clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
        # From this shard's maximum to that of all.
        shift = own - peak
        mean, tail, total = (mean + shift * total) * shift.exp(), tail * shift.exp(), total * shift.exp()
    local, inside = local_columns(ids, start, columns)
    at_ids = (logits[index[:, None], local] * inverse[:, None] - peak[:, None]) * inside
    packed = torch.cat([at_ids, tail[:, None], total[:, None], mean[:, None]], 1)
    if group is not None:
        dist.all_reduce(packed, group=group)
    return peak, packed


def write_gradient(
    gradient: torch.Tensor, logits: torch.Tensor, where: slice | torch.Tensor, terms: GradientTerms, start: int
) -> None:
    """Do what `head_torch.write_gradient` does."""
    index, columns = _index(where, logits.device), logits.shape[1]
    g2 = torch.zeros_like(terms.g1) if terms.g2 is None else terms.g2
    with torch.cuda.device_of(logits):
        _gradient_kernel[(len(index),)](
            logits, gradient, index, terms.inverse.contiguous(), terms.log_normaliser, terms.shared, terms.common,
            terms.g1, g2, terms.labels, terms.ids, terms.named, columns, start, terms.ids.shape[1], logits.stride(0),
            gradient.stride(0), BLOCK=_block(columns), num_warps=GRADIENT_WARPS,
        )  # fmt: skip
    # PyTorch does not see a kernel write: this is what stops a second backward over logits that are no more.
    torch.autograd.graph.increment_version(gradient)


def _index(where: slice | torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.arange(where.start, where.stop, device=device) if isinstance(where, slice) else where


def _block(columns: int) -> int:
    return min(BLOCK, triton.next_power_of_2(columns))
