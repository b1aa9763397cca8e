# SPDX-License-Identifier: LGPL-2.1-or-later
"""``trace``: print a line for each call of a guest's functions."""

from __future__ import annotations

import argparse
import json
import math
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import xenaltp2m as xa
from xenaltp2m.cli.arguments import (
    add_accept,
    add_count,
    add_domain,
    add_duration,
    add_repeated,
    number_among,
    seconds,
    until,
)
from xenaltp2m.cli.console import Console, Table, printable
from xenaltp2m.cli.host import StopRequest, begin, connect, is_altp2m_active, note_undone
from xenaltp2m.cli.pages import counted
from xenaltp2m.cli.run_limits import RunLimits
from xenaltp2m.handles.memory import AddressSpace
from xenaltp2m.tools.symbols import Image, Symbols
from xenaltp2m.tools.symbols.prototypes import Parameter, Prototype, Prototypes, Type
from xenaltp2m.tools.tracing import Call, Return, Seen, Trace

SUMMARY = "trace calls of a guest's functions: a line for each call, then undo everything"

KEYS = """\
Each function gets a breakpoint that the guest cannot see: int3 in a copy of its page, which is
executed and never read. No vCPU waits except the one that calls.

A FUNCTION is a name in the file of --symbols, or name+0x10. Its arguments are shown by the file's
debugging information (DWARF), if it has some; ? stands for an unknown value. Without debugging
information, or to override it, add
  :3        three words, in hexadecimal
  :d,s,x    the first as a signed number, the second as the text it points to, the third in
            hexadecimal; u is an unsigned number
Numbers have 8 bytes, in a 32-bit guest 4.

A line has: seconds since the start, vCPU, the call, the place it was called from. With --returns,
another line shows the return value and the duration.

A vCPU's MSR_LSTAR shows where KASLR has put the kernel, if the file has entry_SYSCALL_64; otherwise
--slide gives the distance.

Before anything is changed, the guest's memory is compared with the file: the functions' code, else
the build id, or the kernel's banner and its table of system calls. A file that does not match, or
cannot be compared, is refused, unless --trust-symbols is given.

It ends after --duration or --count, with the domain, on Ctrl-C or SIGTERM, and when its output is
closed; all of these undo everything.

--json prints one object in a line for each call:
  time         Unix time
  event        "call", or "return" with --returns; last "DomainEnded" if the domain has ended
  function, vcpu, cr3
  arguments    {name or number: number, text, or null if unknown}
  caller       the return address, or null; caller_symbol the symbol it lies in, or null
  value, seconds    of a return: its value, or null, and the duration of the call
and a last line {"summary": {...}}:
  calls, seconds, rate    in all
  busy         the part of the time spent in this program, with a vCPU waiting, from 0 to 1
  dropped      calls not reported because of --rate
  waiting      calls that had not returned at the end
  unfinished   calls whose return was given up: longjmp has left them, or there were too many
  reapplied    pages that Xen had reset, and that were restored
  by_function  {name: calls}
"""

