"""`python -m cllm4rec_dist` is the `cllm4rec` command."""

import os
import signal

try:
    from cllm4rec_dist.cli import main
except KeyboardInterrupt:  # nothing has begun that a traceback could explain
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)

if __name__ == "__main__":
    main()
