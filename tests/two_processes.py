"""A command under torchrun's launcher, by gloo on processors."""

import os
import subprocess
import sys


def run_on_two(*arguments: object) -> None:
    """Run a script, or a program after ``--no-python``, in two processes of one thread each; fail if it does."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "JAXTYPING_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, *map(str, arguments)], env=environment, check=True)
