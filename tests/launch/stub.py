"""A job that does as it is told, and imports nothing that takes long: `python -m tests.launch.stub NOTES CODE...`

It ends with the first code at its first start, the second at the second, and so on. `sleep` in place of a code waits to
be told to end, and then ends with 75; `hang` does not end even then.
"""

import os
import pathlib
import signal
import sys
import time

if __name__ == "__main__":
    notes = pathlib.Path(sys.argv[1])
    codes = [word for word in sys.argv[2:] if not word.startswith("--")]
    rank = next((word.partition("=")[2] for word in sys.argv if word.startswith("--process_id=")), "0")
    starts = notes / f"starts.{rank}"
    number = len(starts.read_text().splitlines()) if starts.exists() else 0
    with open(starts, "a") as file:
        file.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')} {' '.join(sys.argv[2:])}\n")
    code = codes[min(number, len(codes) - 1)].split("/")
    code = code[int(rank)] if len(code) > 1 else code[0]
    if code in ("sleep", "hang"):
        ends = signal.SIG_IGN if code == "hang" else lambda number, frame: os._exit(75)
        signal.signal(signal.SIGTERM, ends)
        (notes / f"ready.{rank}").touch()
        until = time.monotonic() + 30
        while time.monotonic() < until:  # nobody has told it, and no test should wait for ever
            time.sleep(0.02)
        sys.exit(2)
    print(f"error: told to end with {code}", file=sys.stderr)
    if code == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(code))
