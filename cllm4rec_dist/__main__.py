"""`python -m cllm4rec_dist` is the `cllm4rec` command."""

import os
import signal

try:
    from cllm4rec_dist.cli import main

    if __name__ == "__main__":
        main()
except KeyboardInterrupt:  # before a command has begun: a traceback would explain nothing
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
