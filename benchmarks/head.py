"""Time and peak memory of log-prob, entropy and top-k forward KL: ours, veRL's, and two common formulations.

    python benchmarks/head.py --rows 4096 --columns 38016
    python benchmarks/head.py --device cuda --rows 8192 --columns 152064 --dtype bfloat16 --only ours "ours, no target"
    python benchmarks/head.py --device cuda --rows 8192 --columns 152064 --dtype bfloat16 --sweep

Forward and backward on the same logits, labels and top-k reference, one formulation after the other, in rounds. Memory
is counted by the tensors made, in units of one fp32 [rows, columns] tensor, the logits themselves excluded: the peak in
the forward, what is kept for the backward, and the peak in the backward with the logits' gradient. Seconds are CPU
seconds of this process (with one thread: what an idle machine's clock would show), on a GPU those of the clock, where
the time is also set against copying: one read of the logits and one write of as much at the measured bandwidth.
(Forward and backward together read twice and write once, so that 1.5 is what bandwidth alone would allow.) ``--sweep``
times the two Triton kernels alone at other numbers of warps and loads, against copying, the fastest first;
``--profile`` says after the table which kernels the time went to.

* ours: `rapo_verl.method.head`, on a GPU with its Triton kernels. The KL has a tail bucket.
* ours, in place: the same with the gradient written over the logits. ours, no target: log-prob and entropy alone.
  ours, torch: without Triton.
* veRL Megatron: `_lm_head_logits_processor` of its engine at TP = 1, with entropy and its top-k KL (no tail).
* veRL FSDP: entropy (chunked), `compute_forward_kl_topk` (chunked) and log-prob, as its engine calls them (no tail).
* NeMo-RL style: chunked log-softmax of both sides renormalised on the k tokens; entropy and log-prob by log-softmax.
* TRL style (GKD): whole log-softmax, KL over the vocabulary against a materialised reference.

The last two are our own writing of those formulations, not those projects' code.
"""

import argparse
import itertools
import os
import statistics
import time
import types
import weakref
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from rapo_verl.method import head as head_module
from rapo_verl.method import head_torch
from rapo_verl.method.head import Target, head


