"""The `cllm4rec` command, which is also `python -m cllm4rec_dist`."""

import os
import signal


def main() -> None:
    """Run the command. An interrupt before it has begun ends the process by the signal, without a traceback."""
    try:
        from cllm4rec_dist import cli

        cli.main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    main()
