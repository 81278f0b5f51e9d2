"""Small things that every run does on a GPU, each tried in a process of its own, which it may crash or hang.

`python -m rapo_verl.run.trials NAME DEVICE` tries one; `trials` has `rapo doctor --gpu` try all.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from rapo_verl.run.finding import Finding

RAISED = re.compile(r"(?:^|: )[\w.]*(?:Error|Exception): \S")
ELEMENTS = 1 << 24  # of the all-reduce: 64 MiB of float32
# Most of each is imports, which a cold shared filesystem makes slow; the kernel is compiled, and vLLM starts.
SECONDS = {"matmul": 120, "kernel": 180, "token": 300, "all_reduce": 180}
WHAT = {
    "matmul": "a product",
    "kernel": "a kernel of ours",
    "token": "a token of vLLM's",
    "all_reduce": "an all-reduce over the GPUs",
}
MENDS = {
    "matmul": "the driver, or a build of torch for another CUDA: nvidia-smi, then make gpu",
    "kernel": "Triton wants gcc and Python's headers (apt-get install build-essential python3-dev); rapo.head=verl "
    "does without",
    "token": "export VLLM_USE_FLASHINFER_SAMPLER=0, or train with "
    "+actor_rollout_ref.rollout.engine_kwargs.vllm.attention_backend=TRITON_ATTN",
    "all_reduce": "NCCL_DEBUG=INFO says more; a container needs --ipc=host; NCCL_P2P_DISABLE=1 where cards do not "
    "reach each other",
}


def trials(count: int, device: str = "cuda") -> list[Finding]:
    """Return what became of each trial on so many GPUs."""
    return [
        tried(WHAT[name], _command(name, device, count if name == "all_reduce" else 1), mend, SECONDS[name])
        for name, mend in MENDS.items()
    ]


def _command(name: str, device: str, processes: int) -> list[str]:
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *many, "-m", "rapo_verl.run.trials", name, device]


def tried(what: str, command: list[str], mend: str, seconds: float) -> Finding:
    """Return how a command ended: in time and well, by what it printed last, or by which signal."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        # A session of its own, to end all that it has started; no pipe, which they would hold open.
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            # Not waited for: where the driver hangs, the kernel keeps it even from a SIGKILL.
            os.killpg(process.pid, signal.SIGKILL)
            return Finding(what, f"not done after {seconds:.0f} s", False, mend)
        log.seek(0)
        lines = [line.strip() for line in log if re.search(r"\w", line)]
    if code == 0:
        return Finding(what, lines[-1] if lines else "works")
    if code < 0:
        return Finding(what, f"crashes: {signal.Signals(-code).name}", False, f"built for another torch? {mend}")
    # What a library prints as it ends comes after its exception.
    said = [line for line in lines if RAISED.search(line)] or lines or [f"exit code {code}"]
    mend = f"built for another torch: {mend}" if "undefined symbol" in said[-1] else mend
    return Finding(what, said[-1], False, mend)


def matmul(device: str) -> str:
    """Return how a product in bf16 went; ArithmeticError if the same in fp64 differs."""
    import torch

    a, b = (torch.randn(512, 512, dtype=torch.bfloat16, device=device) for _ in range(2))
    error = (a @ b - a.double() @ b.double()).abs().max().item()
    if not error < 1:  # of numbers of 22 on average, that bf16 rounds by up to 0.5
        raise ArithmeticError(f"a product of bf16 matrices is off by {error:.3g}")
    return _works(device)


def kernel(device: str) -> str:
    """Return how the head went, forward and backward; ArithmeticError if torch's log-softmax in fp64 differs."""
    import torch

    from rapo_verl.method.head import head

    logits, labels = torch.randn(64, 5000, device=device), torch.arange(64, device=device)
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    log_prob = head(ours, labels).log_prob
    wanted = torch.log_softmax(exact, 1).gather(1, labels[:, None])[:, 0]
    (gradient,), (gradient_wanted,) = (torch.autograd.grad(x.sum(), z) for x, z in ((log_prob, ours), (wanted, exact)))
    error = max((log_prob - wanted).abs().max().item(), (gradient - gradient_wanted).abs().max().item())
    if not error < 1e-4:
        raise ArithmeticError(f"the head is off by {error:.3g}")
    return _works(device)


def token(device: str) -> str:
    """Return how vLLM sampled one token of a tiny model with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    # In this process, whose end the trial sees.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512}
    config = Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64)
    with tempfile.TemporaryDirectory() as folder:
        Qwen2ForCausalLM(config).save_pretrained(folder)
        memory = {"gpu_memory_utilization": 0.2} if device == "cuda" else {"kv_cache_memory_bytes": 1 << 26}
        engine = LLM(folder, skip_tokenizer_init=True, enforce_eager=True, max_model_len=64, seed=0, **memory)
        asked = SamplingParams(max_tokens=1, detokenize=False)
        (answer,) = engine.generate([{"prompt_token_ids": [3, 4, 5]}], asked, use_tqdm=False)
    if len(answer.outputs[0].token_ids) != 1:
        raise RuntimeError("vLLM returned no token")
    return _works(device)


def all_reduce(device: str) -> str:
    """Return the seconds of an all-reduce over the ranks that torch.distributed.run started, or over this process."""
    import torch
    import torch.distributed as dist

    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if "RANK" not in os.environ:
        os.environ.update(alone)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    values = torch.full((ELEMENTS,), float(dist.get_rank()), device=device)
    started = time.monotonic()
    dist.all_reduce(values)
    total, world = values[0].item(), dist.get_world_size()
    if total != world * (world - 1) / 2:
        raise RuntimeError(f"the sum over ranks is {total}, not {world * (world - 1) / 2}: a link corrupts data")
    said = f"all-reduce of {ELEMENTS * 4 >> 20} MiB over {world} ranks: {time.monotonic() - started:.2f} s"
    first = dist.get_rank() == 0
    dist.destroy_process_group()
    return said if first else ""


def _works(device: str) -> str:
    return f"works on {device}"


TRIALS: dict[str, Callable[[str], str]] = {"matmul": matmul, "kernel": kernel, "token": token, "all_reduce": all_reduce}

if __name__ == "__main__":
    if said := TRIALS[sys.argv[1]](sys.argv[2]):
        print(said, flush=True)
    os._exit(0)  # what libraries still do and say as a process ends is no part of the trial