class Memory(TorchDispatchMode):
    """Counts the bytes of the storages made while it is on: ``live`` now, ``peak`` so far."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self.seen.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation and count the storages of its results that are new."""
        before = {x.untyped_storage()._cdata for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_flatten(out)[0]:
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen and key not in before:
                    self.seen.add(key)
                    self.live += size
                    weakref.finalize(storage, self._free, key, size)
                    self.peak = max(self.peak, self.live)
        return out


class Case:
    """Logits of a sharpened and a plain distribution around common tokens, as of a policy and its reference."""

    def __init__(self, rows: int, columns: int, k: int, dtype: torch.dtype, device: str, *, keep_reference: bool):
        generator = torch.Generator(device).manual_seed(0)
        options = {"generator": generator, "device": device}
        shared = torch.randn(rows, columns, **options) * 2
        self.logits = (1.3 * shared + torch.randn(rows, columns, **options)).to(dtype)
        # In place, so that the machine must not hold more than it measures.
        reference = shared.sub_(shared.logsumexp(1, keepdim=True))
        top = reference.topk(k, 1)
        self.reference = reference if keep_reference else None
        self.ids, self.log_q = top.indices, top.values
        self.log_tail = torch.log1p(-top.values.exp().sum(1))
        self.labels = torch.randint(0, columns, (rows,), **options)
        self.temperature = torch.ones(rows, device=device)


def ours(case: Case, logits: torch.Tensor) -> tuple:
    """The head of this project."""
    target = Target(case.ids, case.log_q, case.log_tail)
    return tuple(head(logits, case.labels, temperature=case.temperature, target=target))


def ours_in_place(case: Case, logits: torch.Tensor) -> tuple:
    """The same where the logits may be overwritten."""
    target = Target(case.ids, case.log_q, case.log_tail)
    return tuple(head(logits, case.labels, temperature=case.temperature, target=target, gradient_in_place=True))


def ours_torch(case: Case, logits: torch.Tensor) -> tuple:
    """The same without Triton."""
    with mock.patch.object(head_module, "sweeps_for", lambda *_: head_torch):
        return ours(case, logits)


def ours_no_target(case: Case, logits: torch.Tensor) -> tuple:
    """Log-prob and entropy alone."""
    return tuple(head(logits, case.labels, temperature=case.temperature))[:2]


def verl_megatron(case: Case, logits: torch.Tensor) -> tuple:
    """The head of veRL's Megatron engine, which divides the logits it is given in place: it gets a copy."""
    from verl.trainer.distillation.megatron.losses import _VocabParallelKLDivergence
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

    engine = types.SimpleNamespace(engine_config=types.SimpleNamespace(entropy_from_logits_with_chunking=False))

    def kl(student_logits, data, data_format):
        return {"kl": _VocabParallelKLDivergence.apply(student_logits[0], case.log_q, case.ids, None)[0]}

    out = MegatronEngineWithLMHead._lm_head_logits_processor(
        engine, logits[None], case.labels[None], case.temperature[None].clone(), calculate_sum_pi_squared=False,
        calculate_entropy=True, distillation_use_topk=True, distillation_only=False, logits_processor_func=kl,
        batch=None, data_format="thd",
    )  # fmt: skip
    return out["log_probs"][0], out["entropy"][0], out["kl"]


def verl_fsdp(case: Case, logits: torch.Tensor) -> tuple:
    """The head of veRL's FSDP engine with its chunked options."""
    from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
    from verl.utils.torch_functional import entropy_from_logits_with_chunking, logprobs_from_logits

    config = types.SimpleNamespace(
        distillation_loss=types.SimpleNamespace(use_chunked_topk=True, log_prob_min_clamp=None)
    )
    scaled = logits / case.temperature[:, None].to(logits.dtype)
    offsets = torch.tensor([0, len(logits)], device=logits.device)
    nested = [torch.nested.nested_tensor_from_jagged(x, offsets) for x in (case.log_q, case.ids)]
    entropy = entropy_from_logits_with_chunking(scaled)
    kl = compute_forward_kl_topk(scaled[None], *nested, config=config, data_format="thd")
    return logprobs_from_logits(scaled, case.labels, inplace_backward=False), entropy, kl["distillation_losses"][0]


def nemo_rl_style(case: Case, logits: torch.Tensor, chunk: int = 1024) -> tuple:
    """Both sides renormalised on the k tokens; chunks recomputed in the backward."""

    def part(z, labels, ids, log_q):
        log_p = torch.log_softmax(z.float(), -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        named, q = torch.log_softmax(log_p.gather(1, ids), -1), torch.log_softmax(log_q, -1)
        return log_p.gather(1, labels[:, None])[:, 0], entropy, (q.exp() * (q - named)).sum(-1)

    parts = [
        checkpoint(part, *(x[s : s + chunk] for x in (logits, case.labels, case.ids, case.log_q)), use_reentrant=False)
        for s in range(0, len(logits), chunk)
    ]
    return tuple(torch.cat(x) for x in zip(*parts))


def trl_style(case: Case, logits: torch.Tensor) -> tuple:
    """The whole log-softmax and the KL over the vocabulary."""
    log_p = torch.log_softmax(logits.float() / case.temperature[:, None], -1)
    kl = torch.nn.functional.kl_div(log_p, case.reference, reduction="none", log_target=True).sum(-1)
    return log_p.gather(1, case.labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1), kl


FORMULATIONS: dict[str, Callable] = {
    "ours": ours,
    "ours, in place": ours_in_place,
    "ours, no target": ours_no_target,
    "ours, torch": ours_torch,
    "veRL Megatron": verl_megatron,
    "veRL FSDP": verl_fsdp,
    "NeMo-RL style": nemo_rl_style,
    "TRL style": trl_style,
}


def measure(run: Callable, case: Case, memory: bool) -> tuple:
    """Return (forward seconds, backward seconds, and in units: forward peak, kept, backward peak)."""
    leaf = case.logits.detach().requires_grad_(True)
    # These write to the logits: a copy, made before the clock starts, stands for the model's output.
    logits = leaf.clone() if run in (verl_megatron, ours_in_place) else leaf
    weights = torch.randn(3, len(leaf), device=leaf.device)
    wait = torch.cuda.synchronize if leaf.is_cuda else lambda: None
    clock = time.perf_counter if leaf.is_cuda else time.process_time
    counter = Memory()
    with counter if memory else torch.enable_grad():
        wait()
        start = clock()
        out = run(case, logits)
        wait()
        middle = clock()
        forward, kept = counter.peak, counter.live
        counter.peak = counter.live
        torch.autograd.backward(out, [w.to(x.dtype) for w, x in zip(weights, out)])
        wait()
        end = clock()
    unit = case.logits.numel() * 4
    return middle - start, end - middle, forward / unit, kept / unit, counter.peak / unit


def copy_seconds(logits: torch.Tensor) -> float:
    """Return the time of reading the logits once and writing as much once."""
    other = torch.empty_like(logits)
    seconds = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        other.copy_(logits)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def sweep(case: Case) -> None:
    """Print the times of the two kernels at other numbers of warps and loads, with the case's target and without."""
    from triton.testing import do_bench

    from rapo_verl.method import head_triton

    logits, n = case.logits, len(case.logits)
    copy, gradient = copy_seconds(logits), torch.empty_like(logits)
    ids, order = case.ids.sort(1)
    q, one, each = (
        case.log_q.gather(1, order).exp(),
        torch.ones_like(case.log_tail),
        torch.randn(3, n).to(logits.device),
    )

    def runs(k: int) -> dict[str, Callable]:
        named = ids[:, :k].contiguous()
        terms = head_torch.GradientTerms(case.labels, named, q[:, :k].contiguous(), one, one, one, 12 * one, one, *each)
        write = partial(head_triton.write_gradient, logits=logits, where=slice(None), terms=terms, start=0)
        return {
            "SUMS": partial(head_triton.sums, logits, slice(None), one, case.labels, named, None, 0),
            "GRADIENT": partial(write, gradient),
            "GRADIENT in place": partial(write, logits),
        }

    print(f"one read and one write of the logits: {copy * 1e3:.3f} ms; below: warps x loads and ms, the fastest first")
    for kernel, run in runs(ids.shape[1]).items():
        found, name = [], kernel.split()[0]
        for warps, loads in itertools.product((4, 8, 16), (1, 2, 4)):
            settings = {f"{name}_WARPS": warps, f"{name}_LOADS": loads}
            with mock.patch.multiple(head_triton, **settings):
                found.append((do_bench(run, warmup=3, rep=15, return_mode="median"), warps, loads))
                if (warps, loads) == (4, 1):
                    print(f"{kernel}, no target, 4x1: {do_bench(runs(0)[kernel], rep=15, return_mode='median'):.3f}")
        best = "  ".join(f"{warps}x{loads} {ms:.3f}" for ms, warps, loads in sorted(found))
        print(f"{kernel:18} {min(found)[0] / copy / 1e3:5.2f} times copying: {best}", flush=True)


def print_profile(name: str, case: Case, lines: int = 15) -> None:
    """Print the kernels of one forward and backward, those that take longest first, and their sum against the clock."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        seconds = measure(FORMULATIONS[name], case, memory=False)
    kernels = [event for event in found.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(event.self_device_time_total for event in kernels) / 1e3
    print(f"{name}: {total:.3f} ms in kernels, {sum(seconds[:2]) * 1e3:.3f} ms by the clock under the profiler")
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:lines]:
        print(f"  {event.self_device_time_total / 1e3:8.3f} ms {event.count:4} x {event.key[:100]}")


def single_process_group() -> None:
    """Make the process group of one that veRL's Megatron head wants."""
    from megatron.core import parallel_state

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=152064 // 4)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=list(FORMULATIONS))
    parser.add_argument("--sweep", action="store_true", help="time Triton's kernels at other settings, and stop")
    parser.add_argument("--profile", action="store_true", help="print the kernels of each on a GPU as well")
    args = parser.parse_args()
    if args.sweep:
        sweep(Case(args.rows, args.columns, args.k, getattr(torch, args.dtype), args.device, keep_reference=False))
        return
    # Without CUDA, "ours" is in torch anyway.
    args.only = args.only or [name for name in FORMULATIONS if args.device != "cpu" or name != "ours, torch"]
    if any(name.startswith("veRL") for name in args.only):
        single_process_group()
    dtype, keep = getattr(torch, args.dtype), "TRL style" in args.only
    case = Case(args.rows, args.columns, args.k, dtype, args.device, keep_reference=keep)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in args.only}
    units: dict[str, tuple] = {}
    for number in range(args.rounds + 1):
        # The first round counts memory, and warms up; the order alternates against a drift of the machine.
        for name in args.only[:: 1 if number % 2 == 0 else -1]:
            found = measure(FORMULATIONS[name], case, memory=number == 0)
            if number == 0:
                units[name] = found[2:]
            else:
                seconds[name].append(found[:2])
    threads = f", {torch.get_num_threads()} thread(s)" if args.device == "cpu" else ""
    print(f"[{args.rows}, {args.columns}] {args.dtype}, k = {args.k}, {args.device}{threads}, {args.rounds} rounds")
    copy = None if args.device == "cpu" else copy_seconds(case.logits)
    against = "" if copy is None else f" x copying, {copy * 1e3:.2f} ms"
    print(
        f"{'':15} {'forward s':>10} {'backward s':>10} {'both':>8} {'memory: fwd':>12} {'kept':>6} {'bwd':>6}{against}"
    )
    for name in args.only:
        forward, backward = (statistics.median(s) for s in zip(*seconds[name]))
        both = statistics.median(sum(s) for s in seconds[name])
        a, b, c = units[name]
        times = "" if copy is None else f"{both / copy:11.2f}"
        print(f"{name:15} {forward:10.4f} {backward:10.4f} {both:8.4f} {a:12.2f} {b:6.2f} {c:6.2f}{times}")
    for name in args.only if args.profile else ():
        print_profile(name, case)


if __name__ == "__main__":
    main()
