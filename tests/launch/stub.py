"""A job with a given behavior that starts quickly: `python -m tests.launch.stub FOLDER CODE...`

The job exits with the first code at its first start, with the second code at the second start, and so on. With `sleep`
in place of a code it waits for SIGTERM and then exits with 75; with `hang` it ignores SIGTERM. `A/B` gives the codes of
two processes. Each start appends a line to FOLDER/starts.RANK.
"""

import os
import pathlib
import signal
import sys
import time

if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    codes = [word for word in sys.argv[2:] if not word.startswith("--")]
    rank = next((word.partition("=")[2] for word in sys.argv if word.startswith("--process_id=")), "0")
    starts = folder / f"starts.{rank}"
    number = len(starts.read_text().splitlines()) if starts.exists() else 0
    with open(starts, "a") as file:
        file.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')} {' '.join(sys.argv[2:])}\n")
    code = codes[min(number, len(codes) - 1)].split("/")
    code = code[int(rank)] if len(code) > 1 else code[0]
    if code in ("sleep", "hang"):
        ends = signal.SIG_IGN if code == "hang" else lambda number, frame: os._exit(75)
        signal.signal(signal.SIGTERM, ends)
        (folder / f"ready.{rank}").touch()
        until = time.monotonic() + 30
        while time.monotonic() < until:  # limits the duration of a failing test
            time.sleep(0.02)
        sys.exit(2)
    print(f"error: stub exits with {code}", file=sys.stderr)
    if code == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(code))
