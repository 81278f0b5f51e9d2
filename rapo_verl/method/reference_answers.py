r"""The forward KL(reference ‖ policy) from the reference's own answers: what the policy no longer says can still pull.

`forward_kl` estimates it on the policy's samples, where an answer that the policy has dropped gives no signal. Here the
samples y_1..y_m are the reference's, so that no ratio is needed: up to the reference's entropy,

    KL(ref ‖ pi) = -E_ref[log pi(y)],    gradient -(1/m) sum_i grad log pi(y_i).

The reference may be reweighted by reward, ref(y) omega(r(y)) / Z: omega is 1 for a right answer and ``weight_of_wrong``
for another; 0 keeps right answers only, 1 is the plain forward KL. An extension of ours to arXiv 2510.03865.
"""

import torch


def answer_shares(counts: torch.Tensor, right: torch.Tensor, *, weight_of_wrong: float = 0.0) -> torch.Tensor:
    """Return each distinct answer's share of the reweighted reference: count * omega over their sum.

    They sum to 1, or are all zero where no answer has a weight.

    Args:
        counts: how often the reference gave each answer to this prompt, shape (answers).
        right: bool, same shape.
        weight_of_wrong: omega of an answer that is not right, in [0, 1].
    """
    weights = counts.double() * torch.where(right, 1.0, float(weight_of_wrong))
    return weights / weights.sum() if weights.sum() > 0 else weights


def drawn_shares(shares: torch.Tensor, k: int, uniform: float) -> torch.Tensor:
    """Return the shares of at most k answers, shape (answers), whose expectation over ``uniform`` is ``shares``.

    Where no more than k answers have a share, they are returned as they are. Else a systematic draw: one random
    number places k points at equal distances on the shares laid end to end, so that an answer of share p is drawn
    floor(k p) or ceil(k p) times.

    Args:
        shares: of a prompt's answers, shape (answers), sum 1 or 0.
        k: at least 1.
        uniform: in [0, 1).
    """
    if int((shares > 0).sum()) <= k:
        return shares
    points = (torch.arange(k, dtype=torch.float64) + uniform) / k
    ends = shares.cumsum(0)
    # Of the last answer with a share, whose end rounding may have put below the last point.
    last = int(shares.nonzero()[-1])
    drawn = torch.searchsorted(ends, points, right=True).clamp(max=last)
    return torch.bincount(drawn, minlength=len(shares)).double() / k


def token_weights(
    shares: torch.Tensor, lengths: torch.Tensor, *, loss_agg_mode: str, horizon: float | None = None
) -> torch.Tensor:
    """Return the weight of -log pi of each token of an answer, as verl's ``loss_agg_mode`` means it for one prompt.

    A prompt counts once, whatever the number and length of its answers: ``token-mean`` is the mean over the tokens of
    its answers, ``seq-mean-token-mean`` the mean over answers of their tokens' mean, ``seq-mean-token-sum`` the mean
    over answers of -log pi(y), ``seq-mean-token-sum-norm`` that over a constant.

    Args:
        shares: of a prompt's answers, shape (answers); the weight is zero where the share is.
        lengths: in tokens, same shape.
        loss_agg_mode: verl's name; ``token-sum`` is no mean and refused.
        horizon: the constant of ``seq-mean-token-sum-norm``, in tokens.
    """
    lengths = lengths.double()
    if loss_agg_mode == "token-mean":
        return shares / (shares * lengths).sum().clamp_min(torch.finfo(torch.float64).tiny)
    if loss_agg_mode == "seq-mean-token-mean":
        return shares / lengths
    if loss_agg_mode == "seq-mean-token-sum":
        return shares
    if loss_agg_mode == "seq-mean-token-sum-norm" and horizon:
        return shares / horizon
    raise ValueError(
        f"loss_agg_mode {loss_agg_mode!r} with horizon {horizon} gives a prompt no mean; allowed: token-mean, "
        "seq-mean-token-mean, seq-mean-token-sum, seq-mean-token-sum-norm with a horizon"
    )


def reference_answers_loss(log_prob: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return sum_i w_i sum_t -log pi(y_it), a scalar of at least fp32; its gradient is that of the forward KL.

    Args:
        log_prob: log pi of the answers' tokens, shape (rows, response), float.
        mask: bool or 0/1, same shape; elsewhere ``log_prob`` may hold anything, NaN included.
        weights: of each row's tokens, shape (rows,); a row of weight 0 contributes nothing.
    """
    kept = mask.bool() & (weights > 0)[:, None]
    # NaN outside must not reach the arithmetic: nan * 0 is nan, in values and in gradients.
    log_prob = torch.where(kept, log_prob.to(torch.promote_types(log_prob.dtype, torch.float32)), 0.0)
    return -(weights.to(log_prob.dtype) * log_prob.sum(1)).sum()
