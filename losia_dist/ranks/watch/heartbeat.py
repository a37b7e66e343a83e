"""Short messages between the ranks of a run, on sockets of their own: the transport of `losia_dist.ranks.watch.liveness`.

A star: the first rank listens (`Hub`), every other rank holds one connection to it (`Spoke`). Sockets and not the process
group's store, because (1) the store ends with `destroy_process_group` on the rank that hosts it, (2) its operations have
no time limit of their own when the host is stopped, so that a thread in one could never be joined, and (3) the kernel
closes the sockets of a killed process at once, which the store never tells.

A message is a JSON object on a line. Both ends look alike: `wait`, `send`, `drain`, `close`; neither ever blocks longer
than it is told to.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import time
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

Message = dict[str, Any]
Event = tuple[int, Message | None]  # global rank, and what it said; None: its connection has ended

_LONGEST_LINE = 1 << 16  # bytes; whoever sends more is not one of ours


@dataclass(frozen=True)
class Invitation:
    """Where the hub listens, and who it is; plain values, to be broadcast to the other ranks."""

    addresses: list[str]
    port: int
    token: str  # random, 128 bits: keeps strangers on the cluster's network out
    host: str
    process: int


class Hub:
    """The listening end, on the group's first rank. Made before the invitation is broadcast."""

    def __init__(self) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=1024)
        self._server.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._bell = _Bell(self._selector)
        self._strangers: set[_Line] = set()  # connections that have not said yet who they are
        self._lines: dict[int, _Line] = {}
        port, token = self._server.getsockname()[1], secrets.token_hex(16)
        self.invitation = Invitation(_own_addresses(), port, token, socket.gethostname(), os.getpid())

    @property
    def connected(self) -> int:
        """Ranks with an open connection."""
        return len(self._lines)

    def wake(self) -> None:
        """End a `wait` in another thread."""
        self._bell.ring()

    def wait(self, seconds: float) -> list[Event]:
        """What came within this time, as soon as something came. A rank's first message is its introduction ("hello")."""
        events: list[Event] = []
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._server:
                self._admit()
            elif isinstance(key.data, _Line):
                events += self._read(key.data)
            else:
                self._bell.silence()
        for line in self._lines.values():
            if line.pending:
                line.flush()
        return events

    def send(self, message: Message) -> None:
        """To every connected rank; what does not fit into a socket's buffer goes out with the next `wait`."""
        data = _encode(message)
        for line in self._lines.values():
            line.send(data)

    def drain(self, seconds: float) -> None:
        """Let what was sent go out, for at most this long."""
        _drain(list(self._lines.values()), seconds)

    def close(self) -> None:
        """Stop listening and end every connection."""
        for line in [*self._lines.values(), *self._strangers]:
            line.close()
        self._lines, self._strangers = {}, set()
        self._server.close()
        self._bell.close()
        self._selector.close()

    def _admit(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:
            return  # it hung up again
        line = _Line(connection)
        self._strangers.add(line)
        self._selector.register(line.socket, selectors.EVENT_READ, line)

    def _read(self, line: _Line) -> list[Event]:
        messages = line.receive()
        events: list[Event] = []
        for message in messages:
            if line.rank is None and not self._introduce(line, message):
                line.ended = True
                break
            events.append((line.rank if line.rank is not None else -1, message))
        if line.ended:
            self._selector.unregister(line.socket)
            line.close()
            self._strangers.discard(line)
            if line.rank is not None and self._lines.get(line.rank) is line:
                del self._lines[line.rank]
                events.append((line.rank, None))
        return events

    def _introduce(self, line: _Line, message: Message) -> bool:
        token, rank = message.get("token"), message.get("rank")
        if not isinstance(rank, int) or not hmac.compare_digest(str(token), self.invitation.token):
            return False
        self._strangers.discard(line)
        line.rank = rank
        self._lines[rank] = line
        line.send(_encode({"kind": "welcome"}))
        return True


class Spoke:
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
        self._hub_rank = hub_rank
        self._selector = selectors.DefaultSelector()
        self._bell = _Bell(self._selector)
        self._line: _Line | None = _reach(invitation, hello, patience)
        self._selector.register(self._line.socket, selectors.EVENT_READ, self._line)

    def wake(self) -> None:
        """End a `wait` in another thread."""
        self._bell.ring()

    def wait(self, seconds: float) -> list[Event]:
        """What came within this time, as soon as something came."""
        events: list[Event] = []
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                self._bell.silence()
            elif self._line is not None:
                events += [(self._hub_rank, message) for message in self._line.receive()]
                if self._line.ended:
                    self.hang_up()
                    events.append((self._hub_rank, None))
        if self._line is not None:
            self._line.flush()
        return events

    def send(self, message: Message) -> None:
        """To the hub, as `Hub.send`."""
        if self._line is not None:
            self._line.send(_encode(message))

    def drain(self, seconds: float) -> None:
        """Let what was sent go out, for at most this long."""
        _drain([self._line] if self._line is not None else [], seconds)

    def hang_up(self) -> None:
        """End the connection; `wait` goes on as a timer."""
        if self._line is not None:
            self._selector.unregister(self._line.socket)
            self._line.close()
            self._line = None

    def close(self) -> None:
        """End the connection and release everything."""
        self.hang_up()
        self._bell.close()
        self._selector.close()


class _Line:
    """A connection that carries one JSON object a line, without ever blocking."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.rank: int | None = None
        self.ended = False
        self.pending = b""
        self._received = b""

    def receive(self) -> list[Message]:
        """Whole messages that have arrived; sets `ended` at the end of the connection or on nonsense."""
        try:
            data = self.socket.recv(_LONGEST_LINE)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            data = b""
        if not data:
            self.ended = True
            return []
        *lines, self._received = (self._received + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages, self.ended = [], True
        if len(self._received) > _LONGEST_LINE or not all(isinstance(message, dict) for message in messages):
            messages, self.ended = [], True
        return messages

    def send(self, data: bytes) -> None:
        if len(self.pending) < 4 * _LONGEST_LINE:  # a stopped reader: what it misses it will not need
            self.pending += data
        self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        try:
            self.pending = self.pending[self.socket.send(self.pending) :]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.pending = b""  # `receive` will report the end

    def close(self) -> None:
        self.socket.close()


class _Bell:
    """Lets one thread end another's `select`."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._ear, self._hand = socket.socketpair()
        self._ear.setblocking(False)
        self._hand.setblocking(False)
        selector.register(self._ear, selectors.EVENT_READ)

    def ring(self) -> None:
        try:
            self._hand.send(b"!")
        except OSError:
            return  # rung often enough, or closed

    def silence(self) -> None:
        self._ear.recv(4096)

    def close(self) -> None:
        self._ear.close()
        self._hand.close()


def _encode(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _drain(lines: list[_Line], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(line.pending for line in lines) and time.monotonic() < deadline:
        for line in lines:
            line.flush()
        time.sleep(0.01)


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


def _reach(invitation: Invitation, hello: Message, patience: float) -> _Line:
    """A connection on which the hub has answered: an address may be another machine's, or a stranger's port."""
    share = patience / len(invitation.addresses)
    problems: list[str] = []
    for address in invitation.addresses:
        try:
            connection = socket.create_connection((address, invitation.port), timeout=share)
        except OSError as error:
            problems.append(f"{address}: {error}")
            continue
        try:
            connection.sendall(_encode({"kind": "hello", "token": invitation.token, **hello}))
            answered = connection.recv(len(_encode({"kind": "welcome"})), socket.MSG_WAITALL)
        except OSError as error:
            problems.append(f"{address}: {error}")
            answered = b""
        if answered == _encode({"kind": "welcome"}):
            return _Line(connection)
        connection.close()
        problems.append(f"{address}: not this run")
    raise OSError(f"port {invitation.port} of the first rank: {'; '.join(problems)}")
