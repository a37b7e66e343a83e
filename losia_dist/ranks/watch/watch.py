"""One process's part in watching the ranks: a thread that beats, listens, and ends the process where a rank is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from losia_dist.errors import some
from losia_dist.ranks.watch.heartbeat import Hub, Invitation, Message, Spoke

EXIT_CODE = 75  # "temporary failure": a scheduler may start the run again from its last checkpoint

_LONGEST_INTERVAL = 3.0  # seconds between beats
_LONGEST_GRACE = 5.0  # seconds that a process is given to end by itself, with its own traceback
_SETTLE = 1.0  # seconds that a failing rank waits for news of another that failed first, and dragged it along
_EXIT = 10  # seconds that a process whose peers are gone may take to shut down
_GATHER = 0.25  # seconds within which ranks that end together are named together
_NOTICE = 10  # patiences without any progress, after which a line says who is waited for

Progress = tuple[int, int]  # optimizer steps done, and forward passes in training since


@dataclass(frozen=True)
class Limits:
    """Seconds after which a run is ended."""

    patience: float  # of silence, or of waiting for a rank that has left
    stall: float | None  # without progress on any rank, while some rank is in a step; None: a notice only


@dataclass
class Peer:
    """What is known of another rank."""

    rank: int
    host: str
    process: int
    seen: float  # when it was last heard of, on this process's monotonic clock, in seconds
    progress: Progress = (0, 0)
    left: bool = False
    ended: bool = False  # its connection has closed without a word

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.process})"


class Watch:
    """One process's part: a thread that beats, listens and, where a rank is lost, ends the process.

    Args:
        lines: the transport; `Hub` on the first rank, `Spoke` elsewhere.
        invitation: the hub's.
        ranks: global ranks that are watched, the hub's first.
        limits: when to end the run.
        ended: called with the watch when its thread ends.
    """

    def __init__(
        self,
        lines: Hub | Spoke,
        invitation: Invitation,
        ranks: tuple[int, ...],
        limits: Limits,
        ended: Callable[[Watch], None],
    ) -> None:
        self.invitation, self.ranks, self.limits, patience = invitation, ranks, limits, limits.patience
        self.rank = dist.get_rank()
        self.verdict = ""  # what ended the run, once it is known
        self._lines, self._when_ended = lines, ended
        self._interval = min(_LONGEST_INTERVAL, patience / 10)
        self._grace = min(_LONGEST_GRACE, patience)
        self._process = os.getpid()
        self._world = weakref.ref(dist.group.WORLD)  # not kept alive: when it is destroyed, the watch ends
        self._progress: Progress = (0, 0)
        self._moved = time.monotonic()
        self._peers: dict[int, Peer] = {}
        if isinstance(lines, Spoke):
            self._peers[ranks[0]] = Peer(ranks[0], invitation.host, invitation.process, self._moved)
        self._first_leaver: Peer | None = None  # the one with the least progress
        self._failure = ""  # the exception that ends this process
        self._news = self._moved  # when any rank was last seen to move on
        self._noticed: Progress | None = None  # where the front was when a notice was given
        self._announced = self._lost = False  # a verdict has been sent; some connection has ended without a word
        # What other threads ask of the watch's own, and what they wait for.
        self._leaving = self._closing = False
        self._left = False
        self._decided, self._published, self._ending = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="losia-liveness", daemon=True)

    @property
    def running(self) -> bool:
        """Whether it still watches for this process: its thread lives, and nobody has left."""
        return self._thread.is_alive() and not (self._leaving or self._left)

    def start(self) -> None:
        """Begin to beat and to listen."""
        self._thread.start()

    def forward_started(self, module: nn.Module, args: Any) -> None:
        """A forward pre-hook of the model: in training, a step is in progress from now on."""
        if torch.compiler.is_compiling():
            return  # traced into a graph, it would be recompiled for every count
        if module.training and torch.is_grad_enabled():
            steps, passes = self._progress
            self._progress, self._moved = (steps, passes + 1), time.monotonic()

    def step_done(self) -> None:
        """Called by the conductor after every optimizer step and its re-localization."""
        self._progress, self._moved = (self._progress[0] + 1, 0), time.monotonic()

    def release(self) -> None:
        """From here on this rank counts as having left. Returns at once."""
        self._leaving = True
        self._lines.wake()

    def report(self, kind: type[BaseException], error: BaseException | None) -> None:
        """Publish the exception that ends this process, unless it is a consequence of another rank's end."""
        if not self.running or os.getpid() != self._process:
            return
        if self._decided.wait(_SETTLE):
            return
        leaver = self._leaver_behind()
        if leaver is not None:
            self._failure = self._about_leaver(leaver)
            tell(self._failure)
        else:
            who = f"rank {self.rank} (host {socket.gethostname()}, process {self._process})"
            self._failure = f"{who} failed: {kind.__name__}: {str(error)[:500]}. Its log has the traceback."
        self._lines.wake()
        self._published.wait(2.0)

    def close(self) -> None:
        """At the end of the process: say goodbye, and wait for the thread, for a moment."""
        if os.getpid() != self._process or not self._thread.is_alive():
            return
        self._closing = True
        self._ending.set()
        self._lines.wake()
        self._thread.join(2.0)
        if self.verdict and threading.current_thread() is threading.main_thread():
            # Communicators whose peers are gone have been seen to hang in their destructors, out of Python's reach.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_EXIT)

    # From here on, in the watch's own thread.

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:
            tell(f"the liveness watch of rank {self.rank} ended: {type(error).__name__}: {error}. The run goes on unwatched.")
        finally:
            self._lines.close()
            self._when_ended(self)

    def _loop(self) -> None:
        last = next_beat = time.monotonic()
        while True:
            events = self._lines.wait(_GATHER if self._closing or self._lost else self._interval)
            now = time.monotonic()
            if now - last > self.limits.patience / 2:
                self._forgive(now - last)
            last = now
            for rank, message in events:
                self._hear(rank, message, now)
            if self._failure and not self._published.is_set():
                self._end_all(self._failure)
                self._left = True  # it ends by its own exception; whatever comes after is a consequence
                self._published.set()
            beat = now >= next_beat
            if beat:
                next_beat = now + self._interval
                if not dist.is_initialized() or self._world() is not dist.group.WORLD:
                    self._leaving = True
                self._lines.send({"kind": "beat", "progress": self._progress})
                self._news = max(self._news, self._moved)
            if beat or self._lost:
                self._judge(now)
            if self.verdict:
                self._end()
                return
            if (self._leaving or self._closing) and not self._left:
                self._leave(now)
            if self._left and (self._closing or isinstance(self._lines, Spoke) or not self._lines.connected):
                return  # a hub stays for those that are still connected, as long as its process does

    def _forgive(self, pause: float) -> None:
        """This process was stopped itself, and heard nothing meanwhile."""
        self._moved += pause
        self._news += pause
        for peer in self._peers.values():
            peer.seen += pause

    def _hear(self, rank: int, message: Message | None, now: float) -> None:
        if message is not None and message["kind"] == "hello":
            self._peers[rank] = Peer(rank, message["host"], message["process"], now)
        peer = self._peers[rank]
        peer.seen = now
        if message is None:
            peer.ended = not peer.left
            self._lost |= peer.ended
            return
        if "progress" in message and peer.progress != (progress := _progress(message["progress"])):
            peer.progress, self._news = progress, now
        if message["kind"] == "left":
            self._note_leaver(peer)
        elif message["kind"] == "leaver":
            leaver = Peer(**message["peer"])
            self._note_leaver(replace(leaver, progress=_progress(leaver.progress), seen=now))
        elif message["kind"] == "failed":
            self._end_all(message["text"])
        elif message["kind"] == "end":
            self._decide(message["text"])

    def _note_leaver(self, peer: Peer) -> None:
        """Keep the leaver with the least progress, and let every rank know: whoever goes beyond it waits in vain."""
        peer.left = True
        if self._first_leaver is None or peer.progress < self._first_leaver.progress:
            self._first_leaver = peer
            if isinstance(self._lines, Hub):
                self._lines.send({"kind": "leaver", "peer": asdict(peer)})

    def _leave(self, now: float) -> None:
        self._left = True
        self._lines.send({"kind": "left", "progress": self._progress})
        if isinstance(self._lines, Hub):
            self._note_leaver(Peer(self.rank, self.invitation.host, self._process, now, self._progress))

    def _judge(self, now: float) -> None:
        ended = [peer for peer in self._peers.values() if peer.ended]
        if ended and now - min(peer.seen for peer in ended) >= _GATHER:
            self._end_all(
                f"{some(ended, 4)} ended without a word, last heard of {_place(ended[0].progress)}: killed (out of memory? the "
                "kernel's log on that host tells) or crashed (see its log)."
            )
        silent = [peer for peer in self._peers.values() if not peer.left and now - peer.seen > self.limits.patience]
        if silent:
            waited = now - silent[0].seen
            self._end_all(
                f"{some(silent, 4)} has been silent for {waited:.0f} s, last heard of {_place(silent[0].progress)}: its "
                "process is stopped, or its host or network is down. LOSIA_LIVENESS_PATIENCE=120 would wait for two minutes."
            )
        if isinstance(self._lines, Hub):
            self._judge_progress(now)
        leaver = self._leaver_behind()
        if leaver is not None and not self._left and now - max(self._moved, leaver.seen) > self.limits.patience:
            self._end_all(self._about_leaver(leaver))

    def _judge_progress(self, now: float) -> None:
        """Every rank lives, and none moves: a deadlock, or one rank at long work that the others wait for."""
        own = Peer(self.rank, self.invitation.host, self._process, now, self._progress, self._left)
        present = [peer for peer in (own, *self._peers.values()) if not peer.left]
        waited = now - self._news
        stall = self.limits.stall
        front = max((peer.progress for peer in present), default=(0, 0))
        if not front[1] or waited <= (stall or _NOTICE * self.limits.patience):
            return
        behind = [peer for peer in present if peer.progress < front]
        who = f"{some(behind, 4)}, still {_place(behind[0].progress)}" if behind else "nobody in particular: all are as far"
        text = f"no rank has moved on for {waited:.0f} s. The ranks {_place(front)} wait for {who}."
        if stall:
            self._end_all(f"{text} LOSIA_LIVENESS_STALL={stall:g} s is the limit.")
        elif self._noticed != front:
            self._noticed = front
            tell(f"{text} A long save on one rank looks so, and a deadlock too: LOSIA_LIVENESS_STALL=seconds would end it.")

    def _leaver_behind(self) -> Peer | None:
        """A rank that left in an earlier step than the one in progress here, if there is one."""
        leaver, (_, passes) = self._first_leaver, self._progress
        return leaver if leaver is not None and passes and self._progress > leaver.progress else None

    def _about_leaver(self, leaver: Peer) -> str:
        return (
            f"{leaver} left {_place(leaver.progress)}, while rank {self.rank} is {_place(self._progress)}, which cannot end "
            "without it. If it did not fail (see its log), give every rank the same number of batches: DistributedSampler, or "
            "drop_last=True."
        )

    def _end_all(self, text: str) -> None:
        """Tell the others, and end this process too."""
        if self._announced:
            return
        self._announced = True
        kind = "end" if isinstance(self._lines, Hub) else "failed"
        self._lines.send({"kind": kind, "text": text})
        self._decide(text)

    def _decide(self, text: str) -> None:
        # A rank that has left has nothing to wait for, and ends when it likes.
        if not self.verdict and not self._left and not self._failure:
            self.verdict = text

    def _end(self) -> None:
        tell(f"{self.verdict} Rank {self.rank} ends too; resume from the last checkpoint.")
        self._decided.set()
        if self._ending.wait(self._grace):
            return  # the main thread failed by itself and is on its way out
        try:
            sys.stdout.flush()
        finally:
            os._exit(EXIT_CODE)


def tell(text: str) -> None:
    """A line on stderr, at once."""
    with contextlib.suppress(Exception):  # a closed stderr must not keep a process from ending
        print(f"losia_dist: {text}", file=sys.stderr, flush=True)


def _progress(pair: Any) -> Progress:
    """From JSON, which has lists only."""
    steps, passes = pair
    return steps, passes


def _place(progress: Progress) -> str:
    steps, passes = progress
    if passes:
        return f"in step {steps + 1}"
    return f"after step {steps}" if steps else "before its first step"
