"""RAPO's loss on micro-batches laid out as veRL lays them out: jagged fields, shifted log-probs, global normalisers."""

import dataclasses
import math
from functools import cache

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.metric import Metric
from verl.workers.config import FSDPActorConfig
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from rapo_verl.method.config import ForwardKLConfig, RapoConfig
from rapo_verl.method.forward_kl import forward_kl_estimate
from rapo_verl.run.compose import compose_config
from rapo_verl.training.loss import rapo_policy_loss

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
PROMPTS, RESPONSES = (3, 1, 2, 4, 2), (5, 2, 7, 1, 4)
ALPHA, BETA = 0.3, 0.05
# fp32 sums over at most 19 tokens of size up to 1e2, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@cache
def composed() -> DictConfig:
    return compose_config(["experiment=toy_rapo_cpu"]).actor_rollout_ref.actor


def actor_config(**changes) -> FSDPActorConfig:
    """Return veRL's actor config as rapo_verl/training/worker.py builds it."""
    return omega_conf_to_dataclass(OmegaConf.merge(composed(), {"use_kl_loss": False, **changes}))


def rapo_config(**changes) -> RapoConfig:
    return RapoConfig(forward_kl=dataclasses.replace(ForwardKLConfig(), coef=ALPHA, **changes))


class Batch:
    """Rows of a mini-batch: what the model outputs (leaves) and what the queue holds."""

    def __init__(self, seed: int = 0, masked_rows: tuple[int, ...] = ()):
        generator = torch.Generator().manual_seed(seed)

        def rows(lengths, scale):
            return [scale * torch.randn(n, generator=generator) for n in lengths]

        lengths = [p + r for p, r in zip(PROMPTS, RESPONSES)]
        self.log_probs = [(-x.abs() - 0.1).requires_grad_(True) for x in rows(lengths, 1.0)]
        self.entropy = [x.abs().requires_grad_(True) for x in rows(lengths, 1.0)]
        sampled = [x.detach()[p - 1 : -1] for x, p in zip(self.log_probs, PROMPTS)]
        self.old = [x + noise for x, noise in zip(sampled, rows(RESPONSES, 0.2))]
        self.ref = [x + noise for x, noise in zip(sampled, rows(RESPONSES, 1.5))]
        self.advantages = [x[:1].expand(n).clone() for x, n in zip(rows(RESPONSES, 1.0), RESPONSES)]
        self.mask = [torch.ones(n, dtype=torch.int64) for n in RESPONSES]
        self.mask[2][3] = 0  # as after a tool call: a hole inside the response
        for row in masked_rows:
            self.mask[row][:] = 0
        self.phi = torch.tensor([0.82, 0.8, 1.0, 0.9, 0.95])

    def tokens(self) -> int:
        return int(sum(mask.sum() for mask in self.mask))

    def sequences(self) -> int:
        return sum(bool(mask.any()) for mask in self.mask)

    def micro(self, rows, dp_size: int = 1) -> tuple[dict, TensorDict]:
        """Return model output and data of some rows, with the normalisers of the whole mini-batch."""
        rows = list(rows)

        def jagged(tensors):
            return torch.nested.as_nested_tensor([tensors[i] for i in rows], layout=torch.jagged)

        data = TensorDict(
            {
                "prompts": jagged([torch.ones(n, dtype=torch.int64) for n in PROMPTS]),
                "responses": jagged([torch.ones(n, dtype=torch.int64) for n in RESPONSES]),
                "response_mask": jagged(self.mask),
                "old_log_probs": jagged(self.old),
                "ref_log_prob": jagged(self.ref),
                "advantages": jagged(self.advantages),
                "rapo_phi": self.phi[rows],
            },
            batch_size=[len(rows)],
        )
        tu.assign_non_tensor(data, dp_size=dp_size, batch_num_tokens=self.tokens(), global_batch_size=self.sequences())
        return {"log_probs": jagged(self.log_probs), "entropy": jagged(self.entropy)}, data

    def gradients(self) -> list[torch.Tensor]:
        leaves = [*self.log_probs, *self.entropy]
        taken = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
        for leaf in leaves:
            leaf.grad = None
        return taken


ALL = range(len(PROMPTS))


def estimate_of(output, data, rapo: RapoConfig):
    padded = data.select("response_mask", "old_log_probs", "ref_log_prob").to_padded_tensor()
    return padded["response_mask"].bool(), forward_kl_estimate(
        no_padding_2_padding(output["log_probs"], data),
        padded["old_log_probs"],
        padded["ref_log_prob"],
        padded["response_mask"],
        estimator=rapo.forward_kl.estimator,
        rho_max=rapo.forward_kl.rho_max,
    )


