"""`abpem bench` in a process that is interrupted as soon as a cell is finished; for test_bench."""

import os
import signal
import sys
import threading
from pathlib import Path

from lightning_abpem.cli import main


def interrupt(folder: Path) -> None:
    while not list(folder.glob("cells/*.json")):
        threading.Event().wait(0.001)
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    threading.Thread(target=interrupt, args=(out,), daemon=True).start()
    main(["bench", "tests.toybench.ToyBench", "--out", str(out), "--methods", "source,abpem", "--workers", "1"])
