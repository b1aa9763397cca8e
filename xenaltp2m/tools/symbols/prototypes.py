# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read functions' prototypes from the debugging information (DWARF) of their image.

The file may come from anywhere. How much of it is read is bounded, and every fault of it raises a
:class:`~xenaltp2m.errors.SymbolError`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Self, TypeVar

from xenaltp2m.errors import SymbolError
from xenaltp2m.tools.symbols.dwarf import (
    check_unit,
    find_type,
    is_described,
    is_skeleton,
    load,
    load_split,
    load_supplement,
)
from xenaltp2m.tools.symbols.elf import ET_REL, ElfFile, opened
from xenaltp2m.tools.symbols.locations import (
    IN_REGISTERS,
    Locator,
    Place,
    by_abi,
    by_regparm,
    places,
)
from xenaltp2m.tools.symbols.meter import Meter

if TYPE_CHECKING:
    from xenaltp2m.values.events import Registers

MAX_UNITS = 1 << 16
"""Compilation units."""
MAX_ENTRIES = 1 << 20
"""Entries read in one search: some tens of seconds."""
_DEEPEST = 16
"""The most types that may refer to each other in a chain."""
_MOST_PARAMETERS = 64
_ASSEMBLY = frozenset((0x8001,))
"""DW_LANG_Mips_Assembler, which all assemblers use."""
_REGPARM = re.compile(rb" -mregparm=([0-3])\b")
_LARGEST = {False: 16, True: 8}
"""The largest values that are read: bytes of integers, and of floating-point numbers."""
_WORD = 8
_REGISTER_WORDS = 6
_SIGNED = frozenset((0x05, 0x06, 0x0D))
"""DW_ATE_signed, signed_char, signed_fixed."""
_FLOATING = frozenset((0x03, 0x04, 0x09, 0x0F))
"""DW_ATE_complex_float, float, imaginary_float, decimal_float."""
_STRUCTURES = frozenset(f"DW_TAG_{kind}_type" for kind in ("structure", "union", "class", "array"))
_IN_UNIT = frozenset(f"DW_FORM_ref{kind}" for kind in ("1", "2", "4", "8", "_udata"))
_ORIGINS = "DW_AT_abstract_origin", "DW_AT_specification"
_QUALIFIERS = {
    "DW_TAG_const_type": "const", "DW_TAG_volatile_type": "volatile",
    "DW_TAG_restrict_type": "restrict", "DW_TAG_atomic_type": "_Atomic",
}  # fmt: skip
_T = TypeVar("_T")


class Type(NamedTuple):
    """A C type, as far as it determines how a value is passed and shown."""

    name: str
    """Almost in C syntax."""
    size: int
    """Bytes."""
    kind: str
    """"signed", "unsigned", "pointer", "string", "float", "structure" or "void"."""


