"""`rapo inspect-reference`: its numbers are those of the readings, and it writes what it shows."""

import json

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from rapo_verl.cli import app
from rapo_verl.method.reference_tokens import reference_tokens
from rapo_verl.method.reweighting import reweight_tokens
from rapo_verl.theory.inspect_reference import PHIS, SHOWN, means, measure

TOP_K, TOP_P = 6, 0.9


def test_measures_agree_with_the_readings_of_the_reweighted_reference():
    logits = 3 * torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
    measured = measure(logits, temperature=0.8, top_k=TOP_K, top_p=TOP_P)
    found = {(x.reading, x.phi): x for x in means(measured).itertuples()}
    labels = logits.argmax(1)
    tokens = reference_tokens(logits, labels, k=TOP_K, temperature=0.8, nodes=tuple(PHIS))
    for (reading, phi), got in found.items():
        first, target = reweight_tokens(
            tokens, labels, torch.full((7,), phi), reading=reading, top_p=TOP_P, nodes=tuple(PHIS)
        )
        # fp32 sums over 40 tokens; the tail is read from a polynomial through the very phis, so exact.
        assert got.outside == pytest.approx(float(target.log_tail.exp().mean()), rel=1e-4)
        assert got.top1 == pytest.approx(float(first.exp().mean()), rel=1e-5)
    for reading in ("token", "nucleus"):
        kl, entropy = ([getattr(found[reading, phi], name) for phi in PHIS] for name in ("kl", "entropy"))
        assert abs(kl[0]) < 1e-6 and kl[1:] == sorted(kl[1:]) and kl[1] > 0  # PHIS fall from 1
        assert entropy == sorted(entropy)
    assert found["nucleus", 0.5].outside == pytest.approx(found["token", 1.0].outside, rel=1e-5)


def test_parts_average_to_the_whole():
    logits = 3 * torch.randn(9, 40, generator=torch.Generator().manual_seed(1))
    options = {"temperature": 1.0, "top_k": TOP_K, "top_p": TOP_P}
    parts = pd.concat([measure(x, **options) for x in (logits[:2], logits[2:])])
    whole = means(measure(logits, **options))
    for got, want in zip(means(parts).itertuples(), whole.itertuples(), strict=True):
        assert (got.reading, got.phi) == (want.reading, want.phi)
        for name in ("outside", "kl", "entropy", "top1"):
            assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-4, abs=1e-6)  # fp32


def test_top_k_above_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="top_k is 41; allowed: 1 to the vocabulary's 40"):
        measure(torch.zeros(2, 40), temperature=1.0, top_k=41, top_p=0.9)


def test_command_writes_table_and_plot(toy_dir, tmp_path):
    command = ["inspect-reference", str(toy_dir / "model"), "--prompts", str(toy_dir / "train.parquet")]
    options = ["--rows", "2", "--tokens", "5", "--top-k", "8", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command + options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "reference.json").read_text())
    assert found["rows"] == 2 and 0 < found["tokens"] <= 10 and len(found["results"]) == 2 * len(PHIS)
    texts = found["samples"]
    assert [(x["phi"], x["row"]) for x in texts] == [(phi, row) for phi in SHOWN for row in range(2)]
    assert all(f"phi {x['phi']:g}, row {x['row']}" in result.output for x in texts)
    assert (tmp_path / "reference.png").stat().st_size > 5000 and b"<svg" in (tmp_path / "reference.svg").read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--top-k", "9999"], "top_k is 9999"),
        (["--top-p", "1.5"], "top_p is 1.5"),
        (["--temperature", "0"], "temperature is 0"),
        (["--prompts", "no.parquet"], "no.parquet"),
    ],
)
def test_bad_input_is_refused(toy_dir, tmp_path, change, said):
    command = ["inspect-reference", str(toy_dir / "model"), "--prompts", str(toy_dir / "train.parquet")]
    options = ["--rows", "1", "--tokens", "2", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command + options + change)
    assert result.exit_code == 2 and said in result.output and not (tmp_path / "out").exists()
