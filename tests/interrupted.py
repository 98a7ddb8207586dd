"""`abpem bench` in a process that is interrupted; for tests/bench/test_command.

    python -m tests.interrupted FOLDER WORKERS

With one worker as soon as a cell is finished; with more, as Ctrl-C would, all processes as soon as there is a second.
"""

import os
import signal
import sys
import threading
from multiprocessing import active_children
from pathlib import Path

from lightning_abpem.cli import main


def interrupt(folder: Path, workers: int) -> None:
    while not (active_children() if workers > 1 else list(folder.glob("cells/*.json"))):
        threading.Event().wait(0.001)
    if workers > 1:
        os.killpg(os.getpgrp(), signal.SIGINT)
    else:
        os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    out, count = Path(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    threading.Thread(target=interrupt, args=(out, count), daemon=True).start()
    main(["bench", "tests.toybench.ToyBench", "--out", str(out), "--methods", "source,abpem", "--workers", str(count)])
