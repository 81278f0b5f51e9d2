"""The report: numbers, escaping, what may not be compared."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from rapo_verl.method import passk
from rapo_verl.report import figures as plots
from rapo_verl.report.conclusion import _difference, conclusion
from rapo_verl.report.page import print_table, write_report
from rapo_verl.report.statistics import compute, series, sign_test
from rapo_verl.report.study import EvalResult, Study, role_in

N, GROUPS = 64, ("easy",) * 8 + ("latent",) * 8 + ("rare",) * 6 + ("ood",) * 6
IDS = tuple(f"p{i:02d}" for i in range(len(GROUPS)))
P_BASE = np.concatenate([np.linspace(0.2, 0.8, 8), np.full(8, 0.05), np.full(6, 5e-3), np.full(6, 5e-4)])
P_GRPO = np.concatenate([np.full(8, 0.9), np.tile([0.8, 0.0], 4), np.tile([0.5, 0.0], 3), np.zeros(6)])
P_RAPO = np.concatenate([np.full(8, 0.85), np.full(8, 0.3), np.full(6, 0.2), np.tile([0.1, 0.0], 3)])
EVIL = '<script>alert("x")</script>'


def result(name, p, seed, **changes):
    counts = tuple(int(c) for c in np.random.default_rng(seed).binomial(N, p))
    fields = {"n": N, "ids": IDS, "groups": GROUPS, "correct": counts, "exact": tuple(float(x) for x in p)}
    return EvalResult(name, **(fields | {"draw": seed} | changes))


def history(steps=50, **constant):
    return [
        {"step": t, "critic/rewards/mean": t / steps, "actor/entropy": 1 / (t + 1), "timing_s/step": 3.0, **constant}
        for t in range(steps)
    ]


@pytest.fixture(scope="module")
def study():
    return Study(
        results=(result("Base", P_BASE, 1), result("GRPO", P_GRPO, 2), result(f"RAPO {EVIL} $x_$", P_RAPO, 3)),
        hard_choice=result("Base", P_BASE, 9),
        histories={"GRPO": history(), EVIL: history(**{"rapo/forward_kl": 0.1})},
        settings={"commit": "abc", f"k{EVIL}": f"v{EVIL}", "url": "http://example.org/x"},
        title=f"Title {EVIL}",
        draws=300,
    )


@pytest.fixture(scope="module")
def report(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "new"
    return out, write_report(out, study)


def curve(numbers, scope, model, column="pass_at_k", label="all"):
    table = numbers.curves
    rows = table[(table.set == label) & (table.scope == scope) & (table.model == model)]
    return rows[column].dropna().tolist()


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
    out, numbers = report
    files = {"report.html", "summary.json", "passk.csv", "problems.csv", "differences.csv", "table.tex"}
    assert {p.name for p in out.iterdir()} == files | {"passk.png", "passk.svg", "training.png"}
    assert (out / "passk.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (out / "passk.svg").read_bytes()
    assert json.loads((out / "summary.json").read_text()) == {"verdict": conclusion(numbers), **numbers.as_json()}


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
    assert len(loads) == 2 + 4  # panels: Full and Hard, four metrics
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
    for name in (r.name for r in summary.study.results):
        for scope in ("full", "hard"):
            assert f"{curve(summary, scope, name)[-1]:.3f}" in words
            assert f"= {curve(summary, scope, name, 'exact')[summary.study.ks.index(32)]:.3f}" in words
    assert "do not cover the training seed" in words
    assert conclusion(summary) in words


def test_summary_scores_every_model_on_its_own_draw(study, report):
    _, numbers = report
    hard = np.array(study.hard_choice.correct) == 0
    assert numbers.as_json()["hard"]["ids"] == [i for i, h in zip(IDS, hard, strict=True) if h]
    assert 0 < hard.sum() < len(IDS)
    for r in study.results:
        counts = np.array(r.correct)
        assert curve(numbers, "full", r.name) == pytest.approx(passk.pass_at_k_curve(counts, N, study.ks))
        assert curve(numbers, "hard", r.name) == pytest.approx(passk.pass_at_k_curve(counts[hard], N, study.ks))
    assert curve(numbers, "hard", "Base")[-1] > 0  # the fresh draw: the base is not 0 by construction


def test_enumerated_values_weigh_hard_by_the_chance_of_being_chosen(study, report):
    _, numbers = report
    weights = (1 - P_BASE) ** N
    for p, r in zip((P_BASE, P_GRPO, P_RAPO), study.results, strict=True):
        for i, k in enumerate(study.exact_ks):
            solved = 1 - (1 - p) ** k
            assert curve(numbers, "full", r.name, "exact")[i] == pytest.approx(solved.mean(), abs=1e-12)
            want = (weights * solved).sum() / weights.sum()
            assert curve(numbers, "hard", r.name, "exact")[i] == pytest.approx(want, abs=1e-12)
    hard = numbers.as_json()["hard"]
    assert hard["expected_size"] == pytest.approx(weights.sum())
    assert hard["upper_bound"] == pytest.approx(1 - 0.05**0.5)  # 0 of n at k = n / 2
    assert study.exact_ks[-1] == 8 * study.ks[-1]


def test_comparisons_are_against_base_then_grpo(study, report):
    _, numbers = report
    base, grpo, rapo = study.results
    pairs = [(c.a, c.b) for c in numbers.coverage]
    assert pairs == [(grpo.name, base.name), (rapo.name, base.name), (rapo.name, grpo.name)]
    a, b = np.array(rapo.correct), np.array(grpo.correct)
    want = passk.pass_at_k_curve(a, N, [32]) - passk.pass_at_k_curve(b, N, [32])
    assert numbers.by_key["all", "full", rapo.name, grpo.name, 32].difference == pytest.approx(want[0])
    last = numbers.coverage[-1]
    assert last.only_a == [i for i, x, y in zip(IDS, a, b, strict=True) if x > 0 and y == 0]
    assert last.p == sign_test(len(last.only_a), len(last.only_b))


def test_groups_add_up(study, report):
    _, numbers = report
    groups = numbers.groups
    assert list(dict.fromkeys(groups.group)) == ["easy", "latent", "rare", "ood"]
    for r in study.results:
        mine = groups[groups.model == r.name]
        assert mine.hard.sum() == study.hard.sum()
        assert mine.solved.sum() == numbers.by_key["all", "full", r.name, 0].solved
        assert mine.solved_hard.sum() == numbers.by_key["all", "hard", r.name, 0].solved
    easy = groups[(groups.group == "easy") & (groups.model == "GRPO")].pass_at_1.item()
    assert easy == pytest.approx(np.mean(study.results[1].correct[:8]) / N)


def test_hard_chosen_on_a_scoring_draw_is_refused(study):
    for scored in study.results:
        with pytest.raises(ValueError, match="Hard must be chosen on a draw that scores no model"):
            replace(study, hard_choice=result("Base", P_BASE, 9, draw=scored.draw))


def test_draw_of_the_same_number_of_another_model_is_another_draw(study):
    base, other = {"meta": {"model_sha256": "b"}}, {"meta": {"model_sha256": "r"}}
    results = (result("Base", P_BASE, 1, **base), result("RAPO", P_RAPO, 9, **other))
    assert not Study(results, result("Base", P_BASE, 9, **base)).same_draw
    with pytest.raises(ValueError, match="share a draw"):
        Study(results, result("Base", P_BASE, 9, draw=1, **base))


def test_hard_chosen_on_the_same_counts_under_another_seed_is_refused(study):
    with pytest.raises(ValueError, match="share a draw"):
        replace(study, hard_choice=result("Base", P_BASE, 1, draw=77))


ASKED = tuple((f"question {i}", str(i)) for i in range(len(IDS)))
WARM = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 8192}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ids": tuple(reversed(IDS))}, "in another order or other groups"),
        ({"groups": tuple(reversed(GROUPS))}, "in another order or other groups"),
        ({"ids": tuple(f"q{i}" for i in range(len(IDS)))}, "have 28 and 28, 0 of them in common"),
        ({"n": 2 * N}, "n must be the same; got {'Base': 64, 'RAPO': 128}"),
        ({"asked": (*ASKED[:-1], ("another", "27"))}, "other questions or right answers under 1 ids, first 'p27'"),
        ({"asked": (("question 0", "7"), *ASKED[1:])}, "other questions or right answers under 1 ids, first 'p00'"),
        ({"protocol": WARM | {"temperature": 0.6}}, "temperature differs: 1.0 for Base, 0.6 for RAPO"),
        ({"protocol": WARM | {"top_p": 0.95}}, "top_p differs"),
        ({"protocol": WARM | {"max_tokens": 4096}}, "max_tokens differs"),
        ({"meta": {"manifest_sha256": "1"}}, "are one evaluation"),
        ({"name": "Base"}, "names must differ"),
    ],
)
def test_results_that_do_not_match_are_refused(changes, words):
    known = {"asked": ASKED, "protocol": WARM, "meta": {"manifest_sha256": "1"}}
    base = result("Base", P_BASE, 1, **known)
    other = {"name": "RAPO", **known, "meta": {"manifest_sha256": "2"}, **changes}
    other = result(other.pop("name"), P_RAPO, 3, **other)
    with pytest.raises(ValueError, match=re.escape(words)):
        Study((base, other))


def test_fewer_problems_are_refused_in_either_order():
    few = {"ids": IDS[:10], "groups": GROUPS[:10]}
    pair = [result("Base", P_BASE, 1), result("RAPO", P_RAPO[:10], 3, **few)]
    for results in (pair, pair[::-1]):
        with pytest.raises(ValueError, match="10 of them in common"):
            Study(tuple(results))


def test_models_sampled_differently_are_compared_when_forced_and_the_page_says_so(tmp_path):
    results = result("Base", P_BASE, 1, protocol=WARM), result("RAPO", P_RAPO, 3, protocol=WARM | {"temperature": 0.6})
    choice = result("Base", P_BASE, 9, protocol=WARM | {"max_tokens": 100})
    with pytest.raises(ValueError, match="max_tokens differs: 8192 for Base, 8192 for RAPO, 100 for Base, Hard"):
        Study(results, choice)
    write_report(tmp_path, Study(results, choice, force=True, draws=50))
    page = (tmp_path / "report.html").read_text()
    assert "not sampled alike" in page and "temperature differs: 1.0 for Base, 0.6 for RAPO" in page


def test_unknown_base_other_model_and_nothing_are_refused(study):
    base = study.results[0]
    with pytest.raises(ValueError, match="must be among the results"):
        Study((base,), result("Other", P_BASE, 9))
    with pytest.raises(ValueError, match="got none"):
        Study((), study.hard_choice)


def test_no_hard_problem_no_exact_and_no_history_still_report(tmp_path):
    p = np.full(len(IDS), 0.5)
    results = (result("Base", p, 1, exact=None), result("RAPO", p, 2, exact=None))
    out = tmp_path / "r"
    out.mkdir()
    (out / "training.png").write_bytes(b"of an older report")
    numbers = write_report(out, Study(results, result("Base", p, 3, exact=None), draws=50))
    assert numbers.as_json()["hard"]["ids"] == []
    assert curve(numbers, "hard", "Base") == []
    assert not (out / "training.png").exists()
    assert "Training" not in (out / "report.html").read_text()


def headings(out):
    return re.findall("<h2>(.*?)</h2>", (out / "report.html").read_text())


def test_one_model_has_no_section_about_two(tmp_path):
    groups = ("one",) * len(IDS)
    write_report(tmp_path, Study((result("Base", P_BASE, 1, exact=None, groups=groups),), draws=50))
    assert headings(tmp_path) == [
        "pass@k over the number of attempts", "pass@k in numbers", "Which problems, and how often",
        "Problems by success rate", "What these numbers leave out",
    ]  # fmt: skip


def test_all_zero_has_a_sentence_and_the_exact_bound_in_place_of_a_grid(tmp_path):
    none = np.zeros(30)
    many = {"ids": tuple(map(str, range(30))), "groups": ("a",) * 30, "exact": None}
    numbers = write_report(tmp_path, Study((result("Base", none, 1, **many), result("RAPO", none, 2, **many))))
    assert conclusion(numbers).startswith("No model solved any of the 30 problems in 64 samples each")
    assert "up to 0.116" in conclusion(numbers)
    assert "<img" not in (tmp_path / "report.html").read_text()
    assert "Paired differences" not in headings(tmp_path)
    # The exact bound is 0.1157; 2000 draws of weights find it to four standard errors, 0.016.
    assert curve(numbers, "full", "Base", "high") == pytest.approx([0.1157] * 6, abs=0.016)
    assert curve(numbers, "full", "Base", "low") == [0.0] * 6


def counts(name, correct, seed):
    many = {"ids": IDS[: len(correct)], "groups": GROUPS[: len(correct)], "exact": None}
    return result(name, np.zeros(1), seed, correct=tuple(correct), **many)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ([64] * 14 + [0] * 14, [20] * 28, "At k = 1 A is ahead of B by 0.188 (not significant), at k = 32 B is ahead"),
        ([40] * 28, [2] * 28, "A is ahead of B at every k from 1 to 32, everywhere significantly."),
        ([8] * 28, [8] * 28, "A and B have the same pass@k at every k."),
        ([9, *[8] * 27], [8] * 28, "A is ahead of B at every k from 1 to 32, nowhere significantly."),
        # Equal at one end: 1 at every k from 8 on, and the same pass@1.
        ([60] * 28, [64] * 28, "B is ahead of A at every k from 1 to 32 but 8, 16, 32, significantly up to k = "),
        ([10, 6] * 14, [8] * 28, "B is ahead of A at every k from 1 to 32 but 1, "),
        ([10, 6, 8] * 9 + [8], [6, 8, 10] * 9 + [8], "A and B have the same pass@k at every k."),
    ],
)
def test_verdict_says_who_is_ahead_where_and_whether_that_is_significant(a, b, words):
    said = conclusion(compute(Study((counts("A", a, 1), counts("B", b, 2)))))
    assert said.startswith(words)
    assert ("cross between k = 1 and k = 2" in said) == words.startswith("At k")


def test_verdict_speaks_of_the_intervals_of_the_table():
    study = Study((counts("A", [64] * 14 + [0] * 14, 1), counts("B", [20] * 28, 2)))
    band, numbers = _difference(study, "A", "B"), compute(study)
    rows = [numbers.by_key["all", "full", "B", "A", k] for k in study.ks]  # the table has the pair the other way round
    want = [[-r.difference for r in rows], [-r.high for r in rows], [-r.low for r in rows]]
    np.testing.assert_allclose(band[1:], want, atol=1e-11)


def test_verdict_of_one_model_gives_its_counts():
    said = conclusion(compute(Study((counts("A", [64] * 7 + [0] * 21, 1),))))
    assert said == "A solved 7 of 28 problems at least once; pass@1 is 0.250 and pass@32 is 0.250."


def test_training_counts_what_is_not_finite_and_refuses_records_without_step(study):
    bad = history()
    bad[3]["actor/entropy"] = math.nan
    found = compute(replace(study, histories={"r": bad}, draws=20)).training["r"]
    assert found["not_finite"] == 1
    assert found["final"]["critic/rewards/mean"] == pytest.approx(np.mean([45, 46, 47, 48, 49]) / 50)
    assert len(series(bad, "actor/entropy")[0]) == 49
    with pytest.raises(ValueError, match='needs the key "step"'):
        replace(study, histories={"r": [{"actor/entropy": 1.0}]})


def test_figures_repeat_byte_for_byte(report):
    _, numbers = report
    colours = plots.model_colours({r.name: r.role for r in numbers.study.results})
    panels = [("all", "full"), ("all", "hard")]
    first, second = (plots.image(plots.passk_figure(numbers, colours, panels), "svg") for _ in range(2))
    assert first == second


def test_dollar_signs_in_names_are_not_mathematics(report):
    # Matplotlib's comment before each text; as mathematics "$x_$" would not even parse.
    assert "$x_$" in (report[0] / "passk.svg").read_text()


def test_roles_give_fixed_colours():
    assert [role_in(n) for n in ("Base", "grpo-3b", "RAPO vs GRPO", "x")] == ["base", "grpo", "rapo", "other"]
    assert result("x", P_BASE, 1, role="rapo").role == "rapo"
    colours = plots.model_colours({"a": "rapo", "b": "rapo", "c": "base"})
    assert colours["a"] == plots.ROLE_COLOURS["rapo"]
    assert colours["c"] == plots.ROLE_COLOURS["base"]
    assert len(set(colours.values())) == 3


def test_print_table_shows_values_and_takes_no_markup_from_names(study):
    numbers = compute(replace(study, title="[bold]t[/bold]", draws=20))
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(numbers, console)
    text = console.export_text()
    assert "[bold]t[/bold]" in text and conclusion(numbers)[:40] in text
    assert f"{curve(numbers, 'full', 'Base')[-1]:.3f}" in text