VOID = Type("void", 0, "void")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a function.

    Attributes:
        word: The index of its first word among the arguments of
            :class:`~xenaltp2m.tools.tracing.Call`: in 64-bit mode the first six are in registers.
            None if it is in none of them.
        place: Where all of it is; None if unknown.
    """

    name: str
    type: Type
    word: int | None
    place: Place = None

    def read(self, registers: Registers, arguments: Sequence[int]) -> int | None:
        """Return the value passed, as an unsigned number; None if it is unknown.

        Args:
            registers: The registers at the call.
            arguments: The arguments of the call: at least :attr:`Prototype.words`.
        """
        if self.place is None:
            known = self.word is not None and self.word < len(arguments)
            return arguments[self.word or 0] if known else None
        value = shift = 0
        for piece in self.place:
            part = piece.read(registers, arguments)
            if part is None:
                return None
            value |= part << shift
            shift += 8 * piece.size
        return value


@dataclass(frozen=True, slots=True)
class Prototype:
    """A function's parameters and result.

    Attributes:
        variadic: Whether it takes more parameters than these.
    """

    name: str
    parameters: tuple[Parameter, ...]
    result: Type
    variadic: bool = False

    @property
    def words(self) -> int:
        """The number of argument words of a call that contain all parameters."""
        words = [one.word for one in self.parameters]
        words += [piece.word for one in self.parameters for piece in one.place or ()]
        return 1 + max((word for word in words if word is not None), default=-1)

    def __str__(self) -> str:
        shown = [f"{one.type.name} {one.name}".strip() for one in self.parameters]
        shown += ["..."] if self.variadic else []
        return f"{self.result.name} {self.name}({', '.join(shown) or 'void'})"


class Function(NamedTuple):
    """A function with code in the image."""

    name: str
    address: int
    size: int


class Prototypes:
    """The prototypes of an image's functions, read on demand.

    :meth:`open` opens a file for a ``with`` block.
    """

    def __init__(self, stream: BinaryIO, name: str, directory: Path | None = None) -> None:
        """Read the headers.

        Args:
            stream: The file; the caller closes it.
            name: The file's name in messages.
            directory: Where to search for files that it names; None does not search.

        Raises:
            SymbolError: It is not an ELF image, is damaged, or has no debugging information; or
                some of that is in another file, which is missing.
        """
        self.name, self._directory = name, directory
        self._left, self._meter = 0, Meter()
        self._elf = ElfFile(stream, name)
        self._is_64_bit = self._elf.bits == 64
        if self._elf.type == ET_REL:
            self._elf.refuse("a relocatable object (.o, .ko): its functions have no addresses yet")
        if not is_described(self._elf):
            raise SymbolError(
                f"{name} has no debugging information",
                hint=("use an image that is not stripped, such as a -dbg package's vmlinux",),
            )
        with self._reading():
            self._dwarf = load(self._elf, self._meter)
            self._dwarf.supplementary_dwarfinfo = load_supplement(self._elf, self._meter, directory)

    @classmethod
    @contextmanager
    def open(cls, path: str | os.PathLike[str]) -> Iterator[Self]:
        """Open a file for a ``with`` block.

        Raises:
            SymbolError: As the constructor; or the file cannot be read.
        """
        name = os.fspath(path)
        with opened(path) as stream:
            yield cls(stream, name, Path(name).parent)

    def at(self, address: int) -> Prototype | None:
        """Return the prototype of the function that begins at an address, as in the file.

        None if nothing is known: it was written in assembly, or is inlined everywhere.

        Raises:
            SymbolError: The information is damaged, or exceeds a limit.
        """
        self._begin()
        with self._reading():
            unit = self._unit_of(address)
            if unit is None:
                return None
            for entry in self._functions(unit):
                low, _ = self._entrance(unit, entry)
                if low == address:
                    return self._prototype(unit, entry, low)
        return None

    def functions(self) -> Iterator[Function]:
        """Yield all functions with a name and code of their own.

        If a function's code has several parts, for example one for unlikely paths, the first is
        returned.

        Raises:
            SymbolError: As :meth:`at`.
        """
        self._begin()
        for unit in self._units():
            found = []
            with self._reading():
                whole = self._whole(unit)
                for entry in self._functions(whole):
                    low, high = self._entrance(whole, entry)
                    name = self._name_of(entry)
                    if low is not None and name:
                        found.append(Function(name, low, max(high - low, 0)))
            yield from found

    # Units and entries.

    def _begin(self) -> None:
        """Begin a search: reset the limits."""
        self._left = MAX_ENTRIES
        self._meter.begin()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._meter.left < 0:
                raise SymbolError(
                    f"{self.name}: too much to read in its debugging information"
                ) from error
            if isinstance(error, SymbolError):
                raise
            if isinstance(error, NotImplementedError) or "DWARF version" in str(error):
                raise SymbolError(
                    f"{self.name}: its debugging information is of a kind that pyelftools cannot "
                    f"read: {error}"
                ) from error
            # pyelftools raises nearly any exception for damaged tables.
            raise SymbolError(f"{self.name}: its debugging information is damaged") from error

    def _units(self) -> Iterator[Any]:
        with self._reading():
            units = self._dwarf.iter_CUs()
            for _ in range(MAX_UNITS):
                unit = next(units, None)
                if unit is None:
                    return
                check_unit(self._elf, unit)
                yield unit
        raise SymbolError(f"{self.name} has more than {MAX_UNITS} compilation units")

    def _whole(self, unit: Any) -> Any:
        """Return the unit itself, or the split unit that contains its entries."""
        if not is_skeleton(unit):
            return unit
        return load_split(self._elf, unit, self._meter, self._directory)

    def _unit_of(self, address: int) -> Any:
        for unit in self._units():
            top = self._take(unit.get_top_DIE())
            if "DW_AT_ranges" in top.attributes:
                if any(low <= address < high for low, high in self._ranges(unit, top)):
                    return self._whole(unit)
                continue
            low, high = _bounds(top)
            if low is not None and low <= address < high:
                return self._whole(unit)
        return None

    def _entrance(self, unit: Any, entry: Any) -> tuple[int | None, int]:
        """Return a function's first range of code: its first byte, and the one after its last."""
        if "DW_AT_ranges" in entry.attributes:
            return next(self._ranges(unit, entry), (None, 0))
        return _bounds(entry)

    def _ranges(self, unit: Any, entry: Any) -> Iterator[tuple[int, int]]:
        lists = unit.dwarfinfo.range_lists()
        offset = entry.attributes["DW_AT_ranges"].value
        if lists is None:
            return
        top = unit.get_top_DIE()
        if entry is not top and unit["version"] < 5:
            offset += _number(top, "DW_AT_GNU_ranges_base") or 0
        base = _number(top, "DW_AT_low_pc") or 0
        for span in lists.get_range_list_at_offset(offset, cu=unit):
            self._take(span)
            if hasattr(span, "base_address"):
                base = span.base_address
                continue
            begin = 0 if getattr(span, "is_absolute", False) else base
            yield begin + span.begin_offset, begin + span.end_offset

    def _functions(self, unit: Any) -> Iterator[Any]:
        """Yield the functions at the top of a unit or in a namespace, with code or not."""
        waiting = [unit.get_top_DIE()]
        while waiting:
            for entry in self._children(waiting.pop()):
                if entry.tag == "DW_TAG_subprogram":
                    yield entry
                elif entry.tag == "DW_TAG_namespace":
                    waiting.append(entry)

    def _children(self, parent: Any) -> Iterator[Any]:
        """Yield an entry's children; skipped entries count, and links backwards are refused."""
        unit, at, depth = parent.cu, parent.offset + parent.size, int(parent.has_children)
        while depth:
            entry = self._take(unit.get_DIE_from_refaddr(at))
            at += entry.size
            if entry.is_null():
                depth -= 1
                continue
            if depth == 1:
                yield entry
            if not entry.has_children:
                continue
            sibling = entry.attributes.get("DW_AT_sibling")
            if sibling is None or sibling.form not in _IN_UNIT:
                depth += 1
                continue
            if unit.cu_offset + sibling.value < at:
                raise SymbolError(f"{self.name}: its debugging information leads in circles")
            at = unit.cu_offset + sibling.value

    def _take(self, entry: _T) -> _T:
        """Count an entry; raise if there are too many."""
        self._left -= 1
        if self._left < 0:
            raise SymbolError(f"{self.name}: more than {MAX_ENTRIES} entries to search")
        return entry

    def _owner(self, entry: Any, name: str) -> Any:
        """Return the entry that has an attribute: this one or its origin; None if neither has."""
        for _ in range(_DEEPEST):
            if name in entry.attributes:
                return entry
            link = next((link for link in _ORIGINS if link in entry.attributes), None)
            if link is None:
                return None
            entry = self._take(entry.get_DIE_from_attribute(link))
        return None

    def _name_of(self, entry: Any) -> str:
        owner = self._owner(entry, "DW_AT_name")
        return "" if owner is None else _name(owner)

    # Prototypes.

    def _prototype(self, unit: Any, entry: Any, low: int) -> Prototype | None:
        if _number(unit.get_top_DIE(), "DW_AT_language") in _ASSEMBLY:
            return None
        name, result = self._name_of(entry), self._type_of(entry)
        declared = self._origin(entry)
        own, variadic = self._parameters(entry, name)
        if declared is not entry:
            # The compiler may have made this clone with fewer parameters, and in another order.
            made = {self._origin(child).offset: child for child in own}
            wanted, variadic = self._parameters(declared, name)
            pairs = [(child, made.get(child.offset)) for child in wanted]
        else:
            pairs = [(child, child) for child in own]
        types = [self._type_of(child) for child, _ in pairs]
        locator = Locator(unit, entry, low, is_64_bit=self._is_64_bit)
        width = 8 if self._is_64_bit else 4
        found = [
            False if child is None else locator.find(child, one.size or width)
            for (_, child), one in zip(pairs, types, strict=True)
        ]
        by_rule = self._by_abi(unit, types, result, variadic=variadic)
        chosen = zip(pairs, types, places(found, types, by_rule), strict=True)
        parameters = tuple(
            self._parameter(self._name_of(child), one, place) for (child, _), one, place in chosen
        )
        return Prototype(name, parameters, result, variadic)

    def _parameter(self, name: str, of: Type, place: Place) -> Parameter:
        word = None
        if place is not None:
            word = place[0].word
            if self._is_64_bit and place[0].register in IN_REGISTERS:
                word = IN_REGISTERS.index(place[0].register)
        is_shown = of.size <= _LARGEST[of.kind == "float"] and of.kind != "structure"
        return Parameter(name, of, word, place if is_shown or word is None else None)

    def _by_abi(self, unit: Any, types: list[Type], result: Type, *, variadic: bool) -> list[Place]:
        """Return the parameters' places by the ABI, unless the compiler has recorded others."""
        if not self._is_64_bit and not variadic:
            producer = unit.get_top_DIE().attributes.get("DW_AT_producer")
            text = producer.value if producer is not None else b""
            option = _REGPARM.search(text) if isinstance(text, bytes) else None
            if option is not None:
                hidden = result.kind == "structure"
                return by_regparm(types, int(option[1]), hidden=hidden)
        words = (_places_64 if self._is_64_bit else _places_32)(types, result)
        pairs = zip(words, types, strict=True)
        return [by_abi(word, of.size, is_64_bit=self._is_64_bit) for word, of in pairs]

    def _origin(self, entry: Any) -> Any:
        """Return the abstract origin of a function or a parameter: the one in the source."""
        for _ in range(_DEEPEST):
            if "DW_AT_abstract_origin" not in entry.attributes:
                break
            entry = self._take(entry.get_DIE_from_attribute("DW_AT_abstract_origin"))
        return entry

    def _parameters(self, entry: Any, name: str) -> tuple[list[Any], bool]:
        """List a function's parameters, and return whether it takes more than these."""
        found: list[Any] = []
        variadic = False
        for child in self._children(entry):
            variadic |= child.tag == "DW_TAG_unspecified_parameters"
            if child.tag == "DW_TAG_formal_parameter":
                if len(found) == _MOST_PARAMETERS:
                    raise SymbolError(f"{self.name}: {name} has more than {len(found)} parameters")
                found.append(child)
        return found, variadic

    def _type_of(self, entry: Any, depth: int = 0) -> Type:
        """Return the type that an entry refers to."""
        owner = self._owner(entry, "DW_AT_type")
        if owner is None:
            return VOID
        attribute = owner.attributes["DW_AT_type"]
        if attribute.form == "DW_FORM_ref_sig8":
            return self._type(find_type(owner.dwarfinfo, attribute.raw_value), depth)
        return self._type(owner.get_DIE_from_attribute("DW_AT_type"), depth)

    def _type(self, entry: Any, depth: int) -> Type:
        self._take(entry)
        if depth == _DEEPEST:
            raise SymbolError(f"{self.name}: a type refers to more than {_DEEPEST} others")
        tag, name = entry.tag, _name(entry)
        size = _number(entry, "DW_AT_byte_size") or 0
        if tag in ("DW_TAG_pointer_type", "DW_TAG_reference_type", "DW_TAG_rvalue_reference_type"):
            target = self._type_of(entry, depth + 1)
            star = "*" if tag == "DW_TAG_pointer_type" else "&"
            text = target.name + ("" if target.name.endswith(("*", "&")) else " ") + star
            is_text = target.name.removeprefix("const ") == "char"
            return Type(text, _WORD if self._is_64_bit else 4, "string" if is_text else "pointer")
        if tag in _QUALIFIERS:
            target = self._type_of(entry, depth + 1)
            if target.name.endswith("*"):
                return target._replace(name=f"{target.name}{_QUALIFIERS[tag]}")
            return target._replace(name=f"{_QUALIFIERS[tag]} {target.name}")
        if tag == "DW_TAG_typedef":
            target = self._type_of(entry, depth + 1)
            return target._replace(name=name or target.name)
        if tag == "DW_TAG_base_type":
            encoding = _number(entry, "DW_AT_encoding")
            kind = "signed" if encoding in _SIGNED else "unsigned"
            return Type(name, size, "float" if encoding in _FLOATING else kind)
        if tag == "DW_TAG_enumeration_type":
            return Type(f"enum {name}".strip(), size, "unsigned")
        if tag in _STRUCTURES:
            what = tag.removeprefix("DW_TAG_").removesuffix("_type").replace("ure", "")
            return Type(f"{what} {name}".strip(), size, "structure")
        if tag == "DW_TAG_subroutine_type":
            return Type("function", size, "structure")
        return Type(name or "?", size, "unsigned")


