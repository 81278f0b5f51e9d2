"""`rapo figures`: what the figures show is what they claim, and every file is written."""

import numpy as np
from typer.testing import CliRunner

from rapo_verl.cli import app
from rapo_verl.theory import figures


def test_only_rapo_reaches_the_rewarded_region_off_the_support():
    reward, reference = figures.landscape()
    off = (figures.OUTSIDE[0] <= figures.GRID) & (figures.OUTSIDE[1] >= figures.GRID)
    assert reference[off].sum() == 0 and (reward[off] == 1).all()
    mass = {title: policy[off].sum() for title, (_, policy) in figures.panels().items()}
    *others, rapo = mass.values()
    assert len(others) == 3 and others == [0, 0, 0] and rapo > 0.1


def test_reweighting_flattens_the_reference_where_nothing_is_rewarded():
    (plain, _), _, (flattened, _), _ = figures.panels().values()
    unrewarded = (figures.landscape()[0] == 0) & (plain > 0)
    assert np.ptp(np.log(flattened[unrewarded])) < 0.5 * np.ptp(np.log(plain[unrewarded]))


def test_gradient_ascent_ends_on_the_closed_form():
    figure, distance = figures.descent_figure()
    assert distance < 1e-12 and figure.axes
    _, reference = figures.items()
    assert (reference[-figures.EMPTY :] == 0).all() and abs(reference.sum() - 1) < 1e-12


def test_command_writes_every_figure(tmp_path):
    result = CliRunner().invoke(app, ["figures", "--out", str(tmp_path / "images")], catch_exceptions=False)
    assert result.exit_code == 0 and len(result.output.split()) == 6
    for name in ("figure1", "figure2", "estimators"):
        assert (tmp_path / "images" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (tmp_path / "images" / f"{name}.svg").read_text()
        assert "<svg" in svg and "mathdefault" not in svg
