"""Evaluate a run beside the baselines, under any launcher; see --help."""

import sys

from cllm4rec_dist.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
