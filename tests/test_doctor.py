"""`rapo doctor` on machines that are not at hand: each failure by a stand-in."""

from dataclasses import replace

import pytest

from rapo_verl.plan.card import GPUS
from rapo_verl.run import doctor
from rapo_verl.run.names import PROCESS_VARIABLES


@pytest.mark.parametrize(
    ("code", "found", "mend"),
    [
        ("", "works", ""),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            "crashes: SIGSEGV",
            "built for another torch? MEND",
        ),
        ("raise ImportError('x.so: undefined symbol: _ZN3c10')", "undefined symbol", "built for another torch: MEND"),
        ("raise ImportError('libcudart.so.12: cannot open')", "libcudart.so.12", "MEND"),
        ("import time; time.sleep(60)", "not done after 1 s", "MEND"),
        (None, "No module named", "MEND"),
    ],
)
def test_module_that_crashes_hangs_or_is_missing_is_a_sentence(tmp_path, monkeypatch, code, found, mend):
    if code is not None:
        (tmp_path / "standin_module.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seen = doctor.imports("standin_module", "MEND", seconds=1 if "sleep" in (code or "") else 60)
    assert found in seen.found and seen.mend == mend and seen.ok == (code == "")


@pytest.mark.parametrize(
    ("says", "ok", "found"),
    [
        ("580.65.06", True, "580"),
        ("575.57.08", False, "575"),
        ("NVIDIA-SMI has failed", False, "none"),
        ("", False, "none"),
    ],
)
def test_driver_too_old_or_silent(tmp_path, monkeypatch, says, ok, found):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho {says}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    seen = doctor.driver()
    assert seen.ok == ok and found in seen.found and seen.mend


@pytest.mark.parametrize("module", ["transformer_engine", "flash_attn"])
def test_what_a_run_can_do_without_is_told_and_not_wrong(module):
    seen = doctor.imports(module)  # the CPU lock has neither
    assert seen.ok and seen.found.startswith("not installed; ")


def test_no_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not doctor.driver().ok


def test_flash_attention_4_beside_2_is_found(tmp_path, monkeypatch):
    assert doctor.two_flash_attentions().ok
    for name, version in {"flash_attn": "2.8.3", "flash_attn_4": "4.0.0"}.items():
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert not doctor.two_flash_attentions().ok


def test_choice_of_vllms_sampler_reaches_every_process_of_a_run():
    assert "VLLM_USE_FLASHINFER_SAMPLER" in PROCESS_VARIABLES


def test_largest_recipe_that_fits_the_card_is_named():
    seen = doctor.what_fits(GPUS["h100"], 1)
    assert seen.ok and seen.found.startswith("qwen2.5_0.5b_1gpu")


def test_no_recipe_on_a_small_card_is_said_with_what_to_ask():
    seen = doctor.what_fits(replace(GPUS["h100"], memory_gib=8), 1)
    assert not seen.ok and "rapo plan" in seen.mend
