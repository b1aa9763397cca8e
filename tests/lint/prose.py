# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds English that has to be read twice, in docs, docstrings, comments and messages.

    prose.py [FILE...]

Without files: all of the tree's pages and modules. Each line it prints names a place, the words,
and what to write instead. The exit status is 1 then.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
GENERATED = {
    "CHANGELOG.md",
    "xenaltp2m/abi/_ffi.py",
    "docs/performance-report.md",
    "docs/support.md",
}
"""Not read: generated pages, one of which lists tests by name, and the changelog."""
BANNED = {
    r"\banew\b": "again",
    r"\bbehind\b(?! (?:a|the|its|your|somebody's) back)": "after, or beyond",
    r"\b(?:is|are|was|were|be|been|being) told\b": "is reported; or name who reports",
    r"\btell(?:s|ing)? of\b": "report",
    r"\b(?:heard? of|hears? of|heard?|hears|hearing)\b": "receive, or subscribe to",
    r"\b(?:is|are|was|were|be|been|being) looked (?:at|for|whether|behind)\b": "is checked",
    r"\blook(?:s|ed)? whether\b": "check whether",
    r"\bin vain\b": "say what does not happen",
    r"\bcome(?:s)? upon\b": "hits",
    r"\bwho(?:ever)? (?:looks|hears|reads|asks|wants|tries)\b": "name the reader",
    r"\bwhat (?:is|are|was|were) in the way\b": "obstacles",
    r"\bof one's own\b": "your own",
    r"\bnobody (?:tells|hears|told|heard)\b": "say what is not reported",
    r"\b(?:lay|lays|laid) down\b": "detach",
    r"\b(?:take|takes|taken) up\b": "reattach",
    r"\bcarried (?:along|away|over)\b": "migrated",
    r"\bmerely\b": "only",
    r"\bhold(?:s)? on to\b": "keep",
    r"\bas it were\b": "",
    r"\bgo(?:es)? along\b": "follow",
}
"""By a pattern, what to write instead."""
PATTERNS = [(re.compile(pattern, re.IGNORECASE), better) for pattern, better in BANNED.items()]


def prose_of_page(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a page that are prose: code is neither in blocks nor in backticks."""
    is_code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not is_code:
            yield number, re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)


def prose_of_module(text: str) -> Iterator[tuple[int, str]]:
    """Yield a module's comments, and the strings that have words: docstrings, messages, helps."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            for offset, line in enumerate(node.value.splitlines()):
                yield node.lineno + offset, re.sub(r"`[^`]*`", "", line)


def findings(name: str) -> Iterator[str]:
    """Yield what is wrong with a file, named from the tree."""
    path = TREE / name
    text = path.read_text(encoding="utf-8")
    prose = prose_of_module(text) if path.suffix == ".py" else prose_of_page(text)
    for number, line in prose:
        for pattern, better in PATTERNS:
            for found in pattern.finditer(line):
                instead = f": {better}" if better else ""
                yield f"{name}:{number}: {found[0]!r}{instead}"


def main(names: list[str]) -> int:
    """Print what is wrong with files, and return the exit status."""
    if not names:
        listed = subprocess.run(
            ["git", "-C", str(TREE), "ls-files", "*.md", "xenaltp2m/*.py", "pytest_xenaltp2m.py"],
            capture_output=True,
            text=True,
            check=True,
        )
        names = [name for name in listed.stdout.split() if name not in GENERATED]
    found = [line for name in names for line in findings(name)]
    print("\n".join([*found, f"{len(found)} places"] if found else ["the prose is plain"]))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
