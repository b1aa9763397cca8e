# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find a function's parameters at its entry: by DWARF's locations, else by the ABI.

An ABI defines where parameters are passed, but compilers follow it only for functions that other
code can call: gcc leaves parameters out of clones (``.constprop``, ``.isra``), passes those of
local functions of i386 in registers, and those of all functions with ``-mregparm=3``, as for Linux.
A DWARF location describes the actual place; but one for the whole function may be a variable that
is not written yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from xenaltp2m.values.events import Registers

IN_REGISTERS = "rdi", "rsi", "rdx", "rcx", "r8", "r9"
"""The first six words of arguments (System V ABI, AMD64, 3.2.3)."""
MOST_WORDS = 256
"""The most words of arguments: what is further up the stack is not read."""
_REGPARM = "rax", "rdx", "rcx"
"""The registers of ``-mregparm=3`` (gcc, i386)."""
_DWARF_64 = (
    "rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
_DWARF_32 = "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"
"""DWARF's numbers of registers (System V ABI, AMD64 and Intel386)."""
_KEPT = frozenset(("rbx", "rsp", "rbp", "r12", "r13", "r14", "r15"))
"""Registers that a function saves before it uses them: no parameter is passed in one."""
_LONGEST = 64
"""The most bytes of an expression; a longer one describes no place at the entry."""


class Piece(NamedTuple):
    """Some bytes of a value: in a register, in a word of arguments, or a constant."""

    size: int
    register: str | None = None
    word: int | None = None
    constant: int = 0

    def read(self, registers: Registers, arguments: Sequence[int]) -> int | None:
        """Return their value; None if the word was not read."""
        value = self.constant
        if self.register is not None:
            value = getattr(registers, self.register)
        elif self.word is not None:
            if self.word >= len(arguments):
                return None
            value = arguments[self.word]
        return value & (1 << 8 * self.size) - 1


Place: TypeAlias = "tuple[Piece, ...] | None"
"""The pieces of a value, lowest bytes first; None if unknown."""


class Passed(Protocol):
    """The type of a value that is passed."""

    @property
    def size(self) -> int:
        """Return its size in bytes."""

    @property
    def kind(self) -> str:
        """Return its kind, as :class:`xenaltp2m.tools.symbols.prototypes.Type` names it."""


def places(
    found: Sequence[Place | bool], types: Sequence[Passed], by_abi: Sequence[Place]
) -> list[Place]:
    """Choose where each parameter is.

    Args:
        found: The places by DWARF; True for a variable that is written only later, False if the
            parameter was left out.
        types: The parameters' types.
        by_abi: The places by the ABI, which hold unless some parameters are elsewhere, or left out.
    """
    holds = all(
        place is True or (place is not False and _is_same(place, abi))
        for place, abi in zip(found, by_abi, strict=True)
    )
    return [
        (abi if holds and not _is_copied(one, abi) else None) if place is True else place or None
        for place, one, abi in zip(found, types, by_abi, strict=True)
    ]


def _is_same(place: Place | bool, abi: Place) -> bool:
    if place is None or abi is None or isinstance(place, bool):
        return place is abi
    return [piece[1:] for piece in place] == [piece[1:] for piece in abi]


def _is_copied(one: Passed, abi: Place) -> bool:
    """Return whether it is a word on the i386 stack, which need not be copied elsewhere."""
    return abi is not None and abi[0].size == one.size == 4 and abi[0].word is not None


class Locator:
    """Evaluates the locations of one function, at its entry."""

    def __init__(self, unit: Any, function: Any, low: int, *, is_64_bit: bool) -> None:
        """Prepare for a DWARF unit, and the entry of a function that begins at ``low``."""
        self._unit, self._low = unit, low
        self._names = _DWARF_64 if is_64_bit else _DWARF_32
        self._width = 8 if is_64_bit else 4
        from elftools.dwarf.dwarf_expr import DWARFExprParser  # as in dwarf.load

        self._parser = DWARFExprParser(unit.structs)
        base = function.attributes.get("DW_AT_frame_base")
        self._frame = self._frame_base([] if base is None else base.value)

    def find(self, parameter: Any, size: int) -> Place | bool:
        """Find a parameter of ``size`` bytes; return a value of ``found`` in :func:`places`."""
        constant = parameter.attributes.get("DW_AT_const_value")
        if constant is not None:
            return self._constant(constant.value, size)
        location = parameter.attributes.get("DW_AT_location")
        if location is None:
            return False
        if isinstance(location.value, int):
            expression = self._at_entry(parameter, location.value)
            return False if expression is None else self._evaluate(expression, size) or None
        found = self._evaluate(location.value, size)
        # A location for the whole function is the variable's home; it is not passed there.
        is_home = found and any(piece.register in _KEPT for piece in found)
        return True if found == () or is_home else found

    def _constant(self, value: Any, size: int) -> Place:
        if isinstance(value, bytes):  # a string, which is never a parameter
            return None
        number = value if isinstance(value, int) else int.from_bytes(bytes(value), "little")
        return (Piece(size, constant=number & (1 << 8 * size) - 1),)

    def _at_entry(self, parameter: Any, offset: int) -> list[int] | None:
        """Return the expression for the entry in a list of locations."""
        lists = self._unit.dwarfinfo.location_lists()
        if lists is None:
            return None
        base = self._unit.get_top_DIE().attributes.get("DW_AT_low_pc")
        start = 0 if base is None else base.value
        for span in lists.get_location_list_at_offset(offset, parameter):
            if not hasattr(span, "loc_expr"):
                start = span.base_address
                continue
            begin = 0 if getattr(span, "is_absolute", False) else start
            if begin + span.begin_offset <= self._low < begin + span.end_offset:
                found: list[int] = span.loc_expr
                return found
        return None

    def _frame_base(self, expression: Sequence[int]) -> int | None:
        """Return the offset of the frame base from the first word of arguments; None if unknown."""
        ops = self._parse(expression)
        if [op.op_name for op in ops] == ["DW_OP_call_frame_cfa"]:
            return 0
        if len(ops) == 1 and self._register(ops[0]) == "rbp":
            return -2 * self._width  # once it is set up: PUSH writes below the return address
        return None

    def _parse(self, expression: Sequence[int]) -> list[Any]:
        if len(expression) > _LONGEST:
            return []
        try:
            return list(self._parser.parse_expr(expression))
        except KeyError:  # an unknown operation
            return []

    def _evaluate(self, expression: Sequence[int], size: int) -> Place:
        """Return where a value is; () for memory that the function itself writes."""
        found: list[Piece] = []
        ops: list[Any] = []
        for op in [*self._parse(expression), None]:
            if op is not None and op.op_name != "DW_OP_piece":
                ops.append(op)
                continue
            if op is None and not ops:
                break
            piece = self._pieces(ops, size if op is None else op.args[0])
            if not piece:
                return piece
            found += piece
            ops = []
        return tuple(found) or None

    def _pieces(self, ops: list[Any], size: int) -> Place:
        if ops and ops[-1].op_name == "DW_OP_stack_value":
            return self._value(ops[:-1], size)
        if len(ops) != 1:
            return None
        [op] = ops
        if (register := self._register(op)) is not None:
            return (Piece(size, register),)
        if op.op_name == "DW_OP_implicit_value":
            return self._constant(op.args[0], size)
        above = None
        if op.op_name == "DW_OP_fbreg" and self._frame is not None:
            above = self._frame + op.args[0]
        elif op.op_name == "DW_OP_call_frame_cfa":
            above = 0
        elif op.op_name == f"DW_OP_breg{self._names.index('rsp')}":
            above = op.args[0] - self._width
        if above is None:
            return None
        return () if above < 0 else tuple(self._on_stack(above, size))

    def _on_stack(self, above: int, size: int) -> Iterator[Piece]:
        """Yield the pieces of a value on the stack, at an offset above the return address."""
        word, within = divmod(above, self._width)
        if within or size > self._width * MOST_WORDS:
            return
        word += len(IN_REGISTERS) if self._width == 8 else 0
        for at in range(0, size, self._width):
            yield Piece(min(self._width, size - at), word=word + at // self._width)

    def _value(self, ops: list[Any], size: int) -> Place:
        """Return the place of an expression that computes a value."""
        if len(ops) != 1:
            return None
        [op] = ops
        name = op.op_name
        if name in ("DW_OP_entry_value", "DW_OP_GNU_entry_value"):
            [inner] = op.args
            register = self._register(inner[0]) if len(inner) == 1 else None
            return None if register is None else (Piece(size, register),)
        if name.startswith("DW_OP_breg") and not op.args[0]:
            number = int(name.removeprefix("DW_OP_breg"))
            return (Piece(size, self._names[number]),) if number < len(self._names) else None
        if name.startswith("DW_OP_lit"):
            return self._constant(int(name.removeprefix("DW_OP_lit")), size)
        if name.startswith("DW_OP_const") and name[len("DW_OP_const")] in "1248us":
            return self._constant(op.args[0], size)
        return None

    def _register(self, op: Any) -> str | None:
        digits = op.op_name.removeprefix("DW_OP_reg")
        number = op.args[0] if digits == "x" else int(digits) if digits.isdecimal() else None
        return self._names[number] if number is not None and number < len(self._names) else None


def by_abi(word: int | None, size: int, *, is_64_bit: bool) -> Place:
    """Return the place of a value that begins with a word of arguments."""
    width = 8 if is_64_bit else 4
    if word is None or size > width * MOST_WORDS:
        return None
    found = []
    for at in range(0, max(size, 1), width):
        number, part = word + at // width, min(width, size - at) or width
        if is_64_bit and number < len(IN_REGISTERS):
            found.append(Piece(part, IN_REGISTERS[number]))
        else:
            found.append(Piece(part, word=number))
    return tuple(found)


def by_regparm(types: Sequence[Passed], most: int, *, hidden: bool) -> list[Place]:
    """Return where parameters are with ``-mregparm`` (gcc, ``function_arg_32``).

    Args:
        types: The parameters' types.
        most: The number of registers.
        hidden: Whether the first register contains the address for a returned structure.
    """
    free = list(_REGPARM[:most])[int(hidden) :]
    word, found = 0, list[Place]()
    for one in types:
        sizes = [min(4, one.size - at) for at in range(0, one.size, 4)] or [4]
        if one.kind != "float" and len(sizes) <= len(free):
            found.append(tuple(map(Piece, sizes, free)))
            del free[: len(sizes)]
            continue
        if one.kind != "float":
            free.clear()
        found.append(by_abi(word, one.size, is_64_bit=False))
        word += len(sizes)
    return found
