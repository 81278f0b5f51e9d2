"""The head's Triton kernels: in Triton's interpreter on the CPU, through its compiler, and, marked gpu, on a device."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_head import EXACT, ROWS, SINGLE, VOCABULARY, Case, assert_same, by_autograd, edge_case, edge_rows

from rapo_verl.method import head as head_module
from rapo_verl.method import linear_head as linear_module
from rapo_verl.method.head import TRITON_NAMED, head
from rapo_verl.method.linear_head import linear_head

triton = pytest.importorskip("triton")

# --- in the interpreter: this file runs itself, since Triton reads its variable when it is imported ---


def test_kernels_in_tritons_interpreter_do_what_torch_does():
    # One thread: it starts processes by fork, which a pool of threads does not survive.
    variables = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment = os.environ | variables
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == list(INTERPRETED)


def head_triton():
    """Return the kernels' module; imported here, where Triton has seen whether it is to interpret."""
    from rapo_verl.method import head_triton

    return head_triton


def interpret() -> None:
    """Put the kernels in the heads' place, in blocks of 16 columns: three for the 38 of the cases."""
    kernels = head_triton()
    kernels.THREADS_OF_WARP = 1
    kernels.SUMS_WARPS, kernels.SUMS_LOADS = 1, 2
    kernels.GRADIENT_WARPS, kernels.GRADIENT_LOADS = 2, 1
    head_module.sweeps_for = linear_module.sweeps_for = lambda *_: kernels


def values_and_gradient():
    for k, mass in ((0, 1.0), (5, 2.5), (VOCABULARY, 1.0)):
        case = Case(k=k, mass=mass)
        assert_same(case.run(), by_autograd(case))


def strides():
    case = Case()
    want = by_autograd(case)
    wide = torch.zeros(VOCABULARY, 2 * ROWS, dtype=torch.float64)
    wide[:, ::2] = case.logits.T
    out, gradient = case.run(wide.T[::2])
    assert_same((out, gradient), want)


def precision():
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(dtype=dtype)
        (out, gradient), (want, want_gradient) = case.run(), by_autograd(case)
        assert all(x.dtype == torch.float32 for x in out) and gradient.dtype == dtype
        for a, b in zip(out, want):
            torch.testing.assert_close(a.double(), b, **SINGLE)
        # The interpreter cuts the bits off that a bf16 has not (triton 3.9.0 runtime/interpreter.py:562); a GPU rounds.
        rounding = {"rtol": 2**-7, "atol": 1e-6} if dtype == torch.bfloat16 else SINGLE
        torch.testing.assert_close(gradient.double(), want_gradient, **rounding)


def log_prob_has_the_same_bits_with_and_without_a_target():
    case = Case(dtype=torch.bfloat16)
    with_target, without = (head(case.logits, case.labels, target=target) for target in (case.target, None))
    assert torch.equal(with_target.log_prob, without.log_prob) and torch.equal(with_target.entropy, without.entropy)


def logits_masked_by_the_lowest_number():
    for dtype in (torch.bfloat16, torch.float16):
        case = Case(dtype=dtype)
        case.logits[:, 3:35] = torch.finfo(dtype).min  # two whole blocks, and what pads the last
        case.logits[:, 3:35:7] = -1e4
        case.temperature = torch.full((ROWS,), 1.5)
        case.weights = case.weights * torch.tensor([[0.0], [1.0], [0.0]])
        (out, gradient), (want, want_gradient) = case.run(), by_autograd(case)
        torch.testing.assert_close(out.entropy.double(), want.entropy, **SINGLE)
        torch.testing.assert_close(gradient.double(), want_gradient, rtol=2**-7, atol=1e-6)


def threads_that_see_no_column():
    # Blocks as on a GPU, far wider than the 38 columns: in fp32 the lowest peak times a sum is an infinity.
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(dtype=dtype, rows=3)
        with mock.patch.multiple(head_triton(), THREADS_OF_WARP=32, SUMS_WARPS=4, SUMS_LOADS=1):
            out, gradient = case.run()
        want, want_gradient = by_autograd(case)
        for a, b in zip(out, want):
            torch.testing.assert_close(a.double(), b, **SINGLE)
        torch.testing.assert_close(gradient.double(), want_gradient, rtol=2**-7, atol=1e-5)


