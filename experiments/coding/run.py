"""Perplexity of packed caches at several sizes, for several draws of calibration text: one record per draw and size."""

import argparse
from dataclasses import replace
from pathlib import Path

from mea.cli.console import progress
from mea.comparison.configs import MethodConfig
from mea.comparison.protocol import Protocol
from mea.comparison.run import compare
from mea.compression.calibrate.text import Calibration
from mea.models.loading import packaged_model

SIZES = {"predictive": (0.28, 0.2, 0.14), "joint": (0.28, 0.2, 0.14, 0.1)}
PROTOCOL = Protocol(dtype="bfloat16", prompt="", decode_steps=0)


def main() -> None:
    """Measure all sizes for the first draw, with quality by position at a fifth, and perplexity for the other draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="the packaged SmolLM2-135M by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("records"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", type=float, nargs="+", default=None)
    arguments = parser.parse_args()
    model = arguments.model or str(packaged_model())
    for seed in arguments.seeds:
        configs = [
            MethodConfig(f"{method} {keep:g}", method, keep, series=method)
            for method, keeps in SIZES.items()
            for keep in keeps
            if arguments.sizes is None or keep in arguments.sizes
        ]
        if not seed:
            configs += [MethodConfig(f"{bits} bits", "none", 1.0, bits=bits, series="quantised") for bits in (8, 4, 2)]
        protocol = replace(PROTOCOL, positions=()) if seed else PROTOCOL
        with progress() as report:
            compare(
                model, arguments.out / f"seed{seed}", configs, protocol=protocol, calibration=Calibration(seed=seed),
                progress=report,
            )  # fmt: skip


if __name__ == "__main__":
    main()