_TICK_SECONDS = 0.25
_VERIFY_SECONDS = 5.0
_LINES_AT_ONCE = 200
_TEXT_LIMIT = 80
_KINDS = {"x": "pointer", "d": "signed", "u": "unsigned", "s": "string"}
_SMALL = 1 << 12
"""Unsigned numbers from this one on are shown in hexadecimal."""
_MOST_WORDS = 32
_WORD = Type("", 0, "word")
"""A value of unknown type: a small negative number is shown as one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.set_defaults(usage_error=parser.error)
    add_domain(parser)
    parser.add_argument(
        "functions", type=_wanted, nargs="+", metavar="FUNCTION[:ARGUMENTS]",
        help="a function, and how to show its arguments",
    )  # fmt: skip
    parser.add_argument(
        "--symbols", required=True, metavar="FILE",
        help="ELF image, System.map, or a copy of the guest's /proc/kallsyms",
    )  # fmt: skip
    parser.add_argument(
        "--slide", type=_slide, metavar="N", help="how far KASLR has moved the kernel, in bytes"
    )
    parser.add_argument(
        "--trust-symbols", action="store_true",
        help="do not compare the file with the guest's memory first",
    )  # fmt: skip
    parser.add_argument("--returns", action="store_true", help="report returns, too")
    what = "report only calls with these page tables"
    add_repeated(parser, "--only-cr3", "cr3", "N", what, type=_cr3)
    parser.add_argument(
        "--rate",
        type=seconds,
        metavar="N",
        help="report so many calls per second; count the rest",
    )
    parser.add_argument(
        "--top", action="store_true",
        help="instead of lines, show a table of calls by function, in place",
    )  # fmt: skip
    parser.add_argument(
        "--toggle", action="store_true", help="use single-steps that Xen reports: slower"
    )
    add_duration(parser)
    add_count(parser, "calls")
    add_accept(parser)


def _wanted(text: str) -> tuple[str, Prototype | None]:
    """Parse a function, and the arguments to show."""
    name, colon, kinds = text.rpartition(":")
    if not colon:
        return text, None
    letters = kinds.split(",")
    if kinds.isdecimal():
        letters = ["x"] * min(int(kinds), _MOST_WORDS + 1)
    if not name or len(letters) > _MOST_WORDS or not set(letters) <= _KINDS.keys():
        raise argparse.ArgumentTypeError(
            f"{text!r}: after the name, give a number up to {_MOST_WORDS}, or letters of x, d, "
            "u and s separated by commas"
        )
    parameters = tuple(
        Parameter("", Type("", 0, _KINDS[letter]), word) for word, letter in enumerate(letters)
    )
    return name, Prototype(name, parameters, _WORD)


def _slide(text: str) -> int:
    return number_among(text, range(1 << 63), "a number of bytes")


def _cr3(text: str) -> int:
    return number_among(text, range(1 << 64), "a value of CR3")


def run(options: argparse.Namespace, console: Console) -> None:
    """Run the command."""
    if options.top and console.as_json:
        options.usage_error("--top prints a table, which --json excludes")
    if options.rate == 0:
        options.usage_error("--rate 0 would report no call")
    symbols = Symbols.open(options.symbols)
    image = symbols if isinstance(symbols, Image) else None
    prototypes = _prototypes(options, symbols, console)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        xen = stack.enter_context(connect(options, console, image, start=False))
        domain = stack.enter_context(xen.domain(options.domain))
        symbols = _slid(options, domain, symbols)
        for name in prototypes:
            symbols.address(name)  # before anything is changed
        was_active = is_altp2m_active(domain, console)
        stop.hold_back()
        trace = stack.enter_context(
            Trace(
                domain,
                *prototypes,
                symbols=symbols,
                arguments={name: one.words for name, one in prototypes.items() if one is not None},
                returns=options.returns,
                cr3=options.cr3 or None,
                most_per_second=options.rate,
                fast=not options.toggle,
                accept=options.accept,
                trust=options.trust_symbols,
            )
        )
        stop.wake = trace.stop
        _tell_start(options, console, domain, symbols, prototypes)
        course = RunLimits(options, domain.xen.backend.clock, "call")
        teller = _Teller(options, console, course, symbols, prototypes, trace, stop)
        begin(options)
        teller.listen()
    undone = "breakpoints removed", "vCPUs moved back", "monitor closed"
    note_undone(console, *undone, was_active=was_active)
    teller.sum_up()


def _prototypes(
    options: argparse.Namespace, symbols: Symbols, console: Console
) -> dict[str, Prototype | None]:
    """Return the prototype of each function, from the arguments or the file."""
    found: dict[str, Prototype | None] = dict(options.functions)
    unknown = [name for name, prototype in found.items() if prototype is None]
    if isinstance(symbols, Image) and unknown:
        try:
            with Prototypes.open(options.symbols) as described:
                for name in unknown:
                    found[name] = described.at(symbols.address(name))
        except xa.SymbolError as error:
            console.note(f"Arguments are not shown: {error.message.splitlines()[0]}.")
    return found


def _slid(options: argparse.Namespace, domain: xa.Domain, symbols: Symbols) -> Symbols:
    """Return the symbols with the guest's slide."""
    if options.slide is not None:
        return symbols.slid(options.slide)
    return symbols.in_guest(domain.registers())