def what_the_head_refuses():
    for field, place, value, text in (
        ("labels", 4, VOCABULARY, "row 4 has a label outside"),
        ("labels", 4, -1, "row 4 has a label outside"),
        ("ids", (4, 1), VOCABULARY, "row 4 has a target id outside"),
        ("ids", (4, 1), -1, "row 4 has a target id outside"),
        ("ids", (4, slice(2)), 7, "row 4 has a target id twice"),
        ("temperature", 4, 0.0, "row 4 has a temperature"),
        ("temperature", 4, -1.0, "row 4 has a temperature"),
        ("temperature", 4, torch.nan, "row 4 has a temperature"),
        ("log_prob", (4, 1), torch.nan, "row 4 has a target log-probability"),
        ("log_prob", (4, 1), torch.inf, "row 4 has a target log-probability"),
        ("log_tail", 4, torch.nan, "row 4 has a target log-probability"),
    ):
        case = Case()
        values = getattr(case.target, field, None)
        (getattr(case, field) if values is None else values)[place] = value
        with pytest.raises(ValueError, match=text):
            case.run()
        case.weights = case.weights * (torch.arange(ROWS) != 4)
        assert case.run(rows=torch.arange(ROWS) != 4)[1].isfinite().all()


def linear_head_takes_the_same_sweep():
    case = Case()
    weight = torch.randn(VOCABULARY, 6, dtype=torch.float64)
    hidden = torch.randn(ROWS, 6, dtype=torch.float64)
    got = linear_head(hidden, weight, case.labels, temperature=case.temperature, rows=edge_rows())
    want = head(hidden @ weight.T, case.labels, temperature=case.temperature, rows=edge_rows())
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, **EXACT)


def small_tail():
    # 1e-6 of the mass: one minus the rest would be off by a tenth in fp32.
    case = Case(dtype=torch.float32, k=3, rows=4)
    case.logits.scatter_add_(1, case.target.ids.long(), torch.full((4, 3), 20.0))
    case.temperature = torch.ones(4)
    torch.testing.assert_close(case.run()[0].forward_kl.double(), by_autograd(case)[0].forward_kl, rtol=1e-5, atol=0)


def rows_left_out():
    case = Case()
    rows = torch.arange(ROWS) % 3 != 1
    want = by_autograd(case)[1] * rows[:, None]
    case.logits[~rows] = torch.nan
    torch.testing.assert_close(case.run(rows=rows, weights=case.weights * rows)[1], want, **EXACT)


def gradient_in_place():
    case = Case()
    logits = case.logits.clone().requires_grad_(True) * 1.0
    out = head(logits, case.labels, temperature=case.temperature, target=case.target, gradient_in_place=True)
    loss = sum((w * x).sum() for w, x in zip(case.weights, out))
    loss.backward(retain_graph=True)
    torch.testing.assert_close(logits.detach(), by_autograd(case)[1], **EXACT)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def one_output_alone():
    case = Case()
    logits = case.logits.clone().requires_grad_(True)
    head(logits, case.labels, temperature=case.temperature, target=case.target).log_prob.sum().backward()
    case.weights = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64).expand(3, ROWS)
    torch.testing.assert_close(logits.grad, by_autograd(case)[1], **EXACT)


def non_finite_logits():
    for bad in (torch.nan, torch.inf, -torch.inf):
        case = Case()
        case.logits[5, 17] = bad
        with pytest.raises(ValueError, match="logits of row 5 hold NaN or infinity"):
            case.run()


