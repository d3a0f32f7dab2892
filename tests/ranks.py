"""Two processes on the CPU, connected by gloo, which are started once for all tests that need them."""

import contextlib
import multiprocessing
import os
import random
import socket
import traceback

import pytest
import torch


def free_port():
    """Below the ports that the system gives to connections, which may take any other before it is used."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return str(port)
    raise OSError("no free port between 20000 and 32000")


class Pair:
    """Two processes that are started once, and run one function after the other, each as a rank."""

    def __init__(self):
        self.ranks = []

    def run(self, function, *arguments, seconds=240):
        """What it returns on rank 0 and on rank 1."""
        if not self.ranks:
            self.start()
        for _, connection in self.ranks:
            connection.send((function, arguments))
        answers = []
        for _, connection in self.ranks:
            if not connection.poll(seconds):
                self.stop()
                pytest.fail(f"a rank still waits after {seconds} s", pytrace=False)
            answers.append(connection.recv())
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def start(self):
        spawn, port = multiprocessing.get_context("spawn"), free_port()
        for rank in (0, 1):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=serve, args=(rank, port, theirs), daemon=True)
            process.start()
            self.ranks.append((process, ours))

    def stop(self):
        for process, _ in self.ranks:
            process.kill()
            process.join()
        self.ranks = []


def serve(rank, port, connection):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    while True:
        function, arguments = connection.recv()
        try:
            connection.send(function(*arguments))
        except Exception as error:
            traceback.print_exc()
            connection.send(error)