@pytest.mark.parametrize("estimator", ["paper", "unbiased", "bounded"])
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_loss_is_verl_loss_plus_alpha_times_the_aggregated_estimate(mode, estimator):
    batch, rapo = Batch(), rapo_config(estimator=estimator)
    config = actor_config(loss_agg_mode=mode, entropy_coeff=BETA, loss_scale_factor=8)
    output, data = batch.micro(ALL)
    loss, _ = rapo_policy_loss(config, output, data, rapo=rapo)
    verl_loss, _ = ppo_loss(actor_config(loss_agg_mode=mode, entropy_coeff=BETA, loss_scale_factor=8), output, data)
    mask, estimate = estimate_of(output, data, rapo)
    added = agg_loss(
        estimate.loss, mask, mode, batch_num_tokens=batch.tokens(), global_batch_size=5, loss_scale_factor=8
    )
    assert torch.equal(loss, verl_loss + ALPHA * added)  # bit for bit: the same operations in the same order
    loss.backward()
    got = batch.gradients()
    (verl_loss + ALPHA * added).backward()
    for a, b in zip(got, batch.gradients()):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("estimator", ["topk", "full"])
def test_per_token_estimators_take_the_forward_kl_of_the_head(mode, estimator):
    batch, rapo = Batch(), rapo_config(estimator=estimator)
    output, data = batch.micro(ALL)
    values = [x.detach().abs().requires_grad_(True) for x in batch.log_probs]
    output["forward_kl"] = torch.nested.as_nested_tensor(values, layout=torch.jagged)
    config = actor_config(loss_agg_mode=mode, loss_scale_factor=8)
    loss, metrics = rapo_policy_loss(config, output, data, rapo=rapo)
    verl_loss, _ = ppo_loss(actor_config(loss_agg_mode=mode, loss_scale_factor=8), output, data)
    mask = estimate_of(output, data, rapo_config())[0]
    token_kl = no_padding_2_padding(output["forward_kl"], data)
    added = agg_loss(token_kl, mask, mode, batch_num_tokens=batch.tokens(), global_batch_size=5, loss_scale_factor=8)
    torch.testing.assert_close(loss, verl_loss + ALPHA * added, **CLOSE)
    assert metrics["rapo/forward_kl"].aggregate() == pytest.approx(float(added), rel=1e-5)  # fp32 sum
    _, sampled = rapo_policy_loss(config, output, data, rapo=rapo_config(estimator="unbiased"))
    assert metrics.keys() == sampled.keys()
    assert metrics["rapo/log_rho_mean"].aggregate() == sampled["rapo/log_rho_mean"].aggregate()
    loss.backward()
    for row, value in enumerate(values):
        on_response = torch.zeros_like(value, dtype=torch.bool)
        on_response[PROMPTS[row] - 1 : -1] = batch.mask[row].bool()
        assert ((value.grad != 0) == on_response).all()


def test_forward_kl_reads_the_log_prob_of_the_response_tokens():
    batch, rapo = Batch(), rapo_config(estimator="unbiased")
    output, data = batch.micro(ALL)
    _, metrics = rapo_policy_loss(actor_config(), output, data, rapo=rapo)
    want, log_rho = 0.0, 0.0
    for row in ALL:
        for t in range(RESPONSES[row]):
            if batch.mask[row][t]:
                # Position prompt - 1 + t of the model's output is the log-prob of response token t.
                log_prob = float(batch.log_probs[row][PROMPTS[row] - 1 + t])
                d = float(batch.ref[row][t]) - log_prob
                want += math.exp(log_prob - float(batch.old[row][t])) * (math.exp(d) * d - math.exp(d) + 1)
                log_rho += d
    assert metrics["rapo/forward_kl"].aggregate() == pytest.approx(want / batch.tokens(), rel=1e-5)  # fp32 sum
    assert metrics["rapo/log_rho_mean"].aggregate() == pytest.approx(log_rho / batch.tokens(), rel=1e-5, abs=1e-6)