def _shard(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    case, half = edge_case(), VOCABULARY // 2
    columns = slice(rank * half, (rank + 1) * half)
    out, gradient = case.run(case.logits[:, columns], group=dist.group.WORLD, rows=edge_rows())
    torch.save((tuple(out), gradient), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def two_shards():
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_shard, (folder,), nprocs=2, start_method="fork")
        parts = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
    case = edge_case()
    case.weights = case.weights * edge_rows()
    want, gradient = by_autograd(case)
    for part in parts:
        for a, b in zip(part[0], want):
            torch.testing.assert_close(a, b * edge_rows(), **EXACT)
    torch.testing.assert_close(torch.cat([part[1] for part in parts], 1), gradient, **EXACT)


INTERPRETED = {
    f.__name__: f
    for f in (
        values_and_gradient, strides, precision, small_tail, rows_left_out,
        log_prob_has_the_same_bits_with_and_without_a_target, logits_masked_by_the_lowest_number,
        threads_that_see_no_column, what_the_head_refuses, linear_head_takes_the_same_sweep, gradient_in_place,
        one_output_alone, non_finite_logits, two_shards,
    )
}  # fmt: skip

# --- through the compiler ---


@pytest.mark.parametrize(("capability", "masked"), [(80, True), (90, False)])
def test_kernels_compile_for_a_gpu_without_spilling(capability, masked, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = head_triton()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"logits": "*bf16", "gradient": "*bf16", "rows": "*i1", "ids": "*i64", "labels": "*i64"}
    types |= dict.fromkeys(("columns", "start", "vocabulary", "named", "row_stride", "gradient_row_stride"), "i32")
    for kernel, warps, loads in (
        (kernels._sums_kernel, kernels.SUMS_WARPS, kernels.SUMS_LOADS),
        (kernels._gradient_kernel, kernels.GRADIENT_WARPS, kernels.GRADIENT_LOADS),
    ):
        names = kernel.arg_names
        constants = {"THREADS": 32 * warps, "LOADS": loads, "NAMED": 64} | ({} if masked else {"rows": None})
        made = triton.compile(
            ASTSource(
                fn=kernel,
                signature={x: "constexpr" if x in constants else types.get(x, "*fp32") for x in names},
                constexprs=constants,
                # As Triton finds it at a launch, for a vocabulary divisible by 16.
                attrs={(i,): [["tt.divisibility", 16]] for i, x in enumerate(names) if x not in constants},
            ),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": warps},
        )
        # The first block and, ahead of the sweep, the next ones: 16 bytes at a time.
        assert len(re.findall(r"ld\.global\S*\.v4", made.asm["ptx"])) == 2 * loads
        (tmp_path / "cubin").write_bytes(made.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "--dump-resource-usage", tmp_path / "cubin"], capture_output=True, text=True)
        assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage.stdout) == ["0", "0"], usage.stdout


def test_kernels_are_for_cuda_and_not_for_a_target_that_names_a_vocabulary():
    from rapo_verl.method import head_torch

    class OnDevice:
        is_cuda = True

    assert head_module.sweeps_for(OnDevice(), TRITON_NAMED) is head_triton()
    assert head_module.sweeps_for(OnDevice(), TRITON_NAMED + 1) is head_torch
    assert head_module.sweeps_for(torch.zeros(1), 1) is head_torch


# --- on a device ---


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("vocabulary", "k"), [(VOCABULARY, 5), (4096, 64), (152064, 64), (4099, TRITON_NAMED), (9000, 0)]
)
def test_kernels_on_a_gpu_are_the_definitions_in_fp64(dtype, vocabulary, k):
    case = Case(dtype=dtype, vocabulary=vocabulary, k=k, rows=37)
    rows = torch.arange(37) % 5 != 2
    case.weights = case.weights * rows
    want, want_gradient = by_autograd(case)
    case.target = type(case.target)(*(x.cuda() for x in case.target))
    case.labels, case.temperature, case.weights = case.labels.cuda(), case.temperature.cuda(), case.weights.cuda()
    for in_place in (False, True):
        out, gradient = case.run(case.logits.cuda(), rows=rows.cuda(), gradient_in_place=in_place)
        # fp32: sums of up to 152,064 terms, and an exp good to 2 units in the last place.
        tolerance = EXACT if dtype == torch.float64 else {"rtol": 5e-5, "atol": 5e-5}
        for a, b in zip(out, want):
            torch.testing.assert_close(a.cpu().double(), b * rows, **tolerance)
        rounding = {"rtol": 2**-8, "atol": 1e-5} if dtype == torch.bfloat16 else tolerance
        torch.testing.assert_close(gradient.cpu().double(), want_gradient, **rounding)


@pytest.mark.gpu
@pytest.mark.filterwarnings("always")
def test_the_host_waits_once_for_the_device():
    case = Case(dtype=torch.bfloat16, vocabulary=4096, k=8)
    rows, logits = (torch.arange(ROWS) % 5 != 2).cuda(), case.logits.cuda().requires_grad_(True)
    target, labels = type(case.target)(*(x.cuda() for x in case.target)), case.labels.cuda()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as waits:
            sum(x.sum() for x in head(logits, labels, temperature=0.7, target=target, rows=rows)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1, [str(x.message) for x in waits]


@pytest.mark.gpu
def test_log_prob_on_a_gpu_has_the_same_bits_with_and_without_a_target():
    case = Case(dtype=torch.bfloat16, vocabulary=152064, k=64)
    target, logits, labels = type(case.target)(*(x.cuda() for x in case.target)), case.logits.cuda(), case.labels.cuda()
    assert torch.equal(head(logits, labels, target=target).log_prob, head(logits, labels).log_prob)


if __name__ == "__main__":
    interpret()
    for name, function in INTERPRETED.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        function()
        print(name, flush=True)
