"""Throughput and peak memory of one training step, each attention variant beside the plain Transformer.

All variants live in one process and take turns, in a new random order every round, so that whatever else the machine
does hits all of them alike; ratios are formed within a round. A step is forward, backward and AdamW, on random tokens.
Peak memory on a CPU is that of a process of its own for each variant, interpreter and libraries included. Talking-heads
attention as published holds its score matrices, ``batch × heads × tokens²`` numbers several times per layer.

    python benchmarks/training_step.py --preset 30m --out record.json
"""

import argparse
import gc
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from mea.models.accounting import parameters, training_flops
from mea.models.decoder import MeaForCausalLM
from mea.models.presets import SHAPES, VARIANTS, preset
from mea.records import make_record, write_record

BASELINE = "transformer"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="30m", choices=list(SHAPES))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--tokens", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of each variant")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps of each variant, compilation included")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of autocast")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--only", choices=["time", "memory"], help="measure one of the two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the record goes; standard output if absent")
    parser.add_argument("--memory-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    return parser.parse_args()


def make_step(args: argparse.Namespace, variant: str) -> Callable[[], float]:
    """A function that takes one training step of `variant` and returns its seconds."""
    torch.manual_seed(args.seed)
    config = preset(args.preset, variant)
    model = MeaForCausalLM(config).to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, config.vocab_size, (args.batch, args.tokens), device=args.device)
    run = model if args.eager else torch.compile(model, fullgraph=True)
    low = args.dtype != "float32"

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast(args.device, dtype=torch.bfloat16) if low else nullcontext():
            loss = run(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def time_in_turns(args: argparse.Namespace, variants: list[str]) -> dict[str, list[float]]:
    """Seconds of every timed step; the k-th sample of each variant belongs to round k."""
    steps = {}
    for variant in variants:
        steps[variant] = make_step(args, variant)
        for _ in range(args.warmup):
            steps[variant]()
        print(f"{variant}: ready", file=sys.stderr)
    order, samples = random.Random(args.seed), {variant: [] for variant in variants}
    for i in range(args.rounds):
        for variant in order.sample(variants, len(variants)):
            samples[variant].append(steps[variant]())
        print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
    return samples


def peak_memory(args: argparse.Namespace, variant: str) -> int:
    """Most bytes in use during a few steps of one variant alone: of the GPU, or of this process."""
    gc.collect()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = make_step(args, variant)
    for _ in range(max(2, args.warmup)):
        step()
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_memory_apart(args: argparse.Namespace, variant: str) -> int:
    """`peak_memory` in a process of its own: a CPU keeps no count of tensors, and a process does not shrink."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", variant]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.splitlines()[-1])


def ratios(samples: dict[str, list[float]], variant: str, base: str) -> dict[str, float]:
    """Throughput of `variant` relative to `base`, round by round: median and quartiles."""
    paired = [b / v for v, b in zip(samples[variant], samples[base], strict=True)]
    if len(paired) == 1:
        return {"median": paired[0], "lower_quartile": paired[0], "upper_quartile": paired[0]}
    lower, median, upper = statistics.quantiles(paired, n=4, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}


def summary(args: argparse.Namespace, variant: str, samples: dict[str, list[float]], memory: dict[str, int]) -> dict:
    config = preset(args.preset, variant)
    found: dict = {"parameters": parameters(config)}
    if samples:
        seconds = statistics.median(samples[variant])
        found["tokens_per_second"] = args.batch * args.tokens / seconds
        found["flops_per_second"] = training_flops(config, args.batch, args.tokens) / seconds
    if memory:
        found["peak_memory_bytes"] = memory[variant]
        found[f"peak_memory_against_{BASELINE}"] = memory[variant] / memory[BASELINE]
    for base in (BASELINE, "groupnorm"):
        if base in samples:
            found[f"throughput_against_{base}"] = ratios(samples, variant, base)
    return found


def main() -> None:
    args = arguments()
    if args.memory_of:
        print(peak_memory(args, args.memory_of))
        return
    variants = list(dict.fromkeys([BASELINE, *args.variants]))
    load = os.getloadavg()
    memory = {} if args.only == "time" else {v: peak_memory_apart(args, v) for v in variants}
    samples = {} if args.only == "memory" else time_in_turns(args, variants)
    config = {name: value for name, value in vars(args).items() if name not in ("out", "memory_of", "seed")}
    record = make_record(
        "training_step",
        {**config, "load_average_before": load},
        results={variant: summary(args, variant, samples, memory) for variant in variants},
        samples={"seconds": samples, "peak_memory_bytes": memory},
        seeds={"tokens_weights_and_order": args.seed},
    )
    if args.out is None:
        print(json.dumps(record, indent=1))
    else:
        write_record(args.out, record)


if __name__ == "__main__":
    main()
