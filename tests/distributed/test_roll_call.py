"""The roll call with missing processes, wrong ids and foreign connections; threads stand in for processes."""

import concurrent.futures
import socket
import threading
import time

import pytest

from diffusion.distributed import roll_call
from tests.refusals import refused


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def answers(address, process_ids, num_processes, limit):
    """Returns the message that each process received, or None if all joined."""

    def join(process_id):
        try:
            return roll_call.call(address, num_processes, process_id, limit)
        except roll_call.Missing as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(process_ids)) as pool:
        return list(pool.map(join, process_ids))


def test_all_processes_join(address):
    assert answers(address, range(5), 5, 20) == [None] * 5
    with socket.create_server(("", int(address.rpartition(":")[2]))):  # the port is free again
        pass


def test_missing_processes_are_named_to_all(address):
    began = time.monotonic()
    received = answers(address, (0, 2), 4, 1)
    assert received[0] == received[1] and "processes 1, 3 of 4" in received[0]
    assert time.monotonic() - began < 3


def test_the_first_process_is_missing(address):
    (received,) = answers(address, (1,), 2, 1)
    assert "process 0" in received and address in received


def test_two_processes_have_the_same_id(address):
    received = answers(address, (0, 1, 1), 4, 5)
    assert "two processes have the id 1" in received[0] and received[0] in received[1:]


def test_a_process_of_another_job(address):
    received = answers(address, (0, 1, 7), 4, 5)
    assert received[0] == received[2] and "id 7" in received[0]


def test_foreign_connections_are_ignored(address):
    def strangers():
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"", b"\xff" * 1000):
            began = time.monotonic()
            while time.monotonic() - began < 10:
                try:
                    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
                        connection.sendall(text)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)

    thread = threading.Thread(target=strangers)
    thread.start()
    (received,) = answers(address, (0,), 2, 2)
    assert "process 1 of 2 did not join" in received
    thread.join()


def test_the_port_is_in_use(address):
    with (
        socket.create_server(("", int(address.rpartition(":")[2])), family=socket.AF_INET6, dualstack_ipv6=True),
        refused("--coordinator"),
    ):
        roll_call.call(address, 2, 0, 1)
