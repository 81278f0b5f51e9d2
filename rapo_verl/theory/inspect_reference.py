"""What reweighting does to a given reference model: `rapo inspect-reference MODEL --prompts FILE`.

Responses are sampled from the model at the rollout's temperature; at each of their tokens the whole next-token
distribution p is reweighted at several phi, by each normalised reading, and compared with p. Beside the numbers stand
texts of the reference reweighted by ``token`` throughout, for the eye.
"""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from rapo_verl import Refused
from rapo_verl.data.chat import render
from rapo_verl.data.sources import iter_records
from rapo_verl.method.reweighting import nucleus
from rapo_verl.report.figures import styled, write_figure
from rapo_verl.run.files import write_atomic

PHIS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3)
# Of the texts: phi, and how many prompts are answered at each.
SHOWN, SHOWN_PROMPTS = (1.0, 0.9, 0.8, 0.5), 3
COLOURS = {"token": "#d55e00", "nucleus": "#0072b2"}


def measure(logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float) -> pd.DataFrame:
    """Return what each normalised reading makes of next-token distributions: a row a reading, phi and token.

    Columns: reading, phi, outside (mass outside the reference's top k), kl (KL(reweighted ‖ untempered), nats), entropy
    (of the reweighted reference, nats), top1 (probability of the untempered reference's most likely token).

    Logits are (tokens, vocabulary), the temperature is the rollout's; the nucleus has ``top_p`` of at most ``top_k``.
    """
    if not 1 <= top_k <= logits.shape[1]:
        raise Refused(f"top_k is {top_k}; allowed: 1 to the vocabulary's {logits.shape[1]} tokens")
    log_p = torch.log_softmax(logits.float() / temperature, -1)
    top = log_p.topk(top_k, -1)
    inside = nucleus(top.values, top_p)
    outside = torch.ones_like(log_p, dtype=torch.bool).scatter_(1, top.indices, False)
    parts = []
    for reading in COLOURS:
        for phi in PHIS:
            log_q = torch.log_softmax(phi * log_p, -1)
            if reading == "nucleus":  # keeps its mass
                kept = top.values.masked_fill(~inside, -math.inf)
                flat = torch.log_softmax(phi * kept, 1) + kept.logsumexp(1, keepdim=True)
                log_q = log_p.scatter(1, top.indices, torch.where(inside, flat, top.values))
            q = log_q.exp()
            columns = {
                "outside": (q * outside).sum(1),
                "kl": (q * (log_q - log_p)).sum(1),
                "entropy": -(q * log_q).sum(1),
                "top1": q.gather(1, top.indices[:, :1])[:, 0],
            }
            values = {name: column.double().numpy() for name, column in columns.items()}
            parts.append(pd.DataFrame({"reading": reading, "phi": phi, **values}))
    return pd.concat(parts)


def means(measured: pd.DataFrame) -> pd.DataFrame:
    """Return the means over tokens of what was measured, a row a reading and phi."""
    return measured.groupby(["reading", "phi"], sort=False, as_index=False).mean()


def respond(model: Any, tokenizer: Any, prompt: str, *, tokens: int, temperature: float) -> tuple[str, torch.Tensor]:
    """Return a sampled response up to its end, and the logits at each of its tokens, shape (response, vocabulary)."""
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
    # top_k=0, top_p=1: the checkpoint's own generation settings are not the rollout's.
    out = model.generate(
        **ids, do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=tokens,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    text = tokenizer.decode(out.sequences[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return text, torch.stack([step[0].float().cpu() for step in out.logits])


def inspect_reference(
    model: str, prompts: Path, out: Path, *, rows: int, tokens: int, temperature: float, top_k: int, top_p: float,
    seed: int,
) -> None:  # fmt: skip
    """Sample, measure, print table and texts, and write ``reference.json``, ``reference.png`` and ``reference.svg``.

    The model is a checkpoint folder or a hub id. Prompts are veRL parquet or any file of records with chat prompts;
    the first ``rows`` are taken. ``tokens`` is the longest response; the rest is `measure`'s.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not 0 < temperature < math.inf:
        raise Refused(f"temperature is {temperature}; allowed: a finite number > 0")
    records = list(iter_records(prompts))
    if "prompt" not in records[0] or isinstance(records[0]["prompt"], str):
        raise Refused(f"{prompts}: no chat prompts; make veRL's layout of it with `rapo data prepare {prompts}`")
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    loaded = loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    torch.manual_seed(seed)
    texts = [render(list(record["prompt"]), tokenizer) for record in records[:rows]]
    parts, count = [], 0
    for text in texts:  # one at a time: a language model's logits are 0.6 MB a token
        _, logits = respond(loaded, tokenizer, text, tokens=tokens, temperature=temperature)
        parts.append(measure(logits, temperature=temperature, top_k=top_k, top_p=top_p))
        count += len(logits)
    found = means(pd.concat(parts))
    what = f"{Path(model).name}: {len(texts)} prompts, {count} response tokens, T = {temperature}, seed {seed}"
    table = Table(title=what, caption=f"nucleus: top_p = {top_p} within top_k = {top_k}; KL and entropy in nats")
    for name in ("reading", "phi", f"mass outside top {top_k}", "KL to untempered", "entropy", "p of its first token"):
        table.add_column(name, justify="left" if name == "reading" else "right")
    for reading, phi, *values in found.itertuples(index=False):
        table.add_row(reading, f"{phi:g}", *(f"{max(value, 0):.4f}" for value in values))
    Console().print(table)
    samples = []
    for phi, (row, text) in itertools.product(SHOWN, enumerate(texts[:SHOWN_PROMPTS])):
        answer, _ = respond(loaded, tokenizer, text, tokens=tokens, temperature=temperature / phi)
        samples.append({"phi": phi, "row": row, "text": answer})
        Console().print(f"phi {phi:g}, row {row}: {answer}", markup=False, highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    told = {"model": model, "prompts": str(prompts), "rows": len(texts), "tokens": count, "seed": seed}
    told |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    told |= {"results": found.to_dict("records"), "samples": samples}
    write_atomic(out / "reference.json", json.dumps(told, indent=1))
    write_figure(reference_figure(found, what, top_k, top_p), out / "reference")


@styled
def reference_figure(found: pd.DataFrame, title: str, top_k: int, top_p: float) -> Figure:
    """Return mass outside the top k and KL to the untempered reference over phi, a line for each reading."""
    figure = Figure(figsize=(9.4, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=9.5, x=0.01, ha="left")
    words = {"outside": f"mass outside the top {top_k}", "kl": "KL(reweighted ‖ untempered), nats"}
    for axis, name in zip(figure.subplots(1, 2), words):
        for reading, mine in found.groupby("reading", sort=False):
            label = reading if reading == "token" else f"nucleus (top_p = {top_p})"
            axis.plot(mine.phi, mine[name], "o-", ms=3.5, color=COLOURS[str(reading)], label=label)
        axis.set(title=words[name], xlabel="phi", yscale="log")
        axis.invert_xaxis()
        axis.yaxis.set_major_formatter("{x:g}")  # the style has no mathematics, which the default would be
        axis.set_ylim(bottom=max(axis.get_ylim()[0], 1e-6))  # phi = 1 leaves rounding
        axis.legend()
    return figure
