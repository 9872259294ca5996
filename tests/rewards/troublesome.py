"""A task whose answers name the method of its grader to run; imported by reward workers."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
import time

from pear_ray.records import Grade, Problem


class Troublesome:
    name = "troublesome"

    def problems(self, split, seed):
        yield Problem("troublesome-1", self.name, (), "", split)

    def grade(self, problem, text):
        method, *arguments = text.split()
        return getattr(self, method)(*arguments)

    def right(self):
        return Grade(1.0, True)

    def wrong(self):
        return Grade(0.0, False, note="wrong")

    def slow(self, seconds):
        time.sleep(float(seconds))
        return Grade(1.0, True)

    def loop(self):
        while True:
            try:
                sum(range(1000))
            except Exception:
                continue

    def loop_in_c(self):
        all(itertools.repeat(True))

    def fill_memory(self):
        blocks = []
        while True:
            blocks.append(bytes(2**26))

    def end_process(self):
        os._exit(3)

    def ask_to_exit(self):
        sys.exit(3)

    def fail(self):
        raise LookupError("no such thing")

    def call_out(self):
        socket.create_connection(("127.0.0.1", 1))

    def call_out_through_another(self):
        call = [sys.executable, "-c", "import socket; socket.socket()"]
        raise PermissionError(subprocess.run(call, capture_output=True).stderr.split()[-1].decode())

    def nothing(self):
        return None

    def no_number(self):
        return Grade(float("nan"), False)

    def no_message(self):
        return Grade(1.0, True, {"part": threading.Lock()})
