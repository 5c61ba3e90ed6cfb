"""A SuperLink and SuperNodes in processes of their own, on the loopback, with what passes between them counted."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from fedapc.flower import make_certificates

BIN = Path(sys.executable).parent

# Appended to the client's app: tell which round a client is in, and keep it there while a file says so.
HOOK = """

import pathlib
import time

from fedapc import messages


class Held(Client):
    def answer(self, request):
        folder, number = pathlib.Path("{folder}"), messages.unpack(request).round
        (folder / f"in-{{self.name}}-{{number}}").touch()
        while (folder / f"hold-{{self.name}}-{{number}}").exists():
            time.sleep(0.1)
        return super().answer(request)


def held(context):
    name, tasks = client_tasks(context)
    return Held(name, make_network(context), tasks, settings(context).learning())


app = client_app(held)
"""


class Proxy:
    """Pass a TCP port on, and count the bytes."""

    def __init__(self, target):
        self.up = self.down = 0
        self.port = free_port()
        self._target = target
        self._open = []
        self.resume()

    def resume(self):
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def pause(self):
        """Refuse connections, as the port of a program that has ended does."""
        # Without this, a thread that waits for a connection still takes one.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open = []

    def _accept(self, listener):
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open += [near, far]
                for source, sink, way in ((near, far, "up"), (far, near, "down")):
                    threading.Thread(target=self._pass, args=(source, sink, way), daemon=True).start()

    def _pass(self, source, sink, way):
        with contextlib.suppress(OSError):
            while block := source.recv(65536):
                setattr(self, way, getattr(self, way) + len(block))
                sink.sendall(block)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def left_over(home):
    """Processes that have this Flower home."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"FLWR_HOME={home}\0".encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
    return [pid for pid in found if pid != os.getpid()]


class Deployment:
    """As the README of a written project says, with the files in a folder; everything ends with it."""

    def __init__(self, folder, nodes=("node1", "node2")):
        self.folder, self.home = folder, folder / "home"
        self.home.mkdir(parents=True)
        self.port = free_port()
        self.ports = {name: free_port() for name in nodes}
        self.proxies = {}
        self.processes = {}
        make_certificates(folder / "certificates", nodes=nodes)
        (self.home / "config.toml").write_text(
            '[superlink]\ndefault = "deployed"\n\n[superlink.deployed]\n'
            f'address = "127.0.0.1:{self.port}"\nroot-certificates = "{folder}/certificates/ca.crt"\n'
        )
        # Where bytecode is not kept, every program compiles torch anew.
        dropped = ("FLWR", "PYTEST", "PYTHONDONTWRITEBYTECODE")
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(dropped)},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "FLWR_HOME": str(self.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for _ in range(50):
            pids = left_over(self.home)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not pids:
                break
            time.sleep(0.1)
        for process in self.processes.values():
            process.wait()
        for proxy in self.proxies.values():
            proxy.pause()

    def start(self, name, *command):
        log = (self.folder / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            command, env=self.env, cwd=self.folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    def log(self, name):
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def superlink(self):
        keys = self.folder / "certificates"
        self.start(
            "superlink", "flower-superlink", "--host", "127.0.0.1", "--port", str(self.port), "--enable-supernode-auth",
            "--disable-runtime-dependency-installation", "--ssl-ca-certfile", f"{keys}/ca.crt", "--ssl-certfile",
            f"{keys}/server.pem", "--ssl-keyfile", f"{keys}/server.key", "--database", f"{self.folder}/superlink.db",
        )  # fmt: skip
        self.wait("the SuperLink listens", lambda: socket.create_connection(("127.0.0.1", self.port)).close() is None)
        for name in self.ports:
            if name in self.proxies:
                self.proxies[name].resume()
            else:
                self.proxies[name] = Proxy(self.port)

    def supernode(self, name, config):
        keys = self.folder / "certificates"
        self.start(
            name, "flower-supernode", "--superlink", f"127.0.0.1:{self.proxies[name].port}", "--root-certificates",
            f"{keys}/ca.crt", "--auth-supernode-private-key", f"{keys}/{name}", "--port", str(self.ports[name]),
            "--node-config", f'{config} state-dir="{self.folder}/state-{name}"',
        )  # fmt: skip

    def supernode_again(self, name, config):
        """Start it until it is let in: a SuperLink refuses a key whose node it has heard of in the last minute."""
        met = self.log(name).count("SuperNode ID:")
        end = time.monotonic() + 180
        self.supernode(name, config)
        while self.log(name).count("SuperNode ID:") == met:
            assert time.monotonic() < end, self.log(name)[-3000:]
            if self.processes[name].poll() is not None:
                self.supernode(name, config)
            time.sleep(1)

    def kill(self, name, group=False):
        """As ``kill -9`` does: of one process, or of all that it has started too."""
        for proxy in self.proxies.values() if name == "superlink" else ():
            proxy.pause()
        process = self.processes.pop(name)
        (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
        process.wait()

    def flwr(self, *arguments):
        done = subprocess.run(
            ["flwr", *arguments],
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, app, settings):
        found = re.search(r"run (\d{5,})", self.flwr("run", str(app), "deployed", "--run-config", settings))
        assert found
        return found[1]

    def wait(self, what, condition, seconds=240.0):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} has ended: {self.log(name)[-3000:]}"
            with contextlib.suppress(OSError):
                if condition():
                    return
            time.sleep(0.3)
        logs = "".join(f"\n== {path.name}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log"))
        raise AssertionError(f"not in {seconds} s: {what}{logs}")
