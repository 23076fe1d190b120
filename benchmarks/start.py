"""Measure how long the command line takes to answer: ``mea --help``, every ``mea COMMAND --help`` and ``import mea``.

    python benchmarks/start.py [--rounds 10] [--out benchmarks/results/start.json]

Wall time of whole processes, which take turns. The load average is recorded beside the times: they mean something on a
machine that does nothing else.
"""

import argparse
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

from timing import in_turns

from mea.cli import COMMANDS
from mea.records import make_record, write_record

MEA = Path(sys.executable).with_name("mea")


def programs() -> dict[str, list[str]]:
    names = [name for commands in COMMANDS.values() for name in commands]
    helps = {f"mea {name} --help": [str(MEA), name, "--help"] for name in names}
    return {"import mea": [sys.executable, "-c", "import mea"], "mea --help": [str(MEA), "--help"], **helps}


def summary(seconds: list[float]) -> dict[str, float]:
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "start.json")
    args = parser.parse_args()
    run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
    works = {name: partial(run, command) for name, command in programs().items()}
    before = os.getloadavg()
    samples = in_turns(works, args.rounds, warmup=1)
    results = {name: summary(seconds) for name, seconds in samples.items()}
    config = {"rounds": args.rounds, "unit": "seconds of wall time"}
    record = make_record(
        "start", config, results=results, samples={**samples, "load_average": [before, os.getloadavg()]}
    )
    write_record(args.out, record)
    for name, result in results.items():
        print(f"{name:24} {result['median']:.2f} s ({result['lower_quartile']:.2f}-{result['upper_quartile']:.2f})")


if __name__ == "__main__":
    main()
