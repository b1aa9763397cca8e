# SPDX-License-Identifier: LGPL-2.1-or-later
"""The documentation is built as a site without a warning; what is on it is whole."""

from __future__ import annotations

import importlib
import runpy
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree as ET

import pytest

import xenaltp2m
from tests.examples.test_docs import PAGES, TREE

PICTURES = sorted((TREE / "docs" / "pictures").glob("*.svg"))


class Page(HTMLParser):
    """What a page has: places to go to, and where its links go."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.parts: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            self.ids.add(str(values["id"]))
        if tag == "a" and values.get("href"):
            self.links.append(str(values["href"]))
        if tag == "img":
            self.images.append(values)
        if tag in {"img", "script"} and values.get("src"):
            self.parts.append(str(values["src"]))
        if tag == "link" and values.get("rel") == "stylesheet":
            self.parts.append(str(values["href"]))


@pytest.fixture(scope="module")
def site() -> Path:
    """The site, as ``make docs`` leaves it."""
    done = subprocess.run(
        [sys.executable, "docs/site/build.py"],
        cwd=TREE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    target = TREE / "build" / "docs" / "html"
    assert done.stdout == f"{target / 'index.html'}\n"
    return target


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def test_links_lead_to_pages_and_places_on_them(pages: dict[Path, Page]) -> None:
    count = 0
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme:
                assert url.scheme == "https", f"{path}: {link}"
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            assert target.is_file(), f"{path}: {link}"
            if url.fragment:
                assert unquote(url.fragment) in pages[target].ids, f"{path}: {link}"
            count += 1
    assert count > 1000


def test_nothing_is_fetched_from_elsewhere(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for part in page.parts:
            url = urlsplit(part)
            assert url.scheme == url.netloc == "", f"{path}: {part}"
            assert (path.parent / unquote(url.path)).is_file(), f"{path}: {part}"


def test_every_page_is_reached_from_the_first(site: Path, pages: dict[Path, Page]) -> None:
    linked = {site / "index.html"} | {
        (site / unquote(urlsplit(link).path)).resolve()
        for link in pages[site / "index.html"].links
        if not urlsplit(link).scheme
    }
    for page in PAGES:
        name = "index" if page.name == "README.md" else page.relative_to(TREE).with_suffix("")
        assert site / f"{name}.html" in linked, page


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]  # after lines of comments
    lines = [line.split() for line in zlib.decompress(packed).decode().splitlines()]
    known = {name for name, kind, *_ in lines if kind.startswith("py:")}
    missing = {f"xenaltp2m.{name}" for name in xenaltp2m.__all__} - known
    build = runpy.run_path(str(TREE / "docs" / "site" / "build.py"))
    public = [name for name in build["PUBLIC"] if name.split(".")[-1] not in build["EXPORTED_ONLY"]]
    assert {"testing", "backend.mock", "tools.rescue", "tools.symbols.tables"} <= set(public)
    for name in public:
        module = importlib.import_module(f"xenaltp2m.{name}")
        own = {
            member
            for member, value in vars(module).items()
            if member[0] != "_" and getattr(value, "__module__", "") == module.__name__
            if isinstance(value, type) or hasattr(value, "__code__")
        }
        own |= set(getattr(module, "__all__", ()))
        missing |= {f"xenaltp2m.{name}.{each}" for each in own - set(xenaltp2m.__all__)} - known
    assert missing == set()


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_pictures_are_drawings_that_say_what_they_show(picture: Path) -> None:
    drawing = ET.parse(picture).getroot()
    names = [element.tag.rpartition("}")[2] for element in drawing.iter()]
    assert names[0] == "svg"
    assert drawing.get("aria-label") or {"title", "desc"} <= set(names)
    assert not {"script", "image", "foreignObject", "a"} & set(names)
    ids = [element.get("id") for element in drawing.iter() if element.get("id")]
    assert len(ids) == len(set(ids))


def test_images_have_words_for_who_cannot_see_them(pages: dict[Path, Page]) -> None:
    shown = [image for page in pages.values() for image in page.images]
    assert len(shown) >= len(PICTURES)
    assert all(image.get("alt") for image in shown)
