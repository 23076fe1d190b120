"""Measure how many tokens of a model's cache fit into memory, by vLLM's own count, in an environment with vLLM.

    python benchmarks/serving_capacity.py ORIGINAL COMPRESSED [--gib 1] [--length 8192]

Each model is a folder. vLLM's number is the one of its log: the requests of `length` tokens that fit, times `length`.
"""

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from mea.records import make_record, write_record

START = """
import json, sys
from vllm import LLM
folder, memory, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
llm = LLM(folder, kv_cache_memory_bytes=memory, max_model_len=length, enforce_eager=True)
cache = llm.llm_engine.vllm_config.cache_config
print("capacity", json.dumps({"tokens": cache.kv_cache_size_tokens, "requests": cache.kv_cache_max_concurrency}))
"""


def capacity(folder: str, memory: int, length: int) -> dict[str, float]:
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override the memory
    command = [sys.executable, "-c", START, folder, str(memory), str(length)]
    run = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("capacity "))
    return json.loads(line.removeprefix("capacity "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original")
    parser.add_argument("compressed")
    parser.add_argument("--gib", type=float, default=1)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serving_capacity.json")
    args = parser.parse_args()
    memory = int(args.gib * 2**30)
    results = {name: capacity(getattr(args, name), memory, args.length) for name in ("original", "compressed")}
    ratio = results["compressed"]["tokens"] / results["original"]["tokens"]
    config = {
        "original": args.original,
        "compressed": args.compressed,
        "memory_bytes": memory,
        "length": args.length,
        "vllm": version("vllm"),
    }
    write_record(args.out, make_record("serving_capacity", config, results={**results, "ratio": ratio}))
    print(f"{results['original']['tokens']:,} -> {results['compressed']['tokens']:,} tokens, {ratio:.2f}x")


if __name__ == "__main__":
    main()
