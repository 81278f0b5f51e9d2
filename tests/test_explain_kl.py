"""`rapo explain-kl`: every sentence against exact gradients, how settings are read, and the page that it writes."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from typer.testing import CliRunner

from rapo_verl import Refused
from rapo_verl.cli import app
from rapo_verl.theory import estimator_table as exact
from rapo_verl.theory.explain_kl import (
    EXACT,
    FORWARD,
    LEFT,
    REVERSE,
    clamp,
    descends,
    explain,
    flow,
    page,
    plot,
    table,
)  # fmt: skip
from rapo_verl.theory.kl_settings import SETTINGS, Setting, read_setting

PAGE = Path(__file__).parent.parent / "docs" / "estimators.md"
TV = "Σ |pi - ref|, twice the total variation"


def autograd(function, pair):
    """Gradient in the logits of a function of log pi."""
    leaf = pair.logits.clone().requires_grad_(True)
    function(torch.log_softmax(leaf, -1)).backward()
    return leaf.grad


@pytest.mark.parametrize("pair", [exact.make_pair(exact.FAR, updates=4), exact.two_modes(0.01)], ids=["far", "modes"])
def test_named_divergences_have_the_gradients_of_autograd(pair):
    ref, old = pair.log_ref, pair.log_old
    functions = {
        FORWARD: lambda x: (ref.exp() * (ref - x)).sum(),
        REVERSE: lambda x: (x.exp() * (x - ref)).sum(),
        "½ E_ref[(log pi - log ref)²]": lambda x: 0.5 * (ref.exp() * (x - ref) ** 2).sum(),
        TV: lambda x: (x.exp() - ref.exp()).abs().sum(),
        "the reverse KL minus the forward KL": lambda x: ((x.exp() + ref.exp()) * (x - ref)).sum(),
        "the reverse KL minus KL(pi ‖ pi_old)": lambda x: (x.exp() * (old - ref)).sum(),
        "minus KL(pi_old ‖ pi), away from who sampled": lambda x: (old.exp() * (x - old)).sum(),
    }
    found = exact.divergences(pair)
    assert found.keys() == functions.keys()
    for name, function in functions.items():
        torch.testing.assert_close(found[name], autograd(function, pair), rtol=1e-9, atol=1e-12)


# What is known of each form by hand, against what enumeration makes the sentence say.
@pytest.mark.parametrize(
    "name, on_policy, off_policy",
    [
        ("k1", "nothing: its expected gradient is zero", "minus KL(pi_old ‖ pi), away from who sampled, exactly"),
        ("k2", f"{REVERSE}, exactly", "no divergence exactly; nearest is the reverse KL"),
        (
            "low_var_kl",
            f"{FORWARD}: exactly near the reference, 0.29 off",
            "no divergence exactly; nearest is the forw",
        ),
        ("k3", f"{FORWARD}, exactly", "no divergence exactly; nearest is the forward KL"),
        ("w k3", f"{REVERSE}, exactly", f"{REVERSE}, exactly"),
        (
            "score k3, clamped",
            f"{REVERSE}: exactly near the reference",
            "no divergence exactly; nearest is the reverse",
        ),
        ("k1 in the reward", f"{REVERSE}, exactly", "the reverse KL minus KL(pi ‖ pi_old), exactly"),
        ("k3 in the reward", "the reverse KL minus the forward KL, exactly", "no divergence that has a name here"),
        ("abs", f"{TV}, exactly", "no divergence exactly"),
        ("bounded", f"{FORWARD}: exactly near the reference, 0.23 off", f"{FORWARD}: exactly near the reference, 0.23"),
        ("bounded rho<=1e6", f"{FORWARD}, exactly", f"{FORWARD}, exactly"),
        ("unbiased", f"{FORWARD}, exactly", f"{FORWARD}, exactly"),
        ("full", f"{FORWARD}, exactly", f"{FORWARD}, exactly"),
        ("answers", f"{FORWARD}, exactly", f"{FORWARD}, exactly"),
        ("paper", "½ E_ref[(log pi - log ref)²], exactly", "no divergence exactly"),
        ("topk", "no divergence exactly; nearest is the forward KL", "no divergence exactly; nearest is the for"),
    ],
)
def test_sentences_say_what_is_known_of_each_form(name, on_policy, off_policy):
    assert descends(name, 0).startswith(on_policy) and descends(name, 4).startswith(off_policy)


@pytest.mark.parametrize("name", ["k1 in the reward", "low_var_kl in the reward", "w k3", "k2, clamped", "answers"])
def test_gradients_are_those_of_samples_enumerated_one_by_one(name):
    pair = exact.make_pair(exact.FAR, updates=4)
    weight = (pair.log_ref if name == "answers" else pair.log_old).exp()
    gradients = []
    for token in range(exact.VOCABULARY):
        here = slice(token, token + 1)

        def one(x, here=here):
            if name == "answers":
                return -x[here].sum()
            return exact.sampled(name)(x[here], pair.log_old[here], pair.log_ref[here]).sum()

        gradients.append(autograd(one, pair))
    mean, variance = exact.moments(name, pair)
    want = (weight[:, None] * torch.stack(gradients)).sum(0)
    torch.testing.assert_close(mean, want, rtol=1e-9, atol=1e-12)
    assert variance == pytest.approx(float(sum(w * ((g - want) ** 2).sum() for w, g in zip(weight, gradients))), 1e-9)


def test_pull_on_a_dropped_mode_is_the_closed_form():
    for left in LEFT:
        pair = exact.two_modes(left)
        second = slice(exact.VOCABULARY // 2, None)
        assert float(pair.logits[second].exp().sum()) == pytest.approx(left, rel=1e-6)
        rho = 0.5 / left
        # Of two modes that keep their shape: d KL / d(share of the second).
        forward, kl = 0.5 - left, left * -torch.tensor(rho).log() + (1 - left) * -torch.tensor(0.5 / (1 - left)).log()
        reverse = -left * (-torch.tensor(rho).log() - kl)
        assert exact.pull(REVERSE, left) == pytest.approx(float(reverse / forward), rel=1e-5)
        assert exact.pull("unbiased", left) == pytest.approx(1) and exact.pull("k3", left) == pytest.approx(1)
        assert exact.pull("k1", left) == pytest.approx(0, abs=EXACT)
    assert (
        exact.pull("low_var_kl", 0.01)
        < 0.02
        < 0.05
        < exact.pull("bounded", 0.01)
        < 0.2
        < 0.9
        < exact.pull("topk", 0.01)
    )
    assert exact.pull("low_var_kl in the reward", 0.1) < 0  # pushed out further


def test_clamps_are_named_where_a_gradient_stops():
    assert "no gradient where rho is large (13.8 and more" in clamp("low_var_kl")
    assert "rho = 6" in clamp("bounded") and "rho = 9" in clamp("bounded rho<=9")
    assert clamp("k3") == "none is met" and clamp("topk") == "none" and "e^20" in clamp("unbiased")


def test_flow_ends_at_the_reference_for_the_forward_kl_and_stays_for_k1():
    start, *_, end = flow([(1.0, FORWARD)], 0.1)
    assert start == pytest.approx(0.1) and end == pytest.approx(0.5, abs=0.01)
    assert flow([(1.0, "k1")], 0.01)[-1] == pytest.approx(0.01)


def test_variance_and_table_are_those_of_the_estimators():
    term = SETTINGS["verl-k2"].terms[0]
    pairs = exact.make_pair(exact.NEAR), exact.make_pair(exact.FAR)
    ratio = [exact.moments("k2", pair)[1] / exact.moments("unbiased", pair)[1] for pair in pairs]
    assert f"{ratio[0]:.2g} times" in dict(explain(term, 0))["variance"]
    assert f"{ratio[1]:.2g} far" in dict(explain(term, 0))["variance"]
    rows = table(term, 4)
    after = "after 4 updates"
    assert [row[0] for row in rows[1:]] == ["near, on-policy", f"near, {after}", "far, on-policy", f"far, {after}"]
    assert rows[1][2] == "0" and len(table(term, 0)) == 3


VERL = {"data": {"train_batch_size": 64}, "actor_rollout_ref": {"actor": {"ppo_mini_batch_size": 16}}}


def read(**actor):
    config = OmegaConf.merge(VERL, {"actor_rollout_ref": {"actor": actor.pop("actor", {})}}, actor)
    return read_setting(config, "t")


@pytest.mark.parametrize(
    "config, terms",
    [
        ({}, []),
        ({"actor": {"use_kl_loss": True}}, [("loss", 0.001, "low_var_kl")]),
        ({"actor": {"use_kl_loss": True, "kl_loss_type": "mse", "kl_loss_coef": 0.1}}, [("loss", 0.1, "k2")]),
        ({"actor": {"use_kl_loss": True, "kl_loss_type": "low_var_kl+"}}, [("loss", 0.001, "k3+")]),
        ({"actor": {"use_kl_loss": True, "kl_loss_coef": 0.0}}, []),
        ({"algorithm": {"use_kl_in_reward": True}}, [("reward", 0.001, "k1 in the reward")]),
        (
            {"algorithm": {"use_kl_in_reward": True, "kl_penalty": "low_var_kl+", "kl_ctrl": {"kl_coef": 0.2}}},
            [("reward", 0.2, "low_var_kl in the reward")],
        ),
        ({"rapo": {"forward_kl": {"coef": 0.3}}}, [("loss", 0.3, "bounded")]),
        ({"rapo": {"forward_kl": {"coef": 0.3, "rho_max": 9.0}}}, [("loss", 0.3, "bounded rho<=9")]),
        (
            {"rapo": {"forward_kl": {"coef": 0, "samples_coef": 1.0, "samples": "a"}, "reference": {"phi_min": 1.0}}},
            [("loss", 1.0, "answers")],
        ),
    ],
)
def test_config_is_read_as_verl_and_rapo_read_it(config, terms):
    setting = read(**config)
    assert [term[:3] for term in setting.terms] == terms and setting.updates == 3


def test_unknown_kl_is_refused():
    with pytest.raises(Refused, match="veRL has no KL 'full'"):
        read(actor={"use_kl_loss": True, "kl_loss_type": "full"})
    with pytest.raises(Refused, match="estimator"):
        read(rapo={"forward_kl": {"estimator": "best"}})


def run(*words):
    return CliRunner().invoke(app, ["explain-kl", *words])


def test_command_explains_a_file_and_draws(tmp_path):
    file = tmp_path / "verl.yaml"
    file.write_text("actor_rollout_ref: {actor: {use_kl_loss: true}}\n")
    result = run(str(file), "actor_rollout_ref.actor.kl_loss_type=k2", "--plot", str(tmp_path / "kl.png"))
    said = " ".join(result.output.split())
    assert result.exit_code == 0 and "the reverse KL(pi ‖ ref), exactly" in said and "in the reward no KL" in said
    assert (tmp_path / "kl.png").read_bytes().startswith(b"\x89PNG")


def test_command_explains_an_experiment():
    result = run("toy_rapo_cpu", "--updates", "0")
    assert result.exit_code == 0 and "0.3 x bounded" in result.output and "reweighted reference" in result.output


@pytest.mark.parametrize("words", [[], ["toy_rapo_cpu", "--setting", "nemo-rl"], ["--setting", "x"], ["/no/file.yaml"]])
def test_command_refuses_what_it_cannot_read(words):
    assert run(*words).exit_code == 2


def test_plot_of_no_kl_stays_where_it_is():
    assert flow([], 0.1)[-1] == pytest.approx(0.1) and plot(Setting("none", ())).axes


def test_page_is_what_the_command_writes(tmp_path):
    assert run("--all", "--page", str(tmp_path / "page.md")).exit_code == 0
    assert (tmp_path / "page.md").read_text() == PAGE.read_text() == page(), "run `rapo explain-kl --all` and commit"
    assert all(f"| `{name}` |" in page() for name in (*exact.ROWS, *SETTINGS))
