"""Time and memory of a reference pass's head from the hidden states on: ours, veRL's fused kernel, and with logits.

    python benchmarks/linear_head.py --rows 4096 --columns 38016 --width 2048

One after the other, in rounds, without gradient. Memory is the peak of the tensors made, in units of one fp32
[rows, columns] tensor. Seconds as in benchmarks/head.py.

* ours: `rapo_verl.method.linear_head`, a temperature for each token.
* veRL fused: `FusedLinearForPPO`, its torch backend, one temperature for all.
* logits: the product in one tensor, then `rapo_verl.method.head`.
* product: that alone.

``--sweep`` times ours at other numbers of chunks.
"""

import argparse
import functools
import statistics
import time
from unittest import mock

import torch
from head import Memory
from verl.utils.experimental.torch_functional import FusedLinearForPPO

from rapo_verl.method import linear_head as linear_module
from rapo_verl.method.head import head
from rapo_verl.method.linear_head import linear_head


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=152064 // 4)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sweep", action="store_true", help="time ours at other numbers of chunks as well")
    args = parser.parse_args()
    generator = torch.Generator(args.device).manual_seed(0)
    options = {"generator": generator, "device": args.device}
    hidden, weight = (torch.randn(n, args.width, **options) for n in (args.rows, args.columns))
    hidden, weight = hidden.to(getattr(torch, args.dtype)), (weight / args.width**0.5).to(getattr(torch, args.dtype))
    labels = torch.randint(0, args.columns, (args.rows,), **options)
    each = 1 + torch.rand(args.rows, **options)
    formulations = {
        "ours": lambda: linear_head(hidden, weight, labels, temperature=each),
        "veRL fused": lambda: FusedLinearForPPO(impl_backend="torch").forward(hidden, weight, labels, temperature=1.0),
        "logits": lambda: head(hidden @ weight.T, labels, temperature=each)[:2],
        "product": lambda: hidden @ weight.T,
    }

    def ours_in(chunks: int) -> tuple:
        with mock.patch.object(linear_module, "CHUNKS", chunks):
            return linear_head(hidden, weight, labels, temperature=each)

    if args.sweep:
        formulations |= {f"ours, 1/{c}": functools.partial(ours_in, c) for c in (64, 32, 21, 16, 8, 4)}
    wait = torch.cuda.synchronize if hidden.is_cuda else lambda: None
    clock = time.perf_counter if hidden.is_cuda else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in formulations}
    peak = {}
    with torch.no_grad():
        for number in range(args.rounds + 1):
            for name in list(formulations)[:: 1 if number % 2 == 0 else -1]:
                counter = Memory()
                with counter if number == 0 else torch.no_grad():
                    wait()
                    start = clock()
                    formulations[name]()
                    wait()
                if number == 0:
                    peak[name] = counter.peak / (args.rows * args.columns * 4)
                else:
                    seconds[name].append(clock() - start)
    shapes = f"[{args.rows}, {args.width}] x [{args.width}, {args.columns}]"
    print(f"{shapes} {args.dtype}, {args.device}, {args.rounds} rounds")
    for name in formulations:
        print(f"{name:12} {statistics.median(seconds[name]):8.4f} s   memory {peak[name]:5.2f}")


if __name__ == "__main__":
    main()
