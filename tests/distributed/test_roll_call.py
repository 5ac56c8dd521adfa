"""Processes that come, that do not, and that say they are another, here as threads."""

import concurrent.futures
import socket
import threading
import time

import pytest

from diffusion.core.types import InputError
from diffusion.distributed import roll_call


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def told(address, came, num_processes, limit):
    """What each that came has heard: None if all are there."""

    def one(process_id):
        try:
            return roll_call.call(address, num_processes, process_id, limit)
        except roll_call.Missing as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(came)) as pool:
        return list(pool.map(one, came))


def test_all_come(address):
    assert told(address, range(5), 5, 20) == [None] * 5
    with socket.create_server(("", int(address.rpartition(":")[2]))):  # the port is free again
        pass


def test_who_is_missing_is_named_to_all(address):
    began = time.monotonic()
    heard = told(address, (0, 2), 4, 1)
    assert heard == [f"processes 1, 3 of 4 did not come to {address} within 1 s"] * 2
    assert time.monotonic() - began < 3


def test_the_first_is_missing(address):
    assert told(address, (1,), 2, 1) == [f"process 0 did not come to {address} within 1 s"]


def test_two_say_they_are_the_same(address):
    heard = told(address, (0, 1, 1), 4, 5)
    assert heard[0] == "two processes say that they are process 1; give each its own --process_id"
    assert heard[0] in heard[1:]


def test_one_that_is_of_another_job(address):
    heard = told(address, (0, 1, 7), 4, 5)
    assert heard[0] == heard[2] == "a process says that it is process 7, of 4; give all the same flags"


def test_strangers_are_not_counted(address):
    def strangers():
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"", b"\xff" * 1000):
            began = time.monotonic()
            while time.monotonic() - began < 10:
                try:
                    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as one:
                        one.sendall(text)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)

    thread = threading.Thread(target=strangers)
    thread.start()
    assert told(address, (0,), 2, 2) == [f"process 1 of 2 did not come to {address} within 2 s"]
    thread.join()


def test_a_port_that_is_taken(address):
    with (
        socket.create_server(("", int(address.rpartition(":")[2])), family=socket.AF_INET6, dualstack_ipv6=True),
        pytest.raises(InputError, match=r"--coordinator: port \d+ cannot be had: .* give another"),
    ):
        roll_call.call(address, 2, 0, 1)