def _tell_start(
    options: argparse.Namespace,
    console: Console,
    domain: xa.Domain,
    symbols: Symbols,
    prototypes: dict[str, Prototype | None],
) -> None:
    shown = [
        name if prototype is None or prototype.result is _WORD else str(prototype)
        for name, prototype in prototypes.items()
    ]
    slide = f", moved by {symbols.slide:#x}" if symbols.slide else ""
    console.note(
        f"Tracing domain {domain.domid} ({domain.name}) {until(options, 'call')}{slide}: "
        f"{'; '.join(shown)}"
    )


class _Teller:
    """Prints and counts calls."""

    def __init__(
        self,
        options: argparse.Namespace,
        console: Console,
        course: RunLimits,
        symbols: Symbols,
        prototypes: dict[str, Prototype | None],
        trace: Trace,
        stop: StopRequest,
    ) -> None:
        self._console = console
        self._symbols = symbols
        self._prototypes = prototypes
        self._trace = trace
        self._stop = stop
        self._course = course
        self._top = options.top
        self._lines: list[str] = []
        self._next_tick = 0.0
        self._next_check = _VERIFY_SECONDS
        self._rates: dict[str, tuple[float, int]] = {}
        self._final: tuple[Counter[str], int] | None = None

    # Events.

    def listen(self) -> None:
        """Print calls until a limit is reached."""
        trace = self._trace
        while not self._stop.came and trace.ended is None and (left := self._course.left) > 0:
            tick = min(left, _TICK_SECONDS)
            trace.run(self._take, tick, seconds=tick)
            self._tick()
        self._course.end()
        if trace.ended is not None:
            self._lines.append(self._of_end(trace.ended))
        self._flush()
        self._console.status("")

    def _take(self, seen: Seen) -> None:
        if self._course.left <= 0:
            self._trace.stop()
            return
        if isinstance(seen, Call):
            self._course.told += 1
            if self._course.left <= 0:  # other vCPUs may have called already
                self._final = self._trace.hits.copy(), self._trace.dropped
        if not self._top:
            line = self._document(seen) if self._console.as_json else self._text(seen)
            self._lines.append(line)
        if self._course.left <= 0:
            self._trace.stop()
        if len(self._lines) >= _LINES_AT_ONCE:
            self._flush()

    def _tick(self) -> None:
        now = self._course.passed
        self._flush()
        if now < self._next_tick:
            return
        self._next_tick = now + _TICK_SECONDS
        if self._top:
            self._print(partial(self._console.in_place, self._table(rates=True)))
        else:
            status = self._course.status(self._trace.hits.total())
            self._print(partial(self._console.status, status))
        if now >= self._next_check:
            self._next_check = now + _VERIFY_SECONDS
            before = self._trace.reapplied
            self._trace.verify()
            if again := self._trace.reapplied - before:
                self._console.warn(
                    f"{counted(again, 'page')} had lost the breakpoints for a while: Xen has "
                    "reset views, because the host p2m changed; calls may be missing"
                )

    def _flush(self) -> None:
        if self._lines:
            text = "\n".join(self._lines)
            self._lines.clear()
            self._print(partial(self._console.line, text))

    def _print(self, act: Callable[[], None]) -> None:
        self._stop.printing(act)
        if self._stop.came:
            self._trace.stop()

    # Output.

    def _text(self, seen: Seen) -> str:
        head = f"{seen.time:11.6f}  vCPU {seen.vcpu}  "
        if isinstance(seen, Return):
            prototype = self._prototypes[seen.call.name]
            result = _WORD if prototype is None else prototype.result
            value = "" if result.kind == "void" else f" = {self._returned(seen, result)}"
            took = 1e3 * (seen.time - seen.call.time)
            return f"{head}{printable(seen.call.name)} returned{value}  ({took:.3f} ms)"
        shown = ", ".join(f"{name}={text}" if name else text for name, text in self._shown(seen))
        if self._prototypes[seen.name] is None:
            shown = "?"
        place = "" if seen.caller is None else f"  from {self._place(seen.caller)}"
        return f"{head}{printable(seen.name)}({shown}){place}"

    def _document(self, seen: Seen) -> str:
        told: dict[str, Any] = {"time": round(time.time(), 6)}
        if isinstance(seen, Return):
            told |= {
                "event": "return", "function": seen.call.name, "vcpu": seen.vcpu,
                "cr3": seen.call.cr3, "value": self._result(seen),
                "seconds": round(seen.time - seen.call.time, 6),
            }  # fmt: skip
        else:
            caller = None if seen.caller is None else self._symbols.locate(seen.caller)
            told |= {
                "event": "call", "function": seen.name, "vcpu": seen.vcpu, "cr3": seen.cr3,
                "arguments": {
                    name or str(number): value
                    for number, (name, value) in enumerate(self._values(seen))
                },
                "caller": seen.caller,
                "caller_symbol": None if caller is None else str(caller),
            }  # fmt: skip
        return json.dumps(told)

    def _of_end(self, ended: xa.DomainEnded) -> str:
        if not self._console.as_json:
            return f"{self._course.passed:11.6f}  {ended}"
        told = {"time": round(time.time(), 6), "event": "DomainEnded"}
        return json.dumps(told | {"shutdown_reason": ended.shutdown_reason})

    def _parameters(self, call: Call) -> Iterator[tuple[Parameter, int | float | None]]:
        prototype = self._prototypes[call.name]
        width = call.registers.word_size
        for one in () if prototype is None else prototype.parameters:
            raw = one.read(call.registers, call.arguments)
            yield one, None if raw is None else _number(raw, one.type, width)

    def _values(self, call: Call) -> Iterator[tuple[str, int | float | str | None]]:
        """Yield the arguments' names and values for JSON."""
        space = self._trace.address_space(call)
        for one, number in self._parameters(call):
            value: int | float | str | None = number
            if isinstance(number, int) and one.type.kind == "string":
                text = _read_text(space, number)
                value = number if text is None else text
            elif isinstance(number, float) and not math.isfinite(number):
                value = str(number)  # JSON has no such numbers
            yield one.name, value

    def _result(self, back: Return) -> int | float | None:
        """Return a call's return value; None if it is in no known register."""
        prototype = self._prototypes[back.call.name]
        of = _WORD if prototype is None else prototype.result
        if of is _WORD:
            return back.value
        width = back.registers.word_size
        is_elsewhere = of.kind in ("float", "structure") or of.size > 2 * width
        if is_elsewhere or ".isra" in back.call.name:  # which may return nothing (gcc, IPA-SRA)
            return None
        raw = back.value
        if of.size > width:
            raw |= (back.registers.rdx & (1 << 8 * width) - 1) << 8 * width
        return _number(raw, of, width)

    def _returned(self, back: Return, of: Type) -> str:
        value = self._result(back)
        if of is _WORD:
            value = _number(back.value, of, back.registers.word_size)
        return "?" if value is None else self._number(value, of)

    def _shown(self, call: Call) -> Iterator[tuple[str, str]]:
        """Yield the arguments' names and values as text."""
        space = self._trace.address_space(call)
        for one, value in self._parameters(call):
            shown = "?"
            if one.type.kind == "structure" and one.word is not None:
                shown = "{...}"
            elif value is not None:
                is_text = one.type.kind == "string" and isinstance(value, int)
                text = _read_text(space, int(value)) if is_text else None
                shown = self._number(value, one.type) if text is None else _quoted(text)
            yield printable(one.name), shown

    def _number(self, value: float, of: Type) -> str:
        if isinstance(value, float):
            return f"{value:g}"
        if of.kind == "pointer" and (found := self._symbols.locate(value)) is not None:
            return f"{value:#x} ({printable(str(found))})"
        decimal = of.kind == "signed" or (of.kind != "pointer" and value < _SMALL)
        return str(value) if decimal else f"{value:#x}"

    def _place(self, address: int) -> str:
        found = self._symbols.locate(address)
        return f"{address:#x}" if found is None else printable(str(found))

    # Counting.

    @property
    def _counts(self) -> tuple[Counter[str], int]:
        """Return the calls of each function until the end, and the number of dropped calls."""
        return self._final or (self._trace.hits, self._trace.dropped)

    def _table(self, *, rates: bool = False) -> Table:
        rows = []
        hits, _ = self._counts
        for name, calls in hits.most_common():
            rate = self._rate(name, calls) if rates else self._course.rate(calls)
            rows.append((name, str(calls), f"{rate:.0f}"))
        title = self._course.title(hits.total())
        return Table(("function", "calls", "per second"), rows, title=title)

    def _rate(self, name: str, calls: int) -> float:
        """Return the calls per second since the last tick."""
        now = self._course.passed
        then, before = self._rates.get(name, (0.0, 0))
        self._rates[name] = now, calls
        return (calls - before) / (now - then) if now > then else 0.0

    def sum_up(self) -> None:
        """Print the summary: the number of calls, by function."""
        trace, passed = self._trace, self._course.passed
        hits, dropped = self._counts
        total = hits.total()
        busy = min(trace.busy / passed, 1.0) if passed > 0 else 0.0
        if self._console.as_json:
            document = {
                "calls": total,
                "seconds": round(passed, 6),
                "rate": round(self._course.rate(total), 3),
                "busy": round(busy, 6),
                "dropped": dropped,
                "waiting": trace.waiting,
                "unfinished": trace.unfinished,
                "reapplied": trace.reapplied,
                "by_function": dict(hits),
            }
            self._console.line(json.dumps({"summary": document}))
            return
        self._console.line("")
        self._console.table(self._table())
        more = [f"{100 * busy:.0f} % of the time in handlers"]
        more += [f"{dropped} dropped by --rate"] if dropped else []
        more += [f"{trace.waiting} not returned yet"] if trace.waiting else []
        more += [f"{trace.unfinished} left without a return"] if trace.unfinished else []
        more += [f"{counted(trace.reapplied, 'page')} restored"] if trace.reapplied else []
        self._console.line(", ".join(more))


def _number(raw: int, of: Type, width: int) -> int | float | None:
    """Interpret a word as a value of a type; a type of size 0 has ``width`` bytes."""
    size = of.size or width
    raw &= (1 << 8 * size) - 1
    if of.kind == "float":
        code = {4: "<f", 8: "<d"}.get(size)
        return None if code is None else float(struct.unpack(code, raw.to_bytes(size, "little"))[0])
    is_negative = (of.kind == "signed" and raw >> 8 * size - 1) or (
        of.kind == "word" and raw >= (1 << 8 * size) - _SMALL
    )
    return raw - (1 << 8 * size) if is_negative else raw


def _read_text(space: AddressSpace, address: int) -> str | None:
    try:
        found = space.read_string(address, _TEXT_LIMIT + 1)
    except (xa.NotMappedError, xa.InvalidArgumentError):
        return None
    return found.decode("utf-8", "backslashreplace")


def _quoted(text: str) -> str:
    more = "..." if len(text) > _TEXT_LIMIT else ""
    return json.dumps(text[:_TEXT_LIMIT]) + more
