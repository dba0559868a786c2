"""Build a corpus: python launch/prepare.py RECIPE OUTPUT --tokenizer BACKBONE"""

import sys

from cllm4rec_dist.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