def test_alpha_enters_linearly():
    batch = Batch()
    output, data = batch.micro(ALL)
    verl_loss, _ = ppo_loss(actor_config(), output, data)
    slopes = []
    for alpha in (0.1, 0.3, 1.0, 7.0):
        rapo = RapoConfig(forward_kl=ForwardKLConfig(coef=alpha))
        loss, metrics = rapo_policy_loss(actor_config(), output, data, rapo=rapo)
        slopes.append(float((loss - verl_loss) / alpha))
        assert metrics["rapo/forward_kl"].aggregate() == pytest.approx(slopes[-1], rel=1e-4)  # alpha not in it
    # fp32: the loss of order 1 carries 1e-7, divided by alpha = 0.1.
    assert max(slopes) - min(slopes) < 1e-5 and min(slopes) > 0.01


def test_alpha_adds_to_descent_what_brings_the_policy_to_the_reference():
    batch, rapo = Batch(), rapo_config()
    output, data = batch.micro(ALL)
    rapo_policy_loss(actor_config(), output, data, rapo=rapo)[0].backward()
    with_kl = batch.gradients()
    ppo_loss(actor_config(), output, data)[0].backward()
    for row, (a, b) in enumerate(zip(with_kl[: len(ALL)], batch.gradients())):
        added = (a - b)[PROMPTS[row] - 1 : -1]
        towards = batch.ref[row] - batch.log_probs[row].detach()[PROMPTS[row] - 1 : -1]
        seen = batch.mask[row].bool() & (towards.abs() > 1e-3)  # below, the pull is lost in fp32
        assert torch.equal((added < 0)[seen], (towards > 0)[seen])


@pytest.mark.parametrize("beta", [BETA, 0.5])
def test_entropy_bonus_lowers_the_loss(beta):
    batch, rapo = Batch(), rapo_config()
    output, data = batch.micro(ALL)
    without, _ = rapo_policy_loss(actor_config(entropy_coeff=0.0), output, data, rapo=rapo)
    loss, _ = rapo_policy_loss(actor_config(entropy_coeff=beta), output, data, rapo=rapo)
    total = sum(float(h[p - 1 : -1][m.bool()].sum()) for h, p, m in zip(batch.entropy, PROMPTS, batch.mask))
    assert float(loss - without) == pytest.approx(-beta * total / batch.tokens(), rel=1e-4)  # a difference in fp32
    loss.backward()
    gradient = batch.gradients()[len(ALL) :]
    # Descent raises the entropy of every token of a response.
    for row in ALL:
        assert (gradient[row][PROMPTS[row] - 1 : -1][batch.mask[row].bool()] < 0).all()


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("split", [[[0], [1], [2], [3], [4]], [[0, 1], [2, 3, 4]], [[4, 0, 2], [3, 1]]])
def test_split_into_micro_batches_changes_neither_loss_nor_gradient(mode, split):
    batch, rapo = Batch(), rapo_config()

    def config():
        return actor_config(loss_agg_mode=mode, entropy_coeff=BETA, loss_scale_factor=8)

    loss, metrics = rapo_policy_loss(config(), *batch.micro(ALL), rapo=rapo)
    loss.backward()
    whole = batch.gradients()
    total, gathered = 0.0, {}
    for rows in split:
        part, part_metrics = rapo_policy_loss(config(), *batch.micro(rows), rapo=rapo)
        part.backward()  # veRL accumulates like this
        total += part.detach()
        for key in metrics:
            if key.startswith("rapo/"):
                gathered.setdefault(key, part_metrics[key].init_list()).append(part_metrics[key])
    torch.testing.assert_close(total, loss.detach(), **CLOSE)
    for a, b in zip(batch.gradients(), whole):
        torch.testing.assert_close(a, b, **CLOSE)
    for key, metric in gathered.items():
        assert metric.aggregate() == pytest.approx(metrics[key].aggregate(), rel=1e-4, abs=1e-6), key  # fp32 sums


def test_data_parallel_ranks_average_to_the_loss_of_one():
    batch, rapo = Batch(), rapo_config()
    loss, metrics = rapo_policy_loss(actor_config(), *batch.micro(ALL), rapo=rapo)
    loss.backward()
    whole = batch.gradients()
    ranks = [rapo_policy_loss(actor_config(), *batch.micro(rows, dp_size=2), rapo=rapo) for rows in ([0, 3], [1, 2, 4])]
    mean = sum(part for part, _ in ranks) / 2  # what FSDP does to gradients
    mean.backward()
    torch.testing.assert_close(mean, loss, **CLOSE)
    for a, b in zip(batch.gradients(), whole):
        torch.testing.assert_close(a, b, **CLOSE)
    for key in (key for key in metrics if key.startswith("rapo/")):
        got = Metric.aggregate_dp([part[key] for _, part in ranks])
        assert got == pytest.approx(metrics[key].aggregate(), rel=1e-4, abs=1e-6), key  # fp32 sums


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_padding_row_with_nan_contributes_nothing(mode, bad):
    rapo = rapo_config()
    clean, dirty = Batch(masked_rows=(3,)), Batch(masked_rows=(3,))
    dirty.ref[3][:] = bad  # an empty response that veRL adds to fill a batch
    dirty.ref[2][3] = bad  # and a masked token inside a response
    results = []
    for batch in (clean, dirty):
        config = actor_config(loss_agg_mode=mode, loss_scale_factor=8)
        loss, metrics = rapo_policy_loss(config, *batch.micro(ALL), rapo=rapo)
        loss.backward()
        results.append(
            (loss, batch.gradients(), {k: m.aggregate() for k, m in metrics.items() if k.startswith("rapo/")})
        )
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))
    assert (results[1][1][3] == 0).all()
    assert results[0][2] == results[1][2] and all(math.isfinite(v) for v in results[1][2].values())


