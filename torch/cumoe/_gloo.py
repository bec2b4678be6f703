"""Ranks over torch.distributed: the transport of cumoe/transport.h, made of gloo's messages between two ranks."""

import ctypes
import datetime
import re
import time

import torch
import torch.distributed as dist

_SUCCESS = 0
_MESSAGES, _HANG_UP = 0, 1  # tags
_SHORTEST = 1e-3  # seconds: gloo counts milliseconds, and 0 has no end


class _Message(ctypes.Structure):
    _fields_ = [("rank", ctypes.c_int32), ("receive", ctypes.c_int32), ("data", ctypes.c_void_p),
                ("size", ctypes.c_size_t)]


_Exchange = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(_Message), ctypes.c_int32, ctypes.c_double)
_Tell = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Transport(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("name", ctypes.c_char_p), ("rank", ctypes.c_int32),
                ("num_ranks", ctypes.c_int32), ("context", ctypes.c_void_p), ("exchange", _Exchange),
                ("abort", _Tell), ("destroy", _Tell)]


_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_memory.argtypes, _memory.restype = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int), ctypes.py_object
_WRITE = 0x200  # PyBUF_WRITE


def _seconds(number):
    return datetime.timedelta(seconds=max(number, _SHORTEST))


def _text(error):
    """What gloo says, without the place in its sources."""
    first = str(error).strip().split("\n")[0]
    return re.sub(r"^\[[^]]*\] ", "", first) or type(error).__name__


class Gloo:
    """One rank's side. It has connections of its own, which meet by the store of `group`: messages mix with nobody's,
    and a failure closes nobody else's."""

    _made = []  # until the library is done with them: it has their addresses

    def __init__(self, group):
        self.rank, self.size = group.rank(), group.size()
        self._aborted = self._done = False
        self._backend = None
        self._functions = _Exchange(self._exchange), _Tell(self._abort), _Tell(self._destroy)
        self._transport = _Transport(ctypes.sizeof(_Transport), b"gloo", self.rank, self.size, None, *self._functions)
        Gloo._made = [other for other in Gloo._made if not other._done] + [self]

    @property
    def address(self):
        return ctypes.addressof(self._transport)

    def connect(self, group, timeout):
        if self.size == 1:
            return
        store = group.get_group_store()
        number = store.add(f"cumoe/{self.rank}", 1)  # of this group of ranks, among those on the same store
        store = dist.PrefixStore(f"cumoe/{number}", store)
        try:
            self._backend = dist.ProcessGroupGloo(store, self.rank, self.size, _seconds(timeout))
        except RuntimeError as error:
            raise RuntimeError(f"cumoe: rank {self.rank} of a group of {self.size} over gloo: a rank did not come in "
                               f"{timeout:g} s, or failed: {_text(error)}") from error

    def _exchange(self, context, messages, count, timeout):
        try:
            self._carry([messages[i] for i in range(count)], time.monotonic() + timeout)
            return _SUCCESS
        except BaseException as error:  # there is no way for exceptions through the library
            return torch.ops.cumoe.transport_fail(_text(error))

    def _carry(self, messages, deadline):
        messages.sort(key=lambda message: not message.receive)  # what comes finds its place; else in their order
        works = [(message.rank, self._start(message)) for message in messages]
        for rank, work in works:
            try:
                work.wait(_seconds(deadline - time.monotonic()))
            except RuntimeError as error:
                raise RuntimeError(self._reason(rank, error)) from None

    def _start(self, message):
        tensor = torch.frombuffer(_memory(message.data, message.size, _WRITE), dtype=torch.uint8)
        try:
            move = self._backend.recv if message.receive else self._backend.send
            return move([tensor], message.rank, _MESSAGES)
        except RuntimeError as error:
            raise RuntimeError(self._reason(message.rank, error)) from None

    def _reason(self, rank, error):
        if self._aborted:
            return "it has aborted"
        text = _text(error)
        return f"rank {rank} did not come in time" if "Timed out" in text else f"rank {rank} has left or failed: {text}"

    def _abort(self, context):
        """Gloo has no word for it, but where a receive comes too late it closes all connections: whatever waits for
        them, here and on the other ranks, is told."""
        self._aborted = True
        backend = self._backend
        if backend is None:
            return
        try:
            nothing = torch.frombuffer(bytearray(1), dtype=torch.uint8)
            backend.recv([nothing], (self.rank + 1) % self.size, _HANG_UP).wait(_seconds(0))
        except RuntimeError:
            pass

    def _destroy(self, context):
        self._backend = None  # its connections close
        self._done = True
