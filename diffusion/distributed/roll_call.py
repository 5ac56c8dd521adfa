"""A roll call: the processes of a job check in with the first process before JAX connects them.

If a process is missing, JAX ends the others itself and cannot report which one it is.
"""

import contextlib
import socket
import time

from diffusion.core.types import InputError

ALL = "all processes have joined"
PAUSE = 0.2  # seconds between two attempts to reach the first process
MAX_MESSAGE = 1000  # bytes


class Missing(RuntimeError):
    """Some processes did not join in time."""


def call(address: str, num_processes: int, process_id: int, limit: float) -> None:
    """Returns in all processes once every one of them has called it.

    Args:
      address: HOST:PORT at which the first process, with id 0, listens meanwhile.
      num_processes: The number of processes.
      process_id: The index of this process, from 0.
      limit: Seconds to wait.

    Raises:
      Missing: Some processes did not join, or their ids are inconsistent. All that joined raise it, with the names.
      InputError: The first process cannot listen at the port.
    """
    host, _, port = address.rpartition(":")
    until = time.monotonic() + limit
    where = f"at {address} within {limit:.0f} s"
    if process_id:
        answer = _check_in(host, int(port), process_id, until) or f"process 0 did not join {where}"
    else:
        answer = _listen(int(port), num_processes, until, where)
    if answer != ALL:
        raise Missing(answer)


def _listen(port: int, num_processes: int, until: float, where: str) -> str:
    """Returns the answer that the first process sends to all that joined: `ALL`, or what is wrong."""
    joined, connected, answer = set(), [], ""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_server(port))
        while len(joined) < num_processes - 1 and not answer:
            server.settimeout(max(until - time.monotonic(), 0.001))
            try:
                client = stack.enter_context(server.accept()[0])
                client.settimeout(5)
                number = int(_line(client))
            except TimeoutError:
                if time.monotonic() >= until:
                    break
                continue
            except (OSError, ValueError):  # not a process of this job, or one that has disconnected
                continue
            if not 0 < number < num_processes:
                answer = f"a process has the id {number}, but there are {num_processes}; give all the same flags"
            elif number in joined:
                answer = f"two processes have the id {number}; give each a different --process_id"
            joined.add(number)
            connected.append(client)
        missing = [str(number) for number in range(1, num_processes) if number not in joined]
        if missing and not answer:
            plural = "es" if len(missing) > 1 else ""
            answer = f"process{plural} {', '.join(missing)} of {num_processes} did not join {where}"
        answer = answer or ALL
        for client in connected:
            with contextlib.suppress(OSError):
                client.sendall(f"{answer[: MAX_MESSAGE - 1]}\n".encode())
                _line(client)  # the client disconnects first, so the port is free for JAX at once
    return answer


def _check_in(host: str, port: int, process_id: int, until: float) -> str | None:
    """Returns the answer of the first process, or None if it cannot be reached."""
    while time.monotonic() < until + PAUSE:
        try:
            with socket.create_connection((host, port), timeout=PAUSE) as server:
                server.sendall(f"{process_id}\n".encode())
                # The first process waits for the same time and answers afterwards.
                server.settimeout(max(until + 5 - time.monotonic(), PAUSE))
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
        raise InputError("--coordinator", f"cannot listen at port {port}: {error.strerror}; use another port") from None


def _line(connection: socket.socket) -> str:
    text = b""
    while not text.endswith(b"\n") and len(text) < MAX_MESSAGE:
        part = connection.recv(MAX_MESSAGE - len(text))
        if not part:
            break
        text += part
    return text.decode(errors="replace").strip()
