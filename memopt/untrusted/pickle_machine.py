"""The machine that runs the operations of a pickle, on plain values alone. See :mod:`memopt.untrusted.pickles`."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from memopt.untrusted import Refused
from memopt.untrusted.graphs import Inert
from memopt.untrusted.text import shown

#: What calls are given to copy, and the values that are made, per byte of the pickle.
MAX_COPIED, MAX_MADE = 16, 0.5
#: A set takes the memory, and the time, of so many lists. One with a member has at least 6 bytes of the pickle.
_SET = 3
#: Whole numbers have at most so many bytes, and as keys so many values.
MAX_INT_NBYTES, MAX_KEY = 16, 2**53
_NEWEST = 5


class Call:
    """An entry of the table that may be called, with values of the pickle."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


#: ``module.name`` -> a :class:`Call`, a subclass of :class:`Inert`, or a value that the name stands for.
Names = Callable[[str, str], Any]


class Machine:
    """One run over the bytes of a pickle: a stack, its marks and a memo, each bounded by those bytes."""

    def __init__(self, content: bytes, names: Names, outside: Callable[[Any], Any]) -> None:
        self._content, self._at = content, 0
        self._names, self._outside = names, outside
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._copies = MAX_COPIED * len(content) + 1000
        self._room = int(MAX_MADE * len(content)) + 1000

    def run(self) -> Any:
        content, operations = self._content, _OPERATIONS
        while self._at < len(content):
            code = content[self._at]
            self._at += 1
            if code == _STOP:
                if len(self._stack) != 1 or self._marks:
                    raise Refused("its stack is not empty at its end")
                return self._stack.pop()
            operation = operations.get(code)
            if operation is None:
                raise Refused(f"the operation {code:#04x}, which no checkpoint has")
            operation(self)
        raise Refused("it ends in the middle")

    # Bytes -----------------------------------------------------------------------------------------------------

    def take(self, count: int) -> bytes:
        begin = self._at
        self._at = end = begin + count
        if end > len(self._content):
            raise Refused(f"it is truncated: {count:,} bytes are said to follow, and there are fewer")
        return self._content[begin:end]

    def skip(self, count: int) -> None:
        self.take(count)

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def line(self) -> str:
        end = self._content.find(b"\n", self._at, self._at + 1000)
        if end < 0:
            raise Refused("a line without an end")
        text = self.take(end - self._at).decode()
        self._at += 1
        return text

    # The stack -------------------------------------------------------------------------------------------------

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def made(self, value: Any, weight: int = 1) -> None:
        """A value that takes more memory than its operation has bytes."""
        self._room -= weight
        if self._room < 0:
            raise Refused("it makes more values than so short a pickle can hold")
        self._stack.append(value)

    def copied(self, values: Any) -> None:
        """Something is copied that the pickle may refer to as often as it likes."""
        for value in values:
            if isinstance(value, (str, bytes, dict, list, tuple, set)):
                self._copies -= len(value)
        if self._copies < 0:
            raise Refused("it copies the same values again and again")

    def pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise Refused("it takes from an empty stack")
        return self._stack.pop()

    def top(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise Refused("it takes from an empty stack")
        return self._stack[-1]

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def since_mark(self) -> list[Any]:
        if not self._marks:
            raise Refused("it takes from an empty stack")
        begin = self._marks.pop()
        found = self._stack[begin:]
        del self._stack[begin:]
        return found

    def drop(self) -> None:
        self.pop()

    def drop_to_mark(self) -> None:
        self.since_mark()

    def put(self, index: int) -> None:
        self._memo[index] = self.top()

    def memoize(self) -> None:
        self.put(len(self._memo))

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise Refused(f"place {index} of its memo is empty")
        self.push(self._memo[index])

    # Values ----------------------------------------------------------------------------------------------------

    def integer(self, nbytes: int) -> None:
        if nbytes > MAX_INT_NBYTES:
            raise Refused(f"an integer of {nbytes:,} bytes")
        self.push(int.from_bytes(self.take(nbytes), "little", signed=True))

    def text(self, nbytes: int) -> None:
        self.push(self.take(nbytes).decode("utf-8", "surrogatepass"))

    def tuple(self, count: int) -> None:
        self.push(tuple([self.pop() for _ in range(count)][::-1]))

    def extend(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise Refused(f"it appends to {shown(target)}")
        target.extend(values)

    def update(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) not in (dict, OrderedDict) or len(values) % 2:
            raise Refused(f"it sets an item of {shown(target)}")
        for i in range(0, len(values), 2):
            target[_key(values[i])] = values[i + 1]

    def add(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is not set:
            raise Refused(f"it adds to {shown(target)}")
        target.update(map(_key, values))

    # Objects ---------------------------------------------------------------------------------------------------

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused("a name that is not text")
        self.push(self._names(module, name))

    def named_by_stack(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def named_by_lines(self) -> None:
        module = self.line()
        self.name(module, self.line())

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(arguments) is not tuple:
            raise Refused("it calls something with what is no tuple")
        self.copied((arguments, *arguments))
        if type(function) is Call:
            self.made(function.function(*arguments))
        elif isinstance(function, type) and issubclass(function, Inert):
            self.made(function(*arguments))
        else:
            raise Refused(f"it calls {shown(function)}")

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if type(target) is OrderedDict:
            return  # attributes, such as _metadata of a model's: not read
        if not isinstance(target, Inert):
            raise Refused(f"it sets attributes of {shown(target)}")
        parts = state if type(state) is tuple and len(state) == 2 else (state,)
        self.copied(parts)
        for part in parts:
            if isinstance(part, dict) and all(isinstance(key, str) for key in part):
                target.__dict__.update(part)
            elif part is not None:
                target.__dict__["state"] = part

    def persistent(self) -> None:
        self.push(self._outside(self.pop()))


def is_key(key: Any) -> bool:
    """Whether a value may be a key, or a member of a set: of others one can write down any number with one hash."""
    return key is None or isinstance(key, (str, bytes, Inert)) or (isinstance(key, int) and abs(key) <= MAX_KEY)


def _key(key: Any) -> Any:
    if is_key(key):
        return key
    raise Refused(f"{shown(key)} as a key")


_STOP = ord(".")


def _proto(machine: Machine) -> None:
    version = machine.number(1)
    if version > _NEWEST:
        raise Refused(f"protocol {version}, which is not known")


_OPERATIONS: dict[int, Callable[[Machine], None]] = {
    0x80: _proto,
    0x95: lambda m: m.skip(8),  # the length of a frame
    ord("("): Machine.mark,
    ord("0"): Machine.drop,
    ord("1"): Machine.drop_to_mark,
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.integer(4),
    ord("K"): lambda m: m.push(m.number(1)),
    ord("M"): lambda m: m.push(m.number(2)),
    0x8A: lambda m: m.integer(m.number(1)),
    0x8B: lambda m: m.integer(m.number(4)),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    ord("X"): lambda m: m.text(m.number(4)),
    0x8C: lambda m: m.text(m.number(1)),
    0x8D: lambda m: m.text(m.number(8)),
    ord("B"): lambda m: m.push(m.take(m.number(4))),
    ord("C"): lambda m: m.push(m.take(m.number(1))),
    0x8E: lambda m: m.push(m.take(m.number(8))),
    0x96: lambda m: m.push(m.take(m.number(8))),  # a bytearray: as bytes
    ord("T"): lambda m: m.push(m.take(m.number(4)).decode("latin-1")),
    ord("U"): lambda m: m.push(m.take(m.number(1)).decode("latin-1")),
    ord("]"): lambda m: m.made([]),
    ord("}"): lambda m: m.made({}),
    ord(")"): lambda m: m.push(()),
    0x8F: lambda m: m.made(set(), _SET),
    ord("l"): lambda m: m.push(m.since_mark()),
    ord("t"): lambda m: m.push(tuple(m.since_mark())),
    0x85: lambda m: m.tuple(1),
    0x86: lambda m: m.tuple(2),
    0x87: lambda m: m.tuple(3),
    0x91: lambda m: m.made(frozenset(map(_key, m.since_mark())), _SET),
    ord("a"): lambda m: m.extend([m.pop()]),
    ord("e"): lambda m: m.extend(m.since_mark()),
    ord("s"): lambda m: m.update([m.pop(), m.pop()][::-1]),
    ord("u"): lambda m: m.update(m.since_mark()),
    0x90: lambda m: m.add(m.since_mark()),
    ord("q"): lambda m: m.put(m.number(1)),
    ord("r"): lambda m: m.put(m.number(4)),
    0x94: Machine.memoize,
    ord("h"): lambda m: m.get(m.number(1)),
    ord("j"): lambda m: m.get(m.number(4)),
    ord("c"): Machine.named_by_lines,
    0x93: Machine.named_by_stack,
    ord("R"): Machine.call,
    0x81: Machine.call,  # cls.__new__: an Inert class takes its arguments either way
    ord("b"): Machine.build,
    ord("Q"): Machine.persistent,
}
