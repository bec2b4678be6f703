"""Ranks over torch.distributed: the transport of cumoe/transport.h, made of gloo's messages between two ranks."""

import ctypes
import datetime
import queue
import re
import threading
import time

import torch
import torch.distributed as dist

_MESSAGES, _HANG_UP = 0, 1  # tags
_SHORTEST = 1e-3  # seconds: gloo counts milliseconds, and 0 has no end
_SLICE = 0.5  # seconds between looks at a connection
_GRACE = 0.05  # seconds after a failure to find what else failed
_ABORTED = "it has aborted"


class _Message(ctypes.Structure):
    _fields_ = [("rank", ctypes.c_int32), ("receive", ctypes.c_int32), ("data", ctypes.c_void_p),
                ("size", ctypes.c_size_t)]


class _Call(ctypes.Structure):
    """Exchange in ranks.cc."""

    _fields_ = [("messages", ctypes.POINTER(_Message)), ("count", ctypes.c_int32), ("done", ctypes.c_int32),
                ("timeout", ctypes.c_double), ("failure", ctypes.c_char * 256)]


_Exchange = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Call))
_Tell = ctypes.CFUNCTYPE(None)

_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_memory.argtypes, _memory.restype = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int), ctypes.py_object
_WRITE = 0x200  # PyBUF_WRITE


def _seconds(number):
    return datetime.timedelta(seconds=max(number, _SHORTEST))


def _text(error):
    """What gloo says, without the place in its sources."""
    first = str(error).strip().split("\n")[0]
    return re.sub(r"^\[[^]]*\] ", "", first) or type(error).__name__


class _Failure(Exception):
    """With a sentence for the library."""


class Gloo:
    """One rank's side. It has connections of its own, which meet by the store of `group`: messages mix with nobody's,
    and a failure closes nobody else's. `kept`: an exception that came within an exchange, as Ctrl-C does. There is no
    way for it through the library: to be raised when that is back."""

    _made = []  # until the library is done with them: it has their addresses

    def __init__(self, group):
        self.rank, self.size, self.kept = group.rank(), group.size(), None
        store = group.get_group_store()
        number = store.add(f"cumoe/{self.rank}", 1)  # of this group of ranks, among those on the same store
        self._store = dist.PrefixStore(f"cumoe/{number}", store)
        self._aborted = self._done = False
        self._backend, self._place = None, 0
        self._asked, self._answers = queue.SimpleQueue(), queue.SimpleQueue()
        exchanges = self._exchanges()
        next(exchanges)
        self._functions = _Exchange(exchanges.send), _Tell(self._abort), _Tell(self._destroy)
        Gloo._made = [other for other in Gloo._made if not other._done] + [self]

    def create(self, timeout, device):
        """The number of a group of ranks."""
        addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in self._functions]
        return torch.ops.cumoe.group_create_with(addresses, self.rank, self.size, timeout, device)

    def connect(self, timeout):
        if self.size == 1:
            return
        try:
            self._backend = dist.ProcessGroupGloo(self._store, self.rank, self.size, _seconds(timeout))
        except RuntimeError as error:
            raise RuntimeError(f"cumoe: rank {self.rank} of a group of {self.size} over gloo: a rank did not come in "
                               f"{timeout:g} s, or failed: {_text(error)}") from error
        threading.Thread(target=self._wait, daemon=True).start()

    def _exchanges(self):
        """Each send() is an exchange. What is pending when it comes, a function would raise before its first line, where
        nobody catches it; this raises it within."""
        call = _Call()
        try:
            while True:
                call.done = 1
                call = None  # which is the library's
                call = (yield).contents
                self._carry(call.messages[:call.count], time.monotonic() + call.timeout)
        except GeneratorExit:
            return
        except _Failure as failure:
            call.failure = str(failure).encode()[:255]
        except BaseException as error:
            self.kept = error
        self._hang_up()  # the memory is the library's again
        yield

    def _carry(self, messages, deadline):
        messages.sort(key=lambda message: not message.receive)  # what comes finds its place; else in their order
        try:
            works = [(message.rank, self._start(message)) for message in messages]
        except RuntimeError as error:
            reasons = filter(None, map(self._look, dict.fromkeys(message.rank for message in messages)))
            raise _Failure("; ".join(reasons) or _text(error)) from None
        self._place, lost = 0, None
        self._asked.put((works, deadline))
        while True:
            try:
                failure = self._answers.get(timeout=_SLICE)
            except queue.Empty:
                place = self._place
                failure = self._look(works[place][0]) if place < len(works) else None
                if failure is None or lost != place:  # it may just have come
                    lost = place if failure else None
                    continue
            if failure:
                raise _Failure(failure)
            return

    def _wait(self):
        """A thread: gloo's wait() hears neither signals nor, in the middle of data, that a connection has closed."""
        for works, deadline in iter(self._asked.get, None):
            reasons = {}  # of all: the first may have hung up for another
            for self._place, (rank, work) in enumerate(works):
                try:
                    work.wait(_seconds(_GRACE if reasons else deadline - time.monotonic()))
                except RuntimeError as error:
                    if not reasons or "time" not in str(error):  # which closes the others
                        reasons[rank] = self._reason(rank, error)
            works = work = None
            self._answers.put("; ".join(reasons.values()))

    def _start(self, message):
        tensor = torch.frombuffer(_memory(message.data, message.size, _WRITE), dtype=torch.uint8)
        move = self._backend.recv if message.receive else self._backend.send
        return move([tensor], message.rank, _MESSAGES)

    def _look(self, rank):
        """What is wrong with a connection: those that are closed take no receive. It stays, for nothing ever comes."""
        try:
            self._receive_nothing(rank)
        except RuntimeError as error:
            return self._reason(rank, error)

    def _receive_nothing(self, rank):
        return self._backend.recv([torch.empty(1, dtype=torch.uint8)], rank, _HANG_UP)

    def _reason(self, rank, error):
        if self._aborted:
            return _ABORTED
        text = _text(error)
        return f"rank {rank} did not come in time" if "Timed out" in text else f"rank {rank} has left or failed: {text}"

    def _abort(self):
        self._aborted = True
        self._answers.put(_ABORTED)
        self._hang_up()

    def _hang_up(self):
        """Gloo has no word for it, but where a receive comes too late it closes all connections: whatever waits for
        them, here and on the other ranks, is told, or looks."""
        for rank in range(self.size):
            try:
                if self._backend is not None and rank != self.rank:
                    self._receive_nothing(rank).wait(_seconds(0))
            except RuntimeError:
                pass

    def _destroy(self):
        self._asked.put(None)
        self._backend = None  # its connections close
        self._done = True
