"""`rapo explain-kl`: what a KL setting does, in sentences whose every number is enumerated (`estimator_table`)."""

from collections.abc import Iterable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rapo_verl.report.figures import styled
from rapo_verl.run.files import filled
from rapo_verl.theory import estimator_table as exact
from rapo_verl.theory.kl_settings import SETTINGS, Setting, Term

# Share that the policy kept of a mode with half of the reference's mass.
LEFT = (0.1, 0.01, 0.001)
# Sums of 64 products in fp64.
EXACT = 1e-9
# Of the plot: one step moves the logits by this times the gradient; a coefficient of 0.01 takes 100 times as many.
RATE, STEPS = 1.0, 400
FORWARD, REVERSE = "the forward KL(ref ‖ pi)", "the reverse KL(pi ‖ ref)"


def descends(name: str, updates: int) -> str:
    """Return which divergence the expected gradient of an estimator is that of."""
    pairs = [exact.make_pair(distance, updates=updates) for distance in (exact.NEAR, exact.FAR)]
    means = [exact.moments(name, pair)[0] for pair in pairs]
    if all(mean.norm() < EXACT for mean in means):
        return "nothing: its expected gradient is zero"
    errors = {}
    for target in exact.divergences(pairs[0]):
        true = [exact.divergences(pair)[target] for pair in pairs]
        if all(gradient.norm() > EXACT for gradient in true):
            errors[target] = [float((mean - gradient).norm() / gradient.norm()) for mean, gradient in zip(means, true)]
    best = min(errors, key=lambda target: (errors[target][0] > EXACT, round(sum(errors[target]), 9)))
    near, far = errors[best]
    if max(near, far) < EXACT:
        return f"{best}, exactly"
    if near < EXACT:
        return f"{best}: exactly near the reference, {far:.2g} off far from it"
    if max(near, far) > 1:
        return "no divergence that has a name here"
    return f"no divergence exactly; nearest is {best}, {near:.2g} off near the reference and {far:.2g} far from it"


def clamp(name: str) -> str:
    """Return where an estimator's gradient stops, and how much of the reference that is on the far pair."""
    pair = exact.make_pair(exact.FAR)
    log_rho = pair.log_ref - torch.log_softmax(pair.logits, -1)
    if name.startswith("bounded"):
        bound = float(name.partition(" rho<=")[2] or exact.RHO_MAX)
        share = float(pair.log_ref.exp()[log_rho.exp() > bound].sum())
        return f"the pull stops growing at rho = {bound:g}: far from the reference {share:.0%} of its mass is beyond"
    if name in exact.PER_TOKEN or name == exact.ANSWERS:
        return "none"
    dead = exact.slope(name, pair) == 0
    if not dead.any():
        return "none is met" + (" (rho only at e^20)" if name in exact.OURS else "")
    share, start = float(pair.log_ref.exp()[dead].sum()), float(log_rho[dead].min().exp())
    return f"no gradient where rho is large ({start:.3g} and more on the far pair, {share:.0%} of the reference's mass)"


def explain(term: Term, updates: int) -> Iterable[tuple[str, str]]:
    """Yield sentences on one term, each with its heading."""
    name = term.estimator
    yield f"in the {term.place}", f"{term.coef:g} x {name.removesuffix(exact.IN_REWARD)} ({term.words})"
    yield "on-policy", f"descends {descends(name, 0)}"
    if updates:
        yield _after(updates), f"descends {descends(name, updates)}"
    yield "clamps", clamp(name)
    pulls, reverse = (", ".join(f"{_clean(exact.pull(n, left)):.2g}" for left in LEFT) for n in (name, REVERSE))
    blind = "" if name in (*exact.PER_TOKEN, exact.ANSWERS) else "; it acts only where tokens of the mode are sampled"
    kept = ", ".join(f"{left:g}" for left in LEFT)
    sentence = (
        f"one with half of the reference's mass, of which the policy kept {kept}, is pulled back with {pulls} of "
    )
    yield "a dropped mode", f"{sentence}the forward KL's force (the reverse KL's: {reverse}){blind}"
    pairs = [exact.make_pair(distance) for distance in (exact.NEAR, exact.FAR)]
    ratio = [exact.moments(name, pair)[1] / exact.moments("unbiased", pair)[1] for pair in pairs]
    yield "variance", f"{ratio[0]:.2g} times the unbiased forward KL's near the reference, {ratio[1]:.2g} far from it"


def _after(updates: int) -> str:
    return f"after {updates} update{'s' if updates > 1 else ''}"


def _clean(value: float) -> float:
    return 0.0 if abs(value) < EXACT else value


def table(term: Term, updates: int) -> list[tuple[str, ...]]:
    """Return the small table: error to either KL and variance, near and far, on-policy and after the updates."""
    rows: list[tuple[str, ...]] = [("", "off the forward KL", "off the reverse KL", "variance")]
    for place, distance in (("near", exact.NEAR), ("far", exact.FAR)):
        for age in sorted({0, updates}):
            found = exact.quality(term.estimator, exact.make_pair(distance, updates=age))
            when = _after(age) if age else "on-policy"
            values = (found.forward, found.reverse, found.variance)
            rows.append((f"{place}, {when}", *(f"{_clean(x):.2g}" for x in values)))
    return rows


