# SPDX-License-Identifier: LGPL-2.1-or-later
"""What README and docs have in blocks is done as it stands there, and their links lead somewhere.

A block's language says what becomes of it; no other language may be used, and none may be left out.

- ``python``: executed, each by itself, in the tree. One that begins with ``# NAME.py`` is saved
  under that name, too, for the page's commands.
- ``sh``: typed into a shell, the page's blocks one after another, in a copy of the tree, but for
  those whose first line says where they belong:

  - ``# on a dom0``: ``xenaltp2m`` and ``python3`` are a dom0's, on a mock host that has the guests
    and the files that the docs speak of; ``xl`` is looked at, and not done. On real Xen, in the
    lab, ``tests/live/test_docs.py`` types those whose guests are in ``examples/guest``; of the
    others real Xen has not seen these very lines.
  - ``# on Debian, as root``: builds or boots the lab. ``make`` says what it would do; of other
    programs the options must be some that they have.

  Nowhere does ``make`` do what would run these very tests; it says what it would do.
- ``text``: a drawing; or, right behind another block or with ``prints`` before it, what that has
  printed, where a line of three dots stands for any lines.
- ``c``, ``ini``: word for word from ``examples/guest``.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import xenaltp2m as xa

TREE = Path(__file__).resolve().parent.parent.parent
GUESTS = TREE / "examples" / "guest"
PAGES = sorted([*TREE.glob("*.md"), *(TREE / "docs").rglob("*.md")])
FENCE = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", re.MULTILINE)
DOM0, LAB = "# on a dom0", "# on Debian, as root"
FRESH = os.environ.get("XENALTP2M_FRESH") == "1"
"""Whether a copy of the tree sets itself up; else it uses what this one has, half a minute less."""


@dataclass(frozen=True)
class Block:
    page: Path
    language: str
    text: str
    before: str
    """What stands between it and the block before it."""
    number: int

    @property
    def place(self) -> str:
        """Where its commands belong."""
        first = self.text.partition("\n")[0]
        return first if first in {DOM0, LAB} else ""

    def __str__(self) -> str:
        where = {DOM0: "-dom0", LAB: "-lab"}.get(self.place, "")
        return f"{self.page.relative_to(TREE)}-{self.number}{where}"


def blocks_of(page: Path) -> list[Block]:
    text, end, found = page.read_text(encoding="utf-8"), 0, []
    for number, fence in enumerate(FENCE.finditer(text)):
        indent, language, content = fence.groups()
        content = re.sub(f"^{indent}", "", content, flags=re.MULTILINE)
        found.append(Block(page, language, content, text[end : fence.start()].strip(), number))
        end = fence.end()
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def page_name(page: Path) -> str:
    return str(page.relative_to(TREE))


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert len(BLOCKS) > 30
    for block in BLOCKS:
        known = {"python", "sh", "text", "c", "ini"}
        assert block.language in known, f"{block}: say what it is, one of {known}"
    fences = sum(
        len(re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)) for page in PAGES
    )
    assert fences == 2 * len(BLOCKS)


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_code_runs(
    block: Block, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(TREE)
    exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    for behind in blocks_of(block.page):
        if behind.number == block.number + 1 and is_output(behind):
            assert matches(behind.text, printed), printed


@pytest.mark.parametrize("block", of("c", "ini"), ids=str)
def test_quotations_are_of_the_guests(block: Block) -> None:
    suffix = {"c": ".c", "ini": ".cfg"}[block.language]
    sources = [path.read_text(encoding="utf-8") for path in GUESTS.glob(f"*{suffix}")]
    assert any(block.text in source for source in sources)


# Commands.

PREAMBLE = """
set -eu
make() {
    case "$*" in
        *test*|*check*) command make --dry-run "$@" >/dev/null ;;
        *) command make "$@" ;;
    esac
}
xl() { case "$1" in create|destroy|list|pause|unpause|save|restore) ;; *) return 64 ;; esac }
"""
LAB_PREAMBLE = """
set -eu
make() { command make --dry-run "$@" >/dev/null; }
python3() {
    program=$1; shift
    known=$("$PYTHON" "$program" --help)
    for word; do
        [ "$word" != -- ] || break
        option=${word%%=*}
        case "$option" in --*) case "$known" in *"$option"*) ;; *) return 64 ;; esac ;; esac
    done
}
"""
END = "=-=-= end of block =-=-="


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, as a clone is."""
    copy = tmp_path_factory.mktemp("docs") / "xenaltp2m"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "results")
    shutil.copytree(TREE, copy, ignore=ignored)
    if not FRESH:
        environment = copy / ".venv"
        environment.mkdir()
        for path in Path(sys.prefix).iterdir():
            (environment / path.name).symlink_to(path)
        (environment / ".ready").unlink(missing_ok=True)
        (environment / ".ready").touch()
    return copy


def files_the_docs_speak_of(place: Path) -> None:
    with xa.connect("mock") as xen, xen.domain("guest") as dom, dom.altp2m() as altp2m:
        altp2m.create_view(label="hooks").set_access(0x100, xa.Access.R)
        for name in ("views.json", "other.json"):
            (place / name).write_bytes(xa.capture(altp2m).to_bytes())
    names = "do_sys_openat2", "ksys_write"
    added = [f"--add-symbol={name}=.target:0,global,function" for name in names]
    for name in ("kallsyms", "vmlinux"):
        subprocess.run(["objcopy", *added, GUESTS / "paged.elf", place / name], check=True)
    for image in GUESTS.glob("*.elf"):
        shutil.copy(image, place)


