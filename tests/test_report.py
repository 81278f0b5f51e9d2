"""The report: numbers, escaping, what may not be compared."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from rapo_verl.method import passk
from rapo_verl.report import figures as plots
from rapo_verl.report import solved
from rapo_verl.report.page import print_table, write_report
from rapo_verl.report.results import EvalResult, check_comparable
from rapo_verl.report.summary import role_of, summarise
from rapo_verl.report.training_curves import series

N, GROUPS = 64, ("easy",) * 8 + ("latent",) * 8 + ("rare",) * 6 + ("ood",) * 6
IDS = tuple(f"p{i:02d}" for i in range(len(GROUPS)))
P_BASE = np.concatenate([np.linspace(0.2, 0.8, 8), np.full(8, 0.05), np.full(6, 5e-3), np.full(6, 5e-4)])
P_GRPO = np.concatenate([np.full(8, 0.9), np.tile([0.8, 0.0], 4), np.tile([0.5, 0.0], 3), np.zeros(6)])
P_RAPO = np.concatenate([np.full(8, 0.85), np.full(8, 0.3), np.full(6, 0.2), np.tile([0.1, 0.0], 3)])
EVIL = '<script>alert("x")</script>'


def result(name, p, seed, **changes):
    counts = tuple(int(c) for c in np.random.default_rng(seed).binomial(N, p))
    fields = {"n": N, "ids": IDS, "groups": GROUPS, "correct": counts, "exact": tuple(float(x) for x in p)}
    return EvalResult(name, **(fields | {"meta": {"draw_seed": seed}} | changes))


def history(steps=50, **constant):
    return [
        {"step": t, "critic/rewards/mean": t / steps, "actor/entropy": 1 / (t + 1), "timing_s/step": 3.0, **constant}
        for t in range(steps)
    ]


@pytest.fixture(scope="module")
def study():
    return {
        "results": [result("Base", P_BASE, 1), result("GRPO", P_GRPO, 2), result(f"RAPO {EVIL} $x_$", P_RAPO, 3)],
        "hard_choice": result("Base", P_BASE, 9),
        "histories": {"GRPO": history(), EVIL: history(**{"rapo/forward_kl": 0.1})},
        "settings": {"commit": "abc", f"k{EVIL}": f"v{EVIL}", "url": "http://example.org/x"},
        "title": f"Title {EVIL}",
    }


@pytest.fixture(scope="module")
def report(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "new"
    return out, write_report(out, draws=300, **study)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster")]

    def handle_data(self, data):
        self.words.append(data)


def test_files_exist_and_have_their_kind(report):
    out, summary = report
    files = {"report.html", "summary.json", "passk.csv", "problems.csv", "table.tex", "passk.png", "passk.svg"}
    assert {p.name for p in out.iterdir()} == files | {"training.png"}
    assert (out / "passk.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (out / "passk.svg").read_bytes()
    assert json.loads((out / "summary.json").read_text()) == summary


def test_hostile_text_stays_text(report):
    out, _ = report
    page = (out / "report.html").read_text()
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert "<script" not in page.casefold()
    words = "".join(parsed.words)
    for kept in (f"RAPO {EVIL}", f"k{EVIL}", f"v{EVIL}", f"Title {EVIL}"):
        assert kept in words
    assert "<script" not in (out / "passk.svg").read_text().casefold()


def test_page_loads_nothing(report):
    page = (report[0] / "report.html").read_text()
    loads = Page(page).loads
    assert len(loads) == 4  # two figures, each wide and narrow
    assert all(source.startswith("data:image/") for source in loads)
    assert not re.search(r"url\(|@import", page)
    assert "default-src 'none'" in page


def test_sections_and_numbers_are_on_the_page(report):
    out, summary = report
    words = re.sub(r"\s+", " ", "".join(Page((out / "report.html").read_text()).words))
    for heading in (
        "pass@k in numbers",
        "Paired differences",
        "only one model solved",
        "By kind of problem",
        "Training",
    ):
        assert heading in words
    for model in summary["models"]:
        for scope in ("full", "hard"):
            assert f"{model[scope]['mean'][-1]:.3f}" in words
            assert f"= {model[scope]['exact'][summary['ks'].index(summary['headline_ks'][-1])]:.3f}" in words
    assert "do not cover the training seed" in words


def test_summary_scores_every_model_on_its_own_draw(study, report):
    _, summary = report
    hard = np.array(study["hard_choice"].correct) == 0
    assert summary["hard"]["ids"] == [i for i, h in zip(IDS, hard, strict=True) if h]
    assert 0 < hard.sum() < len(IDS)
    for r, model in zip(study["results"], summary["models"], strict=True):
        counts = np.array(r.correct)
        assert model["full"]["mean"] == pytest.approx(passk.pass_at_k_curve(counts, N, summary["ks"]))
        assert model["hard"]["mean"] == pytest.approx(passk.pass_at_k_curve(counts[hard], N, summary["ks"]))
    assert summary["models"][0]["hard"]["mean"][-1] > 0  # the fresh draw: the base is not 0 by construction


def test_enumerated_values_weigh_hard_by_the_chance_of_being_chosen(report):
    _, summary = report
    weights = (1 - P_BASE) ** N
    for p, model in zip((P_BASE, P_GRPO, P_RAPO), summary["models"], strict=True):
        for i, k in enumerate(summary["exact_ks"]):
            solved = 1 - (1 - p) ** k
            assert model["full"]["exact"][i] == pytest.approx(solved.mean(), abs=1e-12)
            assert model["hard"]["exact"][i] == pytest.approx((weights * solved).sum() / weights.sum(), abs=1e-12)
    assert summary["hard"]["expected_size"] == pytest.approx(weights.sum())
    assert summary["hard"]["upper_bound"] == pytest.approx(1 - 0.05**0.5)  # 0 of n at k = n / 2
    assert summary["exact_ks"][-1] == 8 * summary["ks"][-1]


def test_comparisons_are_against_base_then_grpo(study, report):
    _, summary = report
    base, grpo, rapo = study["results"]
    pairs = [(c["a"], c["b"]) for c in summary["comparisons"]]
    assert pairs == [(grpo.name, base.name), (rapo.name, base.name), (rapo.name, grpo.name)]
    last = summary["comparisons"][-1]
    a, b = np.array(rapo.correct), np.array(grpo.correct)
    want = passk.pass_at_k_curve(a, N, [32]) - passk.pass_at_k_curve(b, N, [32])
    assert last["full"][-1]["k"] == 32
    assert last["full"][-1]["difference"] == pytest.approx(want[0])
    assert last["only_a"] == [i for i, x, y in zip(IDS, a, b, strict=True) if x > 0 and y == 0]
    assert last["sign_test_p"] == solved.sign_test(a, b).p_value


def test_groups_add_up(study, report):
    _, summary = report
    assert [g["group"] for g in summary["groups"]] == ["easy", "latent", "rare", "ood"]
    assert sum(g["hard"] for g in summary["groups"]) == len(summary["hard"]["ids"])
    for i, model in enumerate(summary["models"]):
        assert sum(g["models"][i]["solved"] for g in summary["groups"]) == model["full"]["solved"]
        assert sum(g["models"][i]["solved_hard"] for g in summary["groups"]) == model["hard"]["solved"]
    easy = summary["groups"][0]["models"][1]
    assert easy["pass_at_1"] == pytest.approx(np.mean(study["results"][1].correct[:8]) / N)


def test_hard_chosen_on_a_scoring_draw_is_refused(study, tmp_path):
    for scored in study["results"]:
        same = result("Base", P_BASE, 9, meta={"draw_seed": scored.meta["draw_seed"]})
        with pytest.raises(ValueError, match="Hard must be chosen on a draw that scores no model"):
            write_report(tmp_path / "x", **(study | {"hard_choice": same}))
    assert not (tmp_path / "x").exists()


def test_hard_chosen_on_the_same_counts_under_another_seed_is_refused(study):
    relabelled = result("Base", P_BASE, 1, meta={"draw_seed": 77})
    with pytest.raises(ValueError, match="share a draw"):
        check_comparable(study["results"], relabelled)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ids": tuple(reversed(IDS))}, "ids and groups must be the same"),
        ({"groups": tuple(reversed(GROUPS))}, "ids and groups must be the same"),
        ({"n": 2 * N}, "n must be the same; got 64 for 'Base' and 128 for 'RAPO'"),
        ({"meta": {}}, r"meta\['draw_seed'\] of 'RAPO' is missing"),
    ],
)
def test_results_that_do_not_match_are_refused(study, changes, words):
    results = [*study["results"][:2], result("RAPO", P_RAPO, 3, **changes)]
    with pytest.raises(ValueError, match=words):
        check_comparable(results, study["hard_choice"])


def test_unknown_base_doubled_name_other_model_and_nothing_are_refused(study):
    base, choice = study["results"][0], study["hard_choice"]
    with pytest.raises(ValueError, match="must be among the results"):
        check_comparable([base], result("Other", P_BASE, 9))
    with pytest.raises(ValueError, match="names must differ"):
        check_comparable([base, result("Base", P_BASE, 4)], choice)
    with pytest.raises(ValueError, match="not one model"):
        check_comparable([base], result("Base", P_RAPO, 9))
    with pytest.raises(ValueError, match="got none"):
        check_comparable([], choice)


def test_no_hard_problem_no_exact_and_no_history_still_report(tmp_path):
    p = np.full(len(IDS), 0.5)
    results = [result("Base", p, 1, exact=None), result("RAPO", p, 2, exact=None)]
    out = tmp_path / "r"
    out.mkdir()
    (out / "training.png").write_bytes(b"of an older report")
    summary = write_report(
        out,
        results=results,
        hard_choice=result("Base", p, 3, exact=None),
        histories={},
        settings={},
        title="t",
        draws=50,
    )
    assert summary["hard"]["ids"] == []
    assert summary["models"][0]["hard"]["mean"] is None
    assert not (out / "training.png").exists()
    assert "No training curve was given" in (out / "report.html").read_text()


def test_training_counts_what_is_not_finite_and_refuses_records_without_step(study):
    bad = history()
    bad[3]["actor/entropy"] = math.nan
    base = {"hard_choice": study["hard_choice"], "settings": {}, "title": "t", "draws": 20}
    summary = summarise(study["results"], histories={"r": bad}, **base)
    assert summary["training"]["r"]["not_finite"] == 1
    assert summary["training"]["r"]["final"]["critic/rewards/mean"] == pytest.approx(np.mean([45, 46, 47, 48, 49]) / 50)
    assert len(series(bad, "actor/entropy")[0]) == 49
    with pytest.raises(ValueError, match='needs the key "step"'):
        summarise(study["results"], histories={"r": [{"actor/entropy": 1.0}]}, **base)


def test_figures_repeat_byte_for_byte(report):
    _, summary = report
    colours = plots.model_colours({m["name"]: m["role"] for m in summary["models"]})
    first, second = (plots.image(plots.passk_figure(summary, colours), "svg") for _ in range(2))
    assert first == second


def test_dollar_signs_in_names_are_not_mathematics(report):
    # Matplotlib's comment before each text; as mathematics "$x_$" would not even parse.
    assert "$x_$" in (report[0] / "passk.svg").read_text()


def test_roles_give_fixed_colours():
    assert [role_of(n) for n in ("Base", "grpo-3b", "RAPO vs GRPO", "x")] == ["base", "grpo", "rapo", "other"]
    assert role_of("x", {"role": "rapo"}) == "rapo"
    colours = plots.model_colours({"a": "rapo", "b": "rapo", "c": "base"})
    assert colours["a"] == plots.ROLE_COLOURS["rapo"]
    assert colours["c"] == plots.ROLE_COLOURS["base"]
    assert len(set(colours.values())) == 3


def test_print_table_shows_values_and_takes_no_markup_from_names(report):
    _, summary = report
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(summary | {"title": "[bold]t[/bold]"}, console)
    text = console.export_text()
    assert "[bold]t[/bold]" in text
    assert f"{summary['models'][0]['full']['mean'][-1]:.3f}" in text
