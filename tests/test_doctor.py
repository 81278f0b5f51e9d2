"""`rapo doctor` on machines that are not at hand: each failure by a stand-in."""

import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from rapo_verl.cli import app
from rapo_verl.plan.card import GPUS
from rapo_verl.plan.report import plan
from rapo_verl.run import doctor, fits, trials
from rapo_verl.run.compose import compose_config
from rapo_verl.run.finding import print_findings
from rapo_verl.run.names import PROCESS_VARIABLES

CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
HANG = "import time; time.sleep(60)"
# What a module does as it is imported, what the doctor says of it, and how the mend begins.
BROKEN = [
    (CRASH, "crashes: SIGSEGV", "built for another torch? "),
    ("raise ImportError('x.so: undefined symbol: _ZN3c10')", "undefined symbol", "built for another torch: "),
    ("raise ImportError('libcudart.so.12: cannot open')", "libcudart.so.12", ""),
    ("raise SystemExit(3)", "exit code 3", ""),
    (HANG, "not done after 1 s", ""),
]


def program(folder, name, code):
    """Make a command of the test's own, the first of its name."""
    (folder / name).write_text(f"#!/bin/sh\n{code}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """A function that makes an nvidia-smi which says that."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return lambda says: program(tmp_path, "nvidia-smi", says)


@pytest.mark.parametrize(
    ("code", "found", "mend"), [("", "works", None), *BROKEN, (None, "No module named 'standin_module'", "")]
)
def test_module_that_crashes_hangs_or_is_missing_is_a_sentence(tmp_path, monkeypatch, code, found, mend):
    if code is not None:
        (tmp_path / "standin_module.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seen = doctor.imports("standin_module", "MEND", seconds=1 if code == HANG else 60)
    assert found in seen.found and seen.ok == (mend is None) and seen.mend == ("" if mend is None else f"{mend}MEND")


@pytest.mark.parametrize("module", ["transformer_engine", "flash_attn"])
def test_what_a_run_can_do_without_is_told_and_not_wrong(module):
    seen = doctor.imports(module)  # the CPU lock has neither
    assert seen.ok and seen.found.startswith("not installed; ")


# --- what a run does on a GPU ---


def test_trial_passes_where_its_part_works():
    assert trials.matmul("cpu") == trials.kernel("cpu") == "works on cpu"
    done = trials.tried("it", [sys.executable, "-m", "rapo_verl.run.trials", "all_reduce", "cpu"], "MEND", 120)
    assert done.ok and "over 1 ranks" in done.found, done


@pytest.mark.slow
def test_trial_has_vllm_sample_a_token_of_a_model_made_on_the_spot():
    done = trials.tried("it", [sys.executable, "-m", "rapo_verl.run.trials", "token", "cpu"], "MEND", 300)
    assert done.ok and "works on cpu" in done.found, done


@pytest.mark.parametrize(("code", "found", "mend"), BROKEN)
def test_each_trial_that_crashes_or_hangs_is_a_sentence_with_its_own_mend(tmp_path, monkeypatch, code, found, mend):
    for module in ("torch", "transformers", "vllm"):
        (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    monkeypatch.setattr(trials, "SECONDS", dict.fromkeys(trials.SECONDS, 1 if code == HANG else 60))
    seen = trials.trials(1)
    assert [finding.what for finding in seen] == list(trials.WHAT.values())
    for finding, own in zip(seen, trials.MENDS.values()):
        assert not finding.ok and found in finding.found and finding.mend == mend + own


def test_what_is_wrong_is_found_among_what_is_printed_after_it():
    code = "print('[rank0]: RuntimeError: NCCL error: no route'); print('traceback : see a page'); exit('=====')"
    seen = trials.tried("it", [sys.executable, "-c", code], "MEND", 60)
    assert seen.found == "[rank0]: RuntimeError: NCCL error: no route"


def test_trial_that_hangs_takes_what_it_started_with_it(tmp_path):
    mark = tmp_path / "alive"
    code = f"import subprocess; subprocess.run(['sh', '-c', 'sleep 2; touch {mark}'])"
    assert not trials.tried("it", [sys.executable, "-c", code], "MEND", 1).ok
    assert trials.tried("it", ["sleep", "2"], "", 60).ok and not mark.exists()


def test_a_wrong_number_is_no_success(monkeypatch):
    with monkeypatch.context() as broken, pytest.raises(ArithmeticError, match="a product of bf16 matrices is off"):
        broken.setattr("torch.Tensor.double", lambda values: 0 * values.float())
        trials.matmul("cpu")
    with monkeypatch.context() as broken, pytest.raises(ArithmeticError, match="the head is off"):
        broken.setattr("rapo_verl.method.head.log_prob_and_entropy", lambda packed: 3 * (packed[:, -4],))
        trials.kernel("cpu")
    code = "import torch.distributed as d; d.all_reduce = lambda x: x.add_(1); from rapo_verl.run import trials; "
    seen = trials.tried("it", [sys.executable, "-c", code + "trials.all_reduce('cpu')"], "MEND", 120)
    assert not seen.ok and "a link corrupts data" in seen.found


def test_trials_without_a_gpu_are_refused_in_a_sentence():
    (seen,) = doctor._trials()
    assert not seen.ok and seen.found == "torch sees none"


@pytest.mark.parametrize(
    ("says", "found"),
    [
        ("printf 'NVIDIA H100\\nNVIDIA H100\\n'", "none of the GPUs of nvidia-smi (2)"),
        ("exit 9", "cpu"),
        ("exec sleep 60", "cpu"),
    ],
)
def test_torch_for_processors_beside_gpus_is_told(smi, monkeypatch, says, found):
    monkeypatch.setattr("rapo_verl.plan.card.SMI_SECONDS", 0.5 if "sleep" in says else 30)
    smi(says)
    assert found in doctor._without_gpu()


@pytest.mark.parametrize(
    ("torch", "pin", "why"), [("2.13.0+cpu", "2.13.0", "make gpu"), ("2.11.0", "2.11.0", "CUDA_VISIBLE_DEVICES")]
)
def test_lock_is_told_by_the_build_of_torch_where_there_is_no_gpu(smi, monkeypatch, torch, pin, why):
    monkeypatch.setattr(doctor, "installed", lambda _: {"torch": torch})
    monkeypatch.setattr(doctor, "_version", lambda name, pin: doctor.Finding(name, str(pin)))
    monkeypatch.setattr(doctor, "_plugin", lambda: doctor.Finding("verl plugin", "loads"))
    smi("echo NVIDIA H100")
    seen = {finding.what: finding.found for finding in doctor.examine()}
    assert seen["torch"] == pin and why in seen["platform"]


# --- driver, C library, packages, memory ---


@pytest.mark.parametrize(
    ("says", "ok", "found"),
    [
        ("echo 580.65.06", True, "580"),
        ("echo 575.57.08", False, "575"),
        ("echo NVIDIA-SMI has failed", False, "none"),
        ("exit 9", False, "none: nvidia-smi ended with 9"),
        ("exec sleep 60", False, "hangs"),
        (None, False, "there is no nvidia-smi"),
    ],
)
def test_driver_too_old_silent_or_hung(smi, monkeypatch, says, ok, found):
    monkeypatch.setattr("rapo_verl.plan.card.SMI_SECONDS", 0.5 if "sleep" in (says or "") else 30)
    if says:
        smi(says)
    seen = doctor.driver()
    assert seen.ok == ok and found in seen.found and seen.mend


@pytest.mark.parametrize(
    ("says", "ok", "found"),
    [
        ("echo 80000, 81559", True, "78.1 GiB of 79.6 GiB"),
        ("printf '80000, 81559\\n40000, 81559\\n'", False, "39.1 GiB of 79.6 GiB"),
        ("echo '[N/A], [N/A]'", True, "[N/A]"),
        ("exec sleep 60", False, "hangs"),
    ],
)
def test_memory_of_the_fullest_card(smi, monkeypatch, says, ok, found):
    monkeypatch.setattr("rapo_verl.plan.card.SMI_SECONDS", 0.5 if "sleep" in says else 30)
    smi(says)
    seen = doctor.free_memory()
    assert seen.ok == ok and found in seen.found


@pytest.mark.parametrize(
    ("version", "ok"),
    [(("glibc", "2.36"), True), (("glibc", "2.31"), True), (("glibc", "2.28"), False), (("", ""), False)],
)
def test_c_library_too_old_for_the_wheels(monkeypatch, version, ok):
    monkeypatch.setattr("platform.libc_ver", lambda: version)
    seen = doctor.glibc()
    assert seen.ok == ok and "2.31" in seen.mend


def test_python_of_another_version(monkeypatch):
    monkeypatch.setattr("sys.version_info", (3, 14, 0))
    assert not doctor._python().ok


@pytest.mark.parametrize(("pin", "ok"), [("0.9.1", True), ("0.8.0", False)])
def test_version_beside_the_lock(pin, ok):
    assert doctor._version("verl", pin).ok == ok
    assert "make gpu" in doctor._version("no-such-package", pin).mend


def test_flash_attention_4_beside_2_is_found(tmp_path, monkeypatch):
    assert doctor.two_flash_attentions().ok
    for name, version in {"flash_attn": "2.8.3", "flash_attn_4": "4.0.0"}.items():
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert not doctor.two_flash_attentions().ok


def test_too_small_memory_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "MIN_SHM", 1 << 60)
    (shm,) = [finding for finding in doctor._resources() if finding.what == "free /dev/shm"]
    assert not shm.ok and "enlarge it" in shm.mend


def test_choice_of_vllms_sampler_reaches_every_process_of_a_run():
    assert "VLLM_USE_FLASHINFER_SAMPLER" in PROCESS_VARIABLES


# --- what fits ---


def test_what_fits_a_card_as_it_is_and_with_changes_fits_by_its_plan(monkeypatch):
    monkeypatch.setattr(fits, "_has_megatron", lambda: False)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cpus, plain, changed = fits.what_fits(GPUS["h100"], 1)
    assert not cpus.ok and "want 7 CPUs" in cpus.mend  # two storage units, controller, task runner, three of the rank
    assert plain.ok and plain.found.startswith(
        "experiment=qwen2.5_0.5b_1gpu trainer.nnodes=1 trainer.n_gpus_per_node=1"
    )
    overrides = changed.found.partition(" (")[0].split()
    assert overrides[0] == "experiment=qwen2.5_3b_rapo_fsdp2" and "_offload=True" in changed.found
    for command in (plain.found.split(), overrides):
        assert plan(compose_config(command), GPUS["h100"]).fits, command


def test_largest_recipe_that_fits_as_it_is_needs_no_changes():
    _, plain = fits.what_fits(GPUS["h200"], 16)
    assert plain.found.startswith("experiment=qwen2.5_7b_rapo")


def test_no_recipe_on_a_small_card_is_said_with_what_to_ask(monkeypatch):
    monkeypatch.setattr(fits, "experiments", lambda: ["qwen2.5_0.5b_1gpu"])
    *_, seen = fits.what_fits(replace(GPUS["h100"], memory_gib=8), 1)
    assert not seen.ok and "rapo plan" in seen.mend


# --- the command ---


def test_doctor_looks_in_the_order_in_which_things_depend_on_each_other(smi, monkeypatch):
    smi("case $* in *driver*) echo 580.65.06;; *free*) echo 80000, 81559;; *) echo 81559, NVIDIA H100 80GB HBM3;; esac")
    monkeypatch.setattr(doctor, "has_gpu", lambda: True)
    monkeypatch.setattr(fits, "experiments", lambda: ["qwen2.5_0.5b_1gpu"])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(doctor, "imports", lambda module: doctor.Finding(f"import {module}", "works"))
    monkeypatch.setattr(trials, "tried", lambda what, *_: doctor.Finding(what, "works"))
    monkeypatch.setattr(doctor, "_plugin", lambda: doctor.Finding("verl plugin", "loads"))
    seen = [finding.what for finding in doctor.examine(gpu=True)]
    order = ["NVIDIA driver", "python", "glibc", "torch", "import vllm", "flash-attn", *trials.WHAT.values()]
    order += ["CPUs for Ray", "free /dev/shm", "free GPU memory", "fits 1 x 80 GiB"]
    assert [what for what in seen if what in order] == order


def test_wrong_things_are_told_last_and_end_the_command_with_one(monkeypatch, capsys):
    wrong, right = doctor.Finding("a", "broken", False, "mend it"), doctor.Finding("b", "fine", mend="unused")
    print_findings([wrong, right])
    said = capsys.readouterr().out
    assert said.index("fine") < said.index("broken") < said.index("mend it") and "unused" not in said
    for found, code in (([right], 0), ([right, wrong], 1)):
        monkeypatch.setattr(doctor, "examine", lambda gpu, found=found: found)
        assert CliRunner().invoke(app, ["doctor", "--gpu"]).exit_code == code


def test_a_look_of_a_second_and_trials_of_minutes_are_not_asked_for_together():
    done = CliRunner().invoke(app, ["doctor", "--cluster", "--gpu"])
    assert done.exit_code == 2 and "ask for one of them" in " ".join(done.output.split())