def flow(terms: Iterable[tuple[float, str]], left: float) -> list[float]:
    """Return the second mode's mass along the expected gradient of weighted terms, on-policy, from `two_modes`."""
    start = exact.two_modes(left)
    logits, mass = start.logits.clone(), []
    for _ in range(STEPS):
        log_pi = torch.log_softmax(logits, -1)
        mass.append(float(log_pi[exact.VOCABULARY // 2 :].exp().sum()))
        pair = exact.Pair(logits, start.log_ref, log_pi)
        truth = exact.divergences(pair)
        for weight, name in terms:
            gradient = truth[name] if name in truth else exact.moments(name, pair)[0]
            logits = logits - RATE * weight * gradient
    return mass


@styled
def plot(setting: Setting) -> Figure:
    """Return three policies that lost a mode of the reference, and where this setting alone takes them."""
    figure = Figure(figsize=(9.4, 3.9), layout="constrained")
    figure.suptitle(setting.title)
    policies, paths = figure.subplots(1, 2)
    total = sum(term.coef for term in setting.terms) or 1.0
    terms = [(term.coef / total, term.estimator) for term in setting.terms]
    policies.fill_between(
        range(exact.VOCABULARY), exact.two_modes(0.5).log_ref.exp(), color="#6b7280", alpha=0.28, lw=0
    )
    for left, colour in zip(LEFT, ("#009e73", "#e69f00", "#d55e00")):
        policies.plot(exact.two_modes(left).logits.exp(), color=colour, lw=1.4, label=f"keeps {left:g}")
        paths.plot(flow([(1.0, FORWARD)], left), color=colour, lw=1, ls="--")
        paths.plot(flow([(1.0, REVERSE)], left), color=colour, lw=1, ls=":")
        paths.plot(flow(terms, left), color=colour, lw=2)
    policies.set(title="Reference (grey) and three policies", xlabel="token", ylabel="probability")
    policies.legend()
    paths.set(
        title="The second mode's mass",
        xlabel="steps along this setting's expected gradient",
        yscale="log",
        ylim=(5e-4, 0.7),
    )
    paths.yaxis.set_major_formatter("{x:g}")
    paths.text(0.98, 0.05, "dashed: the forward KL   dotted: the reverse KL", transform=paths.transAxes, ha="right")
    return figure


def show(setting: Setting, console: Console) -> None:
    """Print what a setting does."""
    console.print(Text(setting.title, style="bold"))
    lines = [line for term in setting.terms for line in explain(term, setting.updates)]
    for place in ("loss", "reward"):
        if not any(term.place == place for term in setting.terms):
            lines.append((f"in the {place}", "no KL"))
    if not setting.terms:
        lines.append(("a dropped mode", "nothing pulls it back: no term knows the reference"))
    grid = Table.grid("", "", padding=(0, 2))
    for heading, sentence in (*lines, *(("note", note) for note in setting.notes)):
        grid.add_row(Text(heading, style="dim"), Text(sentence))
    console.print(grid)
    for term in setting.terms:
        header, *rows = table(term, setting.updates)
        numbers = Table(*header)
        for row in rows:
            numbers.add_row(*row)
        console.print(numbers)
    console.print(Text(READING, style="dim"))


def page() -> str:
    """Return docs/estimators.md."""
    sections = []
    for title, distance in (
        (f"Near the reference (logits moved by {exact.NEAR})", exact.NEAR),
        (f"Far from it ({exact.FAR})", exact.FAR),
    ):
        on, off = (exact.make_pair(distance, updates=updates) for updates in (0, 4))
        rows = [
            (f"`{name}`", words, *map(_number, (*exact.quality(name, on), *exact.quality(name, off)[:2])))
            for name, words in exact.ROWS.items()
        ]
        sections.append((title, exact.forward_kl(on), rows))
    settings = []
    for name, (title, (term,), _, _) in SETTINGS.items():
        told = [descends(term.estimator, updates) for updates in (0, 4)]
        pull = f"{_clean(exact.pull(term.estimator, 0.01)):.2g}"
        cells = (f"{title}: {term.words}", term.place, *told, pull)
        settings.append((f"`{name}`", *(cell.replace("|", "\\|") for cell in cells)))
    return filled(Path(__file__).parent / "estimators.md.j2", exact=exact, sections=sections, settings=settings)


def _number(value: float) -> str:
    return "0" if value < 1e-9 else f"{value:.2g}" if value < 1e4 else f"{value:.1e}"


READING = (
    f"Enumerated over {exact.VOCABULARY} tokens: near and far are two policies {exact.NEAR} and {exact.FAR} from the "
    f"reference in their logits, an update moves them by {exact.UPDATE}. Off: error of the expected gradient over the "
    "true one's norm. docs/estimators.md has all of them."
)