def _places_64(types: list[Type], result: Type) -> list[int | None]:
    """Return the word that each parameter begins in (System V ABI, AMD64, 3.2.3)."""
    registers = list(range(_REGISTER_WORDS))
    stack, floating = _REGISTER_WORDS, 8
    if result.kind == "structure" and result.size > 2 * _WORD:
        registers.pop(0)  # the address for the result
    found: list[int | None] = []
    known = True
    for one in types:
        words = max(-(-one.size // _WORD), 1)
        if one.kind == "structure" and words <= 2:
            known = False  # which registers it takes depends on its members
        if not known:
            found.append(None)
        elif one.kind == "float" and words == 1 and floating:
            floating -= 1
            found.append(None)
        elif one.kind not in ("structure", "float") and words <= len(registers):
            found.append(registers[0])
            del registers[:words]
        else:
            if words == 2 and one.kind != "structure":
                stack += stack % 2  # aligned to 16 bytes, as the first one is
            found.append(stack)
            stack += words
    return found


def _places_32(types: list[Type], result: Type) -> list[int | None]:
    """Return the word of each parameter; all are on the stack (System V ABI, Intel386)."""
    at = int(result.kind == "structure")
    found: list[int | None] = []
    for one in types:
        found.append(at)
        at += max(-(-one.size // 4), 1)
    return found


def _bounds(entry: Any) -> tuple[int | None, int]:
    low, high = _number(entry, "DW_AT_low_pc"), entry.attributes.get("DW_AT_high_pc")
    if low is None or high is None:
        return None, 0
    return low, high.value + (0 if high.form == "DW_FORM_addr" else low)


def _number(entry: Any, name: str) -> int | None:
    found = entry.attributes.get(name)
    return found.value if found is not None and isinstance(found.value, int) else None


def _name(entry: Any) -> str:
    found = entry.attributes.get("DW_AT_name")
    if found is None or not isinstance(found.value, bytes):
        return ""
    return found.value.decode("utf-8", "backslashreplace")