def typed(blocks: list[Block], tree: Path, place: str) -> list[str]:
    """Type blocks into one shell; return what each printed."""
    programs = tree / "programs"
    programs.mkdir(exist_ok=True)
    path = os.environ["PATH"]
    if not any(". .venv/bin/activate" in block.text for block in blocks):
        path = f"{sys.prefix}/bin:{path}"
    preamble = LAB_PREAMBLE if place == LAB else PREAMBLE
    files_the_docs_speak_of(tree)
    if place == DOM0:
        for name, command in (("xenaltp2m", ""), ("python3", "--script")):
            program = programs / name
            dom0 = TREE / "tests" / "examples" / "dom0.py"
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{dom0}" {command} "$@"\n')
            program.chmod(0o755)
        path = f"{programs}:{path}"
    # A make that runs these tests is not the one that is typed.
    environment = {name: text for name, text in os.environ.items() if "MAKE" not in name}
    script = preamble + "".join(f"{block.text}\necho; echo '{END}'\n" for block in blocks)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tree,
        env=environment | {"PATH": path, "PYTHON": sys.executable, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout.split(f"\n{END}\n")[:-1]


def is_output(block: Block) -> bool:
    """Whether a block shows what the one before it printed."""
    is_behind = not block.before or block.before.endswith("prints")
    return block.language == "text" and block.number > 0 and is_behind


def matches(shown: str, printed: str) -> bool:
    """Whether something was printed so, where a line of three dots stands for any lines."""
    parts = [re.escape(part) for part in re.split(r"^\.\.\.\n", shown, flags=re.MULTILINE)]
    return re.fullmatch("(?:.*\n)*".join(parts), printed.rstrip("\n") + "\n") is not None


@pytest.mark.parametrize("place", ["", DOM0, LAB], ids=["here", "dom0", "lab"])
@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_do_what_they_should(page: Path, place: str, tree: Path) -> None:
    blocks = blocks_of(page)
    commands = [block for block in blocks if block.language == "sh" and block.place == place]
    for block in blocks:
        named = re.match(r"# (\w+\.py)\n", block.text)
        if block.language == "python" and named:
            (tree / named[1]).write_text(block.text)
    printed = dict(zip(commands, typed(commands, tree, place), strict=True)) if commands else {}
    for block, after in zip(blocks[1:], blocks, strict=False):
        if is_output(block) and after in printed:
            assert matches(block.text, printed[after]), f"{block}:\n{printed[after]}"


def test_a_difference_of_what_is_printed_is_noticed() -> None:
    assert matches("a\n...\nd\n", "a\nb\nc\nd\n")
    assert matches("a\n...\nd\n", "a\nd\n")
    assert not matches("a\n...\nd\n", "a\nb\nc\n")
    assert not matches("a\nc\n", "a\nb\nc\n")
    assert not matches("a.b\n", "axb\n")


# Links.


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code-hosting sites make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith("https:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(TREE), link
        assert target.exists(), link
        if anchor:
            assert target.suffix == ".md", link
            assert anchor in anchors(target), link


def test_links_elsewhere_are_listed_in_one_place() -> None:
    """They cannot be tried where there is no network: each is to be seen, and tried, there."""
    listing = TREE / "docs" / "elsewhere.md"
    urls = {page: set(re.findall(r"\w+://[^\s)>`\"]+", page.read_text())) for page in PAGES}
    listed = urls.pop(listing)
    assert set().union(*urls.values()) <= listed
    for url in listed:
        assert re.fullmatch(r"https://[a-z0-9.-]+\.[a-z]+(/[\w./%#~=?&+-]*)?", url), url


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_proofs_that_are_named_are_there(page: Path) -> None:
    for path, name in re.findall(r"`([\w/]+\.py)::(\w+)`", page.read_text(encoding="utf-8")):
        source = (TREE / path).read_text(encoding="utf-8")
        assert re.search(rf"(def|class) {name}\b", source), f"{path}::{name}"
    for path in re.findall(r"`((?:tests|docs|examples|xenaltp2m)/[\w/.-]+)`", page.read_text()):
        assert (TREE / path).exists(), path


SPANS = [
    pytest.param(span, id=f"{page_name(page)}-{span}")
    for page in PAGES
    for span in sorted(set(re.findall(r"`((?:make|xenaltp2m) [^`]+)`", page.read_text())))
]


@pytest.mark.parametrize("span", SPANS)
def test_commands_in_a_sentence_are_some_that_there_are(span: str) -> None:
    """Here the targets, the commands and their options; blocks have commands that are done."""
    program, *words = re.sub(r"--(connect|xen) \S+", "", span).split()
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (TREE / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words if "=" not in word} <= set(targets)
        return
    command = [word for word in words if re.fullmatch("[a-z]+", word)][:1]
    done = subprocess.run(
        [sys.executable, "-m", "xenaltp2m", *command, "--help"],
        cwd=TREE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert option in done.stdout


def test_the_errors_page_is_up_to_date() -> None:
    """What is on it is compared with what the mock refuses in tests/unit/test_errors.py."""
    subprocess.run([sys.executable, "docs/site/errors_page.py", "--check"], cwd=TREE, check=True)


def test_the_support_page_is_up_to_date() -> None:
    """As far as it needs no lab: what each release has, and the recorded answers."""
    command = [sys.executable, "tests/lab/support.py", "--check"]
    environment = os.environ | {"PYTHONPATH": str(TREE)}
    subprocess.run(command, cwd=TREE, env=environment, check=True)


def test_the_picture_of_views_is_up_to_date() -> None:
    """The same run, drawn again."""
    make = runpy.run_path(str(TREE / "docs" / "pictures" / "make.py"))
    assert make["views"]() == (TREE / "docs" / "pictures" / "views.svg").read_text()
