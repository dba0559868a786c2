"""Write recommendations as Parquet, under any launcher; see --help."""

import sys

from cllm4rec_dist.cli import main

if __name__ == "__main__":
    main(["recommend", *sys.argv[1:]])
