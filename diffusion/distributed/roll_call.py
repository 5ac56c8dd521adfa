"""Who has come: the processes of a job tell the first of them that they are there, before JAX connects them.

JAX ends a process itself where others do not come, and cannot say who they are.
"""

import contextlib
import socket
import time

from diffusion.types import InputError

PAUSE = 0.2  # seconds between two tries to reach the first process
LONGEST = 200  # bytes of a message


class Missing(RuntimeError):
    """Some processes have not come in time."""


def call(address: str, num_processes: int, process_id: int, limit: float) -> None:
    """Returns in all processes once all have called it.

    Args:
      address: HOST:PORT where the first process, whose id is 0, listens meanwhile.
      limit: seconds to wait.

    Raises:
      Missing: names those that have not come, in each that has; or two that say they are the same.
      InputError: the first cannot have the port.
    """
    host, _, port = address.rpartition(":")
    until = time.monotonic() + limit
    where = f"to {address} within {limit:.0f} s"
    answer = _listen(int(port), num_processes, until) if process_id == 0 else _tell(host, int(port), process_id, until)
    if answer is None:
        raise Missing(f"process 0 did not come {where}")
    if answer.startswith("twice"):
        raise Missing(f"two processes say that they are process {answer.split()[1]}; give each its own --process_id")
    if answer != "all":
        several = "es" if "," in answer else ""
        raise Missing(f"process{several} {answer} of {num_processes} did not come {where}")


def _listen(port: int, num_processes: int, until: float) -> str:
    """What the first process tells all that have come, itself included: `all`, or who is missing."""
    came, connected, answer = set(), [], ""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_server(port))
        while len(came) < num_processes - 1 and not answer:
            server.settimeout(max(until - time.monotonic(), 0.001))
            try:
                one = stack.enter_context(server.accept()[0])
                one.settimeout(5)
                number = int(_line(one))
            except TimeoutError:
                if time.monotonic() >= until:
                    break
                continue
            except (OSError, ValueError):  # of a stranger, or one that has gone again
                continue
            if number in came or not 0 < number < num_processes:
                answer = f"twice {number}"
            came.add(number)
            connected.append(one)
        missing = [str(number) for number in range(1, num_processes) if number not in came]
        answer = answer or ", ".join(missing) or "all"
        for one in connected:
            with contextlib.suppress(OSError):
                one.sendall(f"{answer[: LONGEST - 1]}\n".encode())
                _line(one)  # they hang up first, so that the port is free at once for JAX
    return answer


def _tell(host: str, port: int, process_id: int, until: float) -> str | None:
    """What the first process says; None if it does not."""
    while time.monotonic() < until + PAUSE:
        try:
            with socket.create_connection((host, port), timeout=PAUSE) as server:
                server.sendall(f"{process_id}\n".encode())
                server.settimeout(max(until + 5 - time.monotonic(), PAUSE))  # it waits as long, and then tells
                answer = _line(server)
                if answer:
                    return answer
        except OSError:
            pass
        time.sleep(PAUSE)
    return None


def _server(port: int) -> socket.socket:
    kind = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
    try:
        return socket.create_server(("", port), backlog=1024, **kind)
    except OSError as error:
        raise InputError("--coordinator", f"port {port} cannot be had: {error.strerror}; give another") from None


def _line(one: socket.socket) -> str:
    text = b""
    while not text.endswith(b"\n") and len(text) < LONGEST:
        part = one.recv(LONGEST - len(text))
        if not part:
            break
        text += part
    return text.decode(errors="replace").strip()
