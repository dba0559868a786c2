"""`python -m cllm4rec_dist` is the `cllm4rec` command."""

from cllm4rec_dist.cli import main

if __name__ == "__main__":
    main()
