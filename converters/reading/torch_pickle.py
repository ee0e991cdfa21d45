"""The pickle of a torch checkpoint, read by a machine that knows tensors alone.

A pickle is a program for a stack machine, and Python's own machine calls any function that the program names. This one executes
nothing: it has the opcodes that name, nest and collect plain values, and for the few functions that torch writes around a tensor
it notes what they would build. Any other name or opcode is refused.
"""

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
"""Classes of `torch` that a pickle names for a storage -> the dtype, by its name in a safetensors header."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """A run of elements, kept in a file of its own in the archive."""

    dtype: str
    key: str  # name of that file
    count: int  # elements


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A strided view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Name:
    """A function or class that the pickle names; it is never imported."""

    module: str
    name: str


class _Mark:
    """Where the values of a list, dict or tuple begin on the stack."""


_CONSTANTS = {
    "BININT": None,
    "BININT1": None,
    "BININT2": None,
    "LONG1": None,
    "BINFLOAT": None,
    "BINUNICODE": None,
    "SHORT_BINUNICODE": None,
}
"""Opcodes that push their argument."""


def read_pickle(raw: bytes) -> dict[str, StoredTensor]:
    """The tensors of a state dict.

    Args:
      raw: the pickle.

    Returns:
      The tensors by name, in the order of the file.

    Raises:
      ValueError: anything but a dict from names to tensors; says by name what the pickle asks for.
    """
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name == "STOP":
            break
        machine.step(opcode.name, argument)
    result = machine.pop()
    if not isinstance(result, dict):
        raise ValueError(f"expected a dict from names to tensors, found {_kind(result)}")
    for name, value in result.items():
        if not isinstance(name, str) or not isinstance(value, StoredTensor):
            raise ValueError(f"expected a dict from names to tensors, found {_kind(value)} under {ascii(name)[:80]}")
    return result


class _Machine:
    """The stack and the memo. Values are never hashed, compared or shown unless they are strings or numbers: a pickle can nest a
    value in itself, or so often that this would not end."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """Executes one opcode."""
        if opcode in _CONSTANTS:
            self.stack.append(argument)
        elif opcode in _OPCODES:
            _OPCODES[opcode](self, argument)
        else:
            raise ValueError(f"the pickle uses {opcode}, which no state dict of tensors needs")

    def pop(self) -> Any:
        """Takes the last value."""
        if not self.stack or isinstance(self.stack[-1], _Mark):
            raise ValueError("the pickle takes a value where there is none")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        """Takes the values behind the last mark, and the mark."""
        taken: list[Any] = []
        while self.stack:
            value = self.stack.pop()
            if isinstance(value, _Mark):
                return taken[::-1]
            taken.append(value)
        raise ValueError("the pickle ends a list that it did not begin")

    def top(self, kind: type) -> Any:
        """The last value, which has to be a list or a dict to add to."""
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise ValueError(f"the pickle adds to something that is no {kind.__name__}")
        return self.stack[-1]

    def tuple_of(self, count: int) -> None:
        """Puts the last values into a tuple."""
        self.stack.append(tuple([self.pop() for _ in range(count)][::-1]))

    def remember(self, index: int) -> None:
        """Notes the last value under a number."""
        value = self.pop()
        self.stack.append(value)
        self.memo[index] = value

    def recall(self, index: int) -> None:
        """Pushes a value that was noted."""
        if index not in self.memo:
            raise ValueError(f"the pickle reads entry {index} of its memo, which is not there")
        self.stack.append(self.memo[index])

    def add_items(self, pairs: list[Any]) -> None:
        """Adds keys and values, in turn, to the dict at the top."""
        target = self.top(dict)
        if len(pairs) % 2 or not all(isinstance(key, str) for key in pairs[::2]):
            raise ValueError("the pickle has a dict whose keys are no strings")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if key in target:
                raise ValueError(f"the key {ascii(key)[:80]} occurs twice")
            target[key] = value

    def set_item(self, _: Any) -> None:
        """Adds one key and its value."""
        value, key = self.pop(), self.pop()
        self.add_items([key, value])

    def append(self, values: list[Any]) -> None:
        """Adds values to the list at the top."""
        self.top(list).extend(values)

    def name(self, module: Any, name: Any) -> None:
        """Pushes a name, if it is one of those that torch writes around tensors."""
        if not isinstance(module, str) or not isinstance(name, str) or not _known(module, name):
            shown = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "a name that is no string"
            raise ValueError(f"the pickle asks for {ascii(shown)[1:-1][:80]}, which is no tensor and is not executed")
        self.stack.append(_Name(module, name))

    def stack_name(self, _: Any) -> None:
        """Pushes the name that the last two values are."""
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def reduce(self, _: Any) -> None:
        """What a function of torch would build."""
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Name) or function not in _BUILDERS or not isinstance(arguments, tuple):
            raise ValueError(f"the pickle calls {_kind(function)}, which is no tensor and is not executed")
        self.stack.append(_BUILDERS[function](arguments))

    def build(self, _: Any) -> None:
        """Attributes of a dict, such as the versions of modules: nothing of the tensors, so they are dropped."""
        self.pop()
        self.top(dict)

    def persistent(self, _: Any) -> None:
        """A storage: ("storage", class, name in the archive, device, elements)."""
        match self.pop():
            case ("storage", _Name(module="torch", name=kind), str(key), str(), int(count)) if kind in STORAGES and count >= 0:
                self.stack.append(Storage(STORAGES[kind], key, count))
            case _:
                raise ValueError(f"expected storages of {', '.join(STORAGES)}, found something else")


def _known(module: str, name: str) -> bool:
    return _Name(module, name) in _BUILDERS or (module == "torch" and name in STORAGES)


def _rebuild_tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    """`torch._utils._rebuild_tensor_v2`: storage, offset, shape, strides, then what training needs."""
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), *_):
            return StoredTensor(storage, offset, shape, strides)
    raise ValueError("expected a tensor as storage, offset, shape and strides, found something else")


def _rebuild_parameter(arguments: tuple[Any, ...]) -> StoredTensor:
    """`torch._utils._rebuild_parameter`: a tensor, then what training needs."""
    if arguments and isinstance(arguments[0], StoredTensor):
        return arguments[0]
    raise ValueError("expected a parameter that holds a tensor, found something else")


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """`collections.OrderedDict()`, which is filled later."""
    if arguments:
        raise ValueError("expected an OrderedDict that is empty when it is made, found one with arguments")
    return {}


_BUILDERS: dict[_Name, Callable[[tuple[Any, ...]], Any]] = {
    _Name("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    _Name("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    _Name("collections", "OrderedDict"): _ordered_dict,
}

_OPCODES: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "MARK": lambda machine, _: machine.stack.append(_Mark()),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "BINPUT": lambda machine, index: machine.remember(index),
    "LONG_BINPUT": lambda machine, index: machine.remember(index),
    "MEMOIZE": lambda machine, _: machine.remember(len(machine.memo)),
    "BINGET": lambda machine, index: machine.recall(index),
    "LONG_BINGET": lambda machine, index: machine.recall(index),
    "GLOBAL": lambda machine, argument: machine.name(*argument.split(" ", 1)),
    "STACK_GLOBAL": _Machine.stack_name,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda machine, _: machine.add_items(machine.pop_to_mark()),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
}
"""Opcode -> what it does to the machine."""


def _kind(value: object) -> str:
    """A value's kind for a message, without its content."""
    return f"{value.module}.{value.name}" if isinstance(value, _Name) else f"a {type(value).__name__}"
