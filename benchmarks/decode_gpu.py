"""Attention of one new token over a long cache on a GPU: packed codes against flash attention over bfloat16.

    python benchmarks/decode_gpu.py [--out FILE] [--batch 8 32] [--tokens 8192 32768 131072]

All sides read what a model of 32 query and 8 kv heads of 128 has in its cache, and take turns. The packed sides are
what a layer does with its codes: absorbing the query, reading, un-mixing; RoPE of the query and the 68 exact tokens,
less than 1 % of the cache, are left out on both. Codes are random: speed does not depend on what they hold.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timing import in_turns, speedup
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mea.ops import triton as gpu
from mea.ops.codes import bits_per_token, code_bytes, group_sizes
from mea.records import make_record, write_record

HEADS, KV_HEADS, WIDTH = 32, 8, 128
# Numbers of components with 8, 4 and 2 bits: shares as `mea compress` gives SmolLM2's layers; "4 bits" keeps them all.
SIDES: dict[str, list[list[int]]] = {
    "predictive 20 %": [[96, 352, 576], [0, 160, 864]],
    "predictive 14 %": [[0, 128, 896], [0, 96, 768]],
    "joint 20 %": [[192, 576, 1088]],
    "4 bits": [[0, 1024, 0], [0, 1024, 0]],
}
BARS = {"predictive 20 %": 2.0}  # how many times as fast as the uncompressed cache it has to be
LIMIT = 0.8  # of the free memory, that all sides together may take


def packed(tiers: list[list[int]], batch: int, tokens: int, device: str) -> tuple[Callable[[Tensor], Tensor], int]:
    """A layer's reading of its codes, and the bytes of them."""
    groups = [group for part in tiers for group in group_sizes(part)]
    width, pairs = sum(map(sum, tiers)), sum(tiers[0]) // 2
    held = (batch, tokens, sum(code_bytes(*group) for group in groups))
    codes = torch.randint(0, 256, held, dtype=torch.uint8, device=device)
    scales = torch.randn(batch, tokens, 2 * len(groups), device=device).bfloat16()
    mean, decoder = torch.randn(KV_HEADS, WIDTH, device=device), torch.randn(KV_HEADS, WIDTH, width, device=device)
    maps: list[Any] = [decoder / width, mean, decoder / width, mean]
    if len(tiers) > 1:
        maps[0] = torch.randn(KV_HEADS, pairs, 2, device=device) / pairs
        maps.append(torch.arange(pairs, device=device) % (WIDTH // 2))
    reader = gpu.PackedReader(groups, *maps)
    turn = 10000.0 ** (torch.arange(WIDTH // 2, device=device) / (WIDTH // 2))
    blocks, places = (
        torch.arange(0, stop, step, device=device)[:, None] / turn for stop, step in ((tokens, 64), (64, 1))
    )
    angles = gpu.Angles((blocks.cos()[None], blocks.sin()[None]), (places.cos(), places.sin()))
    unmix = maps[2].mT.to(torch.bfloat16)

    def read(queries: Tensor) -> Tensor:
        average, _ = reader.read(queries, gpu.CodedTokens(codes, scales, 0, tokens, None), angles, WIDTH**-0.5)
        return average[:, :, 0].unflatten(1, (KV_HEADS, -1)).bfloat16() @ unmix

    assert 8 * codes.shape[-1] + 16 * scales.shape[-1] == sum(map(bits_per_token, tiers))
    return read, codes.nbytes + scales.nbytes


@torch.inference_mode()
def measure(batch: int, tokens: int, rounds: int, device: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and samples: seconds of one layer."""
    torch.manual_seed(seed)
    queries = torch.randn(batch, HEADS, 1, WIDTH, device=device).bfloat16()
    keys, values = torch.randn(2, batch, KV_HEADS, tokens, WIDTH, device=device, dtype=torch.bfloat16)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def timed(read: Callable[[], Any]) -> Callable[[], None]:
        return lambda: (read(), wait())[1]

    grouped = queries.view(batch, KV_HEADS, -1, WIDTH)  # the rows of one matrix: the cache is read once
    works = {"uncompressed": timed(lambda: scaled_dot_product_attention(grouped, keys, values))}
    works["uncompressed, enable_gqa"] = timed(
        lambda: scaled_dot_product_attention(queries, keys, values, enable_gqa=True)
    )
    bytes_read = {name: keys.nbytes + values.nbytes for name in works}
    probe = torch.empty(keys.nbytes // 2, dtype=torch.float32, device=device).fill_(1)
    works["read probe"], bytes_read["read probe"] = timed(probe.sum), probe.nbytes
    for name, tiers in SIDES.items():
        read, bytes_read[name] = packed(tiers, batch, tokens, device)
        works[name] = timed(lambda read=read: read(queries))
    samples = in_turns(works, rounds, 3, seed)
    best = min(("uncompressed", "uncompressed, enable_gqa"), key=lambda name: median(samples[name]))
    probed = bytes_read["read probe"] / median(samples["read probe"])
    results = {
        "fastest_uncompressed": best,
        "speedup": {name: speedup(samples[best], samples[name]) for name in SIDES},
        "bars": BARS,
        "bytes_read": bytes_read,
        "milliseconds": {name: 1e3 * median(times) for name, times in samples.items()},
        "share_of_bandwidth": {name: bytes_read[name] / median(times) / probed for name, times in samples.items()},
    }
    return results, samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda", help="cpu only with TRITON_INTERPRET=1, to try the script")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "decode_gpu.json")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible: this benchmark needs one")
    results: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    for batch in args.batch:
        for tokens in args.tokens:
            name, needed = f"batch_{batch}_tokens_{tokens}", 3 * 4 * batch * tokens * KV_HEADS * WIDTH
            if args.device == "cuda" and needed > LIMIT * torch.cuda.mem_get_info()[0]:
                print(f"{name}: left out, it needs {needed / 2**30:.0f} GiB")
                continue
            results[name], samples[name] = measure(batch, tokens, args.rounds, args.device, args.seed)
            for side, times in results[name]["milliseconds"].items():
                found = results[name]["speedup"].get(side, {}).get("median")
                faster = f", {found:.2f} times as fast as uncompressed" if found else ""
                share = results[name]["share_of_bandwidth"][side]
                print(f"{name} {side}: {times:.3f} ms{faster}, {share:.0%} of the read probe", flush=True)
    config = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": WIDTH, "sides": SIDES, "rounds": args.rounds}
    seeds = {"everything": args.seed}
    write_record(args.out, make_record("decode_gpu", config, results=results, samples=samples, seeds=seeds))
    print(args.out)


if __name__ == "__main__":
    main()
