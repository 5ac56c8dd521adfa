"""Who has come: the processes of a job tell the first of them that they are there, before JAX connects them.

JAX ends a process itself where others do not come, and cannot say who they are.
"""

import contextlib
import socket
import time

from diffusion.core.types import InputError

ALL = "all have come"
PAUSE = 0.2  # seconds between two tries to reach the first process
LONGEST = 1000  # bytes of a message


class Missing(RuntimeError):
    """Some processes have not come in time."""


def call(address: str, num_processes: int, process_id: int, limit: float) -> None:
    """Returns in all processes once all have called it.

    Args:
      address: HOST:PORT where the first process, whose id is 0, listens meanwhile.
      limit: seconds to wait.

    Raises:
      Missing: names those that have not come, in each that has; or tells of ids that do not go together.
      InputError: the first cannot have the port.
    """
    host, _, port = address.rpartition(":")
    until = time.monotonic() + limit
    where = f"to {address} within {limit:.0f} s"
    if process_id:
        answer = _tell(host, int(port), process_id, until) or f"process 0 did not come {where}"
    else:
        answer = _listen(int(port), num_processes, until, where)
    if answer != ALL:
        raise Missing(answer)


def _listen(port: int, num_processes: int, until: float, where: str) -> str:
    """What the first process tells all that have come, itself included: `ALL`, or what is wrong."""
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
            if not 0 < number < num_processes:
                answer = f"a process says that it is process {number}, of {num_processes}; give all the same flags"
            elif number in came:
                answer = f"two processes say that they are process {number}; give each its own --process_id"
            came.add(number)
            connected.append(one)
        missing = [str(number) for number in range(1, num_processes) if number not in came]
        if missing and not answer:
            several = "es" if len(missing) > 1 else ""
            answer = f"process{several} {', '.join(missing)} of {num_processes} did not come {where}"
        answer = answer or ALL
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
