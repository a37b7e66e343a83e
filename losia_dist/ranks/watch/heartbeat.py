"""Short messages between the ranks of a run, on sockets of their own: the transport of `losia_dist.ranks.watch.liveness`.

A star: the first rank listens (`Hub`), every other rank holds one connection to it (`Spoke`). Sockets and not the process
group's store, because (1) the store ends with `destroy_process_group` on the rank that hosts it, (2) its operations have
no time limit of their own when the host is stopped, so that a thread in one could never be joined, and (3) the kernel
closes the sockets of a killed process at once, which the store never tells.

A message is a JSON object on a line. A thread reads each connection; what comes is handed over by `wait`.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import queue
import secrets
import socket
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

Message = dict[str, Any]
Event = tuple[int, Message | None]  # global rank, and what it said; None: its connection has ended

_LONGEST_LINE = 1 << 16  # bytes; whoever sends more is not one of ours
_WELCOME = b'{"kind": "welcome"}\n'


@dataclass(frozen=True)
class Invitation:
    """Where the hub listens, and who it is; plain values, to be broadcast to the other ranks."""

    addresses: list[str]
    port: int
    token: str  # random, 128 bits: keeps strangers on the cluster's network out
    host: str
    process: int


class Lines:
    """This process's connections, by the other end's global rank."""

    def __init__(self) -> None:
        self._lines: dict[int, socket.socket] = {}
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()

    @property
    def connected(self) -> int:
        """Ranks with an open connection."""
        return len(self._lines)

    def wake(self) -> None:
        """End a `wait` in another thread."""
        self._events.put(None)

    def wait(self, seconds: float) -> list[Event]:
        """What came within this time, as soon as something came. A rank's first message to the hub is its "hello"."""
        found: list[Event | None] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._events.get(timeout=seconds))
            while True:
                found.append(self._events.get_nowait())
        return [event for event in found if event is not None]

    def send(self, message: Message) -> None:
        """To every connected rank, without waiting: a stopped reader will not need what it misses."""
        data = json.dumps(message).encode() + b"\n"
        for line in list(self._lines.values()):
            with contextlib.suppress(OSError):  # the thread that reads it tells its end
                if line.send(data, socket.MSG_DONTWAIT) < len(data):
                    line.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End every connection."""
        for line in list(self._lines.values()):
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def _read(self, rank: int, line: socket.socket, messages: Iterator[Message]) -> None:
        """Hand over all that comes; in a thread of its own."""
        for message in messages:
            self._events.put((rank, message))
        if self._lines.get(rank) is line:
            del self._lines[rank]
        line.close()
        self._events.put((rank, None))


class Hub(Lines):
    """The listening end, on the group's first rank. Made before the invitation is broadcast."""

    def __init__(self) -> None:
        super().__init__()
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=1024)
        port, token = self._server.getsockname()[1], secrets.token_hex(16)
        self.invitation = Invitation(_own_addresses(), port, token, socket.gethostname(), os.getpid())
        threading.Thread(target=self._admit, daemon=True).start()

    def close(self) -> None:
        """Stop listening and end every connection."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # ends the wait in `_admit`
        super().close()

    def _admit(self) -> None:
        with contextlib.suppress(OSError), self._server:
            while True:
                connection, _ = self._server.accept()
                threading.Thread(target=self._introduce, args=(connection,), daemon=True).start()

    def _introduce(self, line: socket.socket) -> None:
        messages = _messages(line)
        hello = next(messages, {})
        rank = hello.get("rank")
        if not isinstance(rank, int) or not hmac.compare_digest(str(hello.get("token")), self.invitation.token):
            messages.close()
            line.close()
            return
        self._events.put((rank, hello))
        self._lines[rank] = line
        with contextlib.suppress(OSError):
            line.sendall(_WELCOME)
        self._read(rank, line, messages)


class Spoke(Lines):
    """One rank's connection to the hub.

    Args:
        invitation: the hub's, as broadcast.
        hello: this rank's introduction, with its "rank"; the token is added.
        hub_rank: global rank of the hub.
        patience: seconds to try for, over all addresses.

    Raises:
        OSError: the hub could not be reached at any of its addresses; the message lists them.
    """

    def __init__(self, invitation: Invitation, hello: Message, hub_rank: int, patience: float) -> None:
        super().__init__()
        line = _reach(invitation, hello, patience)
        self._lines[hub_rank] = line
        threading.Thread(target=self._read, args=(hub_rank, line, _messages(line)), daemon=True).start()


def _messages(line: socket.socket) -> Generator[Message, None, None]:
    """What the other end says, until its end, or nonsense."""
    with contextlib.suppress(OSError, ValueError), line.makefile("rb") as file:
        while data := file.readline(_LONGEST_LINE):
            message = json.loads(data)
            if not isinstance(message, dict):
                return
            yield message


def _own_addresses() -> list[str]:
    """Addresses at which other ranks may reach this process, the likeliest first."""
    names = []
    store: Any = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        with contextlib.suppress(OSError):  # the interface that faces the rendezvous; nothing is sent
            family, kind, _, _, address = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(address)
                names.append(probe.getsockname()[0])
        names.append(store.host)
    return list(dict.fromkeys([*names, socket.gethostname()]))


def _reach(invitation: Invitation, hello: Message, patience: float) -> socket.socket:
    """A connection on which the hub has answered: an address may be another machine's, or a stranger's port."""
    problems: list[str] = []
    for address in invitation.addresses:
        try:
            line = socket.create_connection((address, invitation.port), timeout=patience / len(invitation.addresses))
            line.sendall(json.dumps({"kind": "hello", "token": invitation.token, **hello}).encode() + b"\n")
            if line.recv(len(_WELCOME), socket.MSG_WAITALL) == _WELCOME:
                line.settimeout(None)
                return line
            line.close()
            problems.append(f"{address}: not this run")
        except OSError as error:
            problems.append(f"{address}: {error}")
    raise OSError(f"port {invitation.port} of the first rank: {'; '.join(problems)}")
