"""A model compressed by a baseline, which `mea compress` does not offer, in a folder as it writes one.

python experiments/make_baseline.py MODEL OUT METHOD [--keep 0.5] [--refine 2] ...
"""

import argparse

from mea.cli.console import progress
from mea.compression import Calibration, CompressOptions, compress_to_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("method", help="as in mea compare, such as post_rope or post_rope:sensitivity")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--refine", type=int, default=0)
    parser.add_argument("--calibration-tokens", type=int, default=Calibration.tokens)
    parser.add_argument("--copy-fraction", type=float, default=Calibration.copy_fraction)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--measure", type=int, default=0, help="tokens of WikiText-2 test")
    given = parser.parse_args()
    calibration = Calibration(tokens=given.calibration_tokens, copy_fraction=given.copy_fraction)
    options = CompressOptions(
        given.keep, method=given.method, groups=given.groups, calibration=calibration, refine=given.refine
    )
    with progress() as report:
        compress_to_folder(
            given.model, given.out, options, dtype=given.dtype, measure_tokens=given.measure, progress=report
        )


if __name__ == "__main__":
    main()