# --- metrics ---

KEYS = {
    "rapo/forward_kl",
    "rapo/forward_kl_clipped_fraction",
    "rapo/log_rho_mean",
    "rapo/rho_max",
    "rapo/reference_mass_sampled",
    "rapo/phi_mean",
    "rapo/phi_min",
    "rapo/phi_max",
}


def test_every_metric_is_in_every_micro_batch_in_one_order():
    batch = Batch(masked_rows=(1, 3))
    orders = []
    for rows in (ALL, [0], [1], [1, 3]):
        loss, metrics = rapo_policy_loss(actor_config(), *batch.micro(rows), rapo=rapo_config())
        assert torch.isfinite(loss)
        orders.append([key for key in metrics if key.startswith("rapo/")])
        for key in KEYS:
            assert isinstance(metrics[key], Metric) and math.isfinite(metrics[key].aggregate()), (rows, key)
    assert all(order == orders[0] for order in orders) and set(orders[0]) == KEYS


def test_aggregated_metrics_have_their_values():
    batch, rapo = Batch(masked_rows=(1,)), rapo_config(rho_max=2.0)
    # The empty response has the lowest phi, 0.8, and must not be seen.
    batch.ref[1][:] = 50.0
    _, metrics = rapo_policy_loss(actor_config(), *batch.micro(ALL), rapo=rapo)
    got = {key: metrics[key].aggregate() for key in KEYS}
    keep = [m.bool() for m in batch.mask]
    log_prob = torch.cat([x.detach()[p - 1 : -1][m] for x, p, m in zip(batch.log_probs, PROMPTS, keep)]).double()
    old = torch.cat([x[m] for x, m in zip(batch.old, keep)]).double()
    ref = torch.cat([x[m] for x, m in zip(batch.ref, keep)]).double()
    phi = torch.cat([p.expand(int(m.sum())) for p, m in zip(batch.phi, keep)])
    rho = (ref - log_prob).exp()
    want = {
        "rapo/forward_kl_clipped_fraction": (rho > 2).double().mean(),
        "rapo/log_rho_mean": (ref - log_prob).mean(),
        "rapo/rho_max": rho.max(),
        "rapo/reference_mass_sampled": (ref - old).exp().mean(),
        "rapo/phi_mean": phi.mean(),
        "rapo/phi_min": 0.82,
        "rapo/phi_max": 1.0,
    }
    assert 0 < want["rapo/forward_kl_clipped_fraction"] < 1
    for key, value in want.items():
        assert got[key] == pytest.approx(float(value), rel=1e-5, abs=1e-6), key  # fp32 sums of 17 tokens


def test_verl_metrics_are_unchanged():
    batch = Batch()
    output, data = batch.micro(ALL)
    _, ours = rapo_policy_loss(actor_config(entropy_coeff=BETA), output, data, rapo=rapo_config())
    _, theirs = ppo_loss(actor_config(entropy_coeff=BETA), output, data)
    assert set(ours) - set(theirs) == KEYS
    assert {k: theirs[k].aggregate() for k in theirs} == {k: ours[k].aggregate() for k in theirs}


def test_data_of_the_micro_batch_is_not_changed():
    batch = Batch()
    output, data = batch.micro(ALL)
    before = {key: data[key].clone() for key in ("response_mask", "old_log_probs", "ref_log_prob", "rapo_phi")}
    keys = set(data.keys())
    rapo_policy_loss(actor_config(), output, data, rapo=rapo_config())
    assert set(data.keys()) == keys
    for key, value in before.items():
        a, b = (x.values() if x.is_nested else x for x in (data[key], value))
        assert torch.equal(a, b)
