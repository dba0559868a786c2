"""Finetune: under ray, ray job submit, torchrun, deepspeed or srun; see --help and the README."""

import sys

from cllm4rec_dist.cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
