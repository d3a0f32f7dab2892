"""Two processes on the CPU, connected by gloo, which are started once for all tests that need them."""

import multiprocessing
import os
import socket
import traceback

import pytest
import torch


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


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
