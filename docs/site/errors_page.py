# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes docs/errors.md from what knows the errors: xenaltp2m/errors.py, and the recorded answers.

    errors_page.py [--check]

``--check`` writes nothing, and fails where the page is not what it should be.
"""

from __future__ import annotations

import argparse
import errno
import inspect
import json
import lzma
import sys
from collections import defaultdict
from pathlib import Path

from xenaltp2m import errors

TREE = Path(__file__).resolve().parent.parent.parent
PAGE = TREE / "docs" / "errors.md"
TRACES = TREE / "tests" / "lab" / "traces"
FAMILIES = {
    "altp2m": "Each `altp2m_` operation",
    "monitor": "Each `monitor_` operation",
    "*": "Every operation",
}
"""What an operation has that has no cause of its own for an errno; the last goes for all."""

HEAD = """# Errors

Written by `make docs` from `xenaltp2m/errors.py`; do not edit.

Every error that this package raises on purpose is a `XenError`, and an `OSError`. Its message gives
the operation, Xen's errno, and the likely causes, each with its cure:

```python
import xenaltp2m as xa

with xa.connect("mock") as xen, xen.domain("guest") as dom, dom.altp2m() as altp2m:
    try:
        while True:
            altp2m.create_view()
    except xa.XenError as error:
        print(error)
```

```text
altp2m_create_view (domain 1): EINVAL, Invalid argument
  likely causes:
    1. no view is left: 10 with view 0 up to Xen 4.20, then altp2m_count in xl.cfg
    2. an access that this release does not support: r_pw needs Xen 4.20
    3. the domain was created without altp2m: add altp2m="external" to its xl.cfg and recreate it
```

`error.op` is the operation, `error.errno` Xen's number, `error.hint` the causes; `error.domid`,
`error.view`, `error.gfn` and `error.vcpu` identify its object. The command line prints the same.

"""
BY_OPERATION = """## By operation

Xen uses one errno for several causes. The causes are listed with the likeliest first. The operation
is the C name without `xc_`. The checks common to all calls are in
[semantics.md](semantics.md#checks-common-to-all-calls). The last column names the releases of real
Xen that returned this errno in recorded random calls
([support.md](support.md#the-mock-against-real-xen)); the mock returns the same errno.

"""


def name_of(number: int) -> str:
    """Return an errno's name, as Xen has it."""
    name = errno.errorcode[number]
    return "EOPNOTSUPP" if name == "ENOTSUP" else name


def table(head: list[str], rows: list[list[str]]) -> str:
    """Write a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines) + "\n"


def classes() -> str:
    """List the errors, with what Python calls them and which errno raises them."""
    numbers: dict[type[errors.XenError], list[str]] = defaultdict(list)
    for number in sorted(errno.errorcode):
        for gfn in (None, 0):
            kind = type(errors.from_errno("", number, gfn=gfn))
            if kind is not errors.XenError and name_of(number) not in numbers[kind]:
                numbers[kind].append(name_of(number))
    rows = []
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, errors.XenError):
            builtin = ", ".join(f"`{base.__name__}`" for base in kind.__bases__[1:]) or "`OSError`"
            what = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
            rows.append([f"`{name}`", builtin, ", ".join(numbers[kind]), what])
    head = ["error", "also caught as", "errno", "meaning"]
    return f"## By class\n\n{table(head, rows)}"


def recorded() -> dict[tuple[str, int], list[str]]:
    """Tell which releases of real Xen refused what, in the recorded answers."""
    found: dict[tuple[str, int], list[str]] = defaultdict(list)
    for path in sorted(TRACES.glob("*.jsonl.xz")):
        release = path.name.split("-")[1].rpartition(".")[0]
        refusals = set()
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                steps = json.loads(line)["steps"]
                refusals |= {(op, number) for op, _, _, number, _ in steps if number}
        for refusal in refusals:
            found[refusal].append(release)
    return found


def operations() -> str:
    """List what each operation is refused with, and why."""
    seen = recorded()
    known = {op for op, _ in [*errors.HINTS, *seen]} - set(FAMILIES)
    text = ""
    for op in [*sorted(known), *FAMILIES]:
        listed = {number for name, number in [*errors.HINTS, *seen] if name == op}
        rows = []
        for number in sorted(listed, key=name_of):
            first, *others = errors.hint(op, number) or ("",)
            rows.append([name_of(number), first, ", ".join(seen.get((op, number), ()))])
            rows += [["", other, ""] for other in others]
        shown = 3 if any(releases for *_, releases in rows) else 2
        head = ["errno", "likely cause, and cure", "seen on"]
        if rows:
            title = FAMILIES.get(op, f"`{op}`")
            text += f"### {title}\n\n{table(head[:shown], [row[:shown] for row in rows])}"
    return text


def page() -> str:
    """Return the page."""
    return f"{HEAD}{classes()}{BY_OPERATION}{operations()}".rstrip("\n") + "\n"


def main() -> int:
    """Write it, or check it."""
    parser = argparse.ArgumentParser(description="Write docs/errors.md.")
    parser.add_argument("--check", action="store_true", help="fail where it is not up to date")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        print("docs/errors.md is not up to date: make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
