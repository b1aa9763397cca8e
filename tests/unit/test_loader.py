# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which library is opened, and what is said when none can be. No Xen, no library, no C."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

from xenaltp2m.abi.releases import SUPPORTED
from xenaltp2m.backend.libxc.loader import ENVIRONMENT, Library, Loader, mismatch
from xenaltp2m.errors import LibraryError

NEWEST = SUPPORTED[-1]


class Linker:
    """A dynamic linker that knows some files, and remembers what it was asked for."""

    def __init__(self, present: Collection[str] = ()) -> None:
        self.present = present
        self.asked: list[str] = []

    def __call__(self, name: str) -> str:
        self.asked.append(name)
        if name in self.present:
            return f"<{name}>"
        raise OSError(
            f"cannot load library '{name}': {name}: cannot open shared object file: "
            "No such file or directory"
        )


def sysfs(root: Path, major: str = "4", minor: str = "17") -> Path:
    version = root / "sys" / "version"
    version.mkdir(parents=True)
    (version / "major").write_text(f"{major}\n")
    (version / "minor").write_text(f"{minor}\n")
    return root / "sys"


def no_sysfs(root: Path) -> Path:
    return root / "nothing"


# The hypervisor.


def test_the_kernel_tells_the_hypervisors_release(tmp_path: Path) -> None:
    assert Loader(Linker(), {}, sysfs(tmp_path, "4", "17")).hypervisor_version() == (4, 17)


def test_no_hypervisor(tmp_path: Path) -> None:
    assert Loader(Linker(), {}, no_sysfs(tmp_path)).hypervisor_version() is None


@pytest.mark.parametrize("minor", ["", "seventeen", "1.7"])
def test_a_kernel_that_talks_nonsense(minor: str, tmp_path: Path) -> None:
    assert Loader(Linker(), {}, sysfs(tmp_path, "4", minor)).hypervisor_version() is None


def test_half_a_version(tmp_path: Path) -> None:
    root = sysfs(tmp_path)
    (root / "version" / "minor").unlink()
    assert Loader(Linker(), {}, root).hypervisor_version() is None


# Candidates.


def test_the_hypervisors_own_comes_first(tmp_path: Path) -> None:
    loader = Loader(Linker(), {}, sysfs(tmp_path, "4", "17"))
    candidates = loader.xenctrl_candidates()
    assert candidates[:2] == ["libxenctrl.so.4.17", "libxenctrl-4.17.so"]
    assert candidates.count("libxenctrl.so.4.17") == 1
    assert len(candidates) == 2 * len(SUPPORTED)


def test_then_the_newest_known_down_to_the_oldest(tmp_path: Path) -> None:
    candidates = Loader(Linker(), {}, no_sysfs(tmp_path)).xenctrl_candidates()
    sonames = [name for name in candidates if ".so." in name]
    assert sonames == [f"libxenctrl.so.4.{minor}" for minor in range(22, 13, -1)]
    assert candidates[1] == f"libxenctrl-4.{NEWEST[1]}.so"


def test_a_hypervisor_newer_than_known(tmp_path: Path) -> None:
    loader = Loader(Linker(), {}, sysfs(tmp_path, "4", "31"))
    assert loader.xenctrl_candidates()[:3] == [
        "libxenctrl.so.4.31",
        "libxenctrl-4.31.so",
        "libxenctrl.so.4.22",
    ]


def test_the_bare_name_is_never_tried(tmp_path: Path) -> None:
    """libxenctrl.so is what the -dev package's headers belong to, not what runs."""
    assert "libxenctrl.so" not in Loader(Linker(), {}, sysfs(tmp_path)).xenctrl_candidates()


def test_the_environment_overrules_everything(tmp_path: Path) -> None:
    linker = Linker({"libxenctrl.so.4.17", "lib/libxenctrl.so.4.19"})
    loader = Loader(linker, {ENVIRONMENT: "lib/libxenctrl.so.4.19"}, sysfs(tmp_path))
    found = loader.xenctrl()
    assert found == Library("lib/libxenctrl.so.4.19", "<lib/libxenctrl.so.4.19>", (4, 19))
    assert linker.asked == ["lib/libxenctrl.so.4.19"]


def test_an_empty_environment_variable_is_none(tmp_path: Path) -> None:
    loader = Loader(Linker(), {ENVIRONMENT: ""}, sysfs(tmp_path))
    assert len(loader.xenctrl_candidates()) > 1


# Opening.


def test_nothing_is_opened_before_it_is_asked_for(tmp_path: Path) -> None:
    linker = Linker()
    loader = Loader(linker, {}, sysfs(tmp_path))
    loader.xenctrl_candidates()
    loader.hypervisor_version()
    assert linker.asked == []


@pytest.mark.parametrize(
    ("present", "opened", "version"),
    [
        ({"libxenctrl.so.4.17", "libxenctrl.so.4.20"}, "libxenctrl.so.4.17", (4, 17)),
        ({"libxenctrl.so.4.20", "libxenctrl.so.4.14"}, "libxenctrl.so.4.20", (4, 20)),
        ({"libxenctrl-4.17.so", "libxenctrl.so.4.20"}, "libxenctrl-4.17.so", (4, 17)),
        ({"libxenctrl.so.4.14"}, "libxenctrl.so.4.14", (4, 14)),
    ],
)
def test_the_first_that_opens(
    present: set[str], opened: str, version: tuple[int, int], tmp_path: Path
) -> None:
    loader = Loader(Linker(present), {}, sysfs(tmp_path, "4", "17"))
    assert loader.xenctrl() == Library(opened, f"<{opened}>", version)


def test_refusal_lists_every_candidate_and_why(tmp_path: Path) -> None:
    linker = Linker()
    loader = Loader(linker, {}, sysfs(tmp_path))
    with pytest.raises(LibraryError) as caught:
        loader.xenctrl()
    text = str(caught.value)
    for name in loader.xenctrl_candidates():
        line = f"  {name}: cannot open shared object file: No such file or directory\n"
        assert line in text
    assert linker.asked == loader.xenctrl_candidates()
    assert "libxenmisc4.17" in text
    assert ENVIRONMENT in text
    assert isinstance(caught.value, OSError)


def test_refusal_where_there_is_no_xen(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match='connect\\("mock"\\)'):
        Loader(Linker(), {}, no_sysfs(tmp_path)).xenctrl()


def test_refusal_of_what_the_environment_names(tmp_path: Path) -> None:
    loader = Loader(Linker(), {ENVIRONMENT: "lib/libxenctrl.so.4.17"}, sysfs(tmp_path))
    with pytest.raises(LibraryError) as caught:
        loader.xenctrl()
    assert str(caught.value).count(": cannot open") == 1
    assert "lib/libxenctrl.so.4.17: cannot open" in str(caught.value)
    assert f"{ENVIRONMENT} names one library" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("cannot load library 'x.so': x.so: invalid ELF header"), "x.so: invalid ELF"),
        (OSError(8, "Exec format error"), "x.so: Exec format error"),
        (OSError("out of luck"), "x.so: out of luck"),
        (OSError(), "x.so: OSError()"),
    ],
)
def test_the_linkers_reason_is_kept(error: OSError, words: str, tmp_path: Path) -> None:
    def refuse(name: str) -> object:
        raise error

    with pytest.raises(LibraryError) as caught:
        Loader(refuse, {ENVIRONMENT: "x.so"}, no_sysfs(tmp_path)).xenctrl()
    assert words in str(caught.value)
    assert "cannot load library" not in str(caught.value)


@pytest.mark.parametrize("name", ["libxenctrl.so.4.13", "lib/libxenctrl.so.4.11.0"])
def test_a_library_older_than_supported_is_not_opened(name: str, tmp_path: Path) -> None:
    """Below 4.10 the same functions take other arguments."""
    linker = Linker({name})
    with pytest.raises(LibraryError, match=r"older than Xen 4\.14"):
        Loader(linker, {ENVIRONMENT: name}, sysfs(tmp_path)).xenctrl()
    assert linker.asked == []


def test_a_hypervisor_older_than_supported(tmp_path: Path) -> None:
    linker = Linker({"libxenctrl.so.4.11", "libxenctrl.so.4.17"})
    found = Loader(linker, {}, sysfs(tmp_path, "4", "11")).xenctrl()
    assert found.version == (4, 17)
    assert "libxenctrl.so.4.11" not in linker.asked


# Versions.


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("libxenctrl.so.4.17", (4, 17)),
        ("libxenctrl.so.4.17.0", (4, 17)),
        ("lib/x86_64-linux-gnu/libxenctrl.so.4.22", (4, 22)),
        ("libxenctrl-4.14.so", (4, 14)),
        ("libxenctrl.so", None),
        ("xen/mine.so", None),
        ("libxenctrl.so.x.y", None),
    ],
)
def test_versions(name: str, version: tuple[int, int] | None, tmp_path: Path) -> None:
    loader = Loader(Linker({name}), {ENVIRONMENT: name}, no_sysfs(tmp_path))
    assert loader.xenctrl().version == version


def test_a_links_target_tells_the_version(tmp_path: Path) -> None:
    (tmp_path / "libxenctrl.so.4.18.0").touch()
    link = tmp_path / "libxenctrl.so"
    link.symlink_to("libxenctrl.so.4.18.0")
    loader = Loader(Linker({str(link)}), {ENVIRONMENT: str(link)}, no_sysfs(tmp_path))
    assert loader.xenctrl().version == (4, 18)


def test_the_links_own_name_goes_first(tmp_path: Path) -> None:
    (tmp_path / "build.so").touch()
    link = tmp_path / "libxenctrl.so.4.19"
    link.symlink_to("build.so")
    loader = Loader(Linker({str(link)}), {ENVIRONMENT: str(link)}, no_sysfs(tmp_path))
    assert loader.xenctrl().version == (4, 19)


# Companions.


def companions(linker: Linker, which: str, xenctrl: Library, root: Path) -> Library:
    return Loader(linker, {}, root).companion(which, xenctrl)


@pytest.mark.parametrize(
    ("which", "soname"),
    [
        ("libxentoollog", "libxentoollog.so.1"),
        ("libxencall", "libxencall.so.1"),
        ("libxenevtchn", "libxenevtchn.so.1"),
        ("libxenforeignmemory", "libxenforeignmemory.so.1"),
        ("libxenlight", "libxenlight.so.4.19"),
        ("libxenstore", "libxenstore.so.4"),
        ("libxenstore", "libxenstore.so.3.0"),
    ],
)
def test_companions(which: str, soname: str, tmp_path: Path) -> None:
    xenctrl = Library("libxenctrl.so.4.19", None, (4, 19))
    found = companions(Linker({soname}), which, xenctrl, no_sysfs(tmp_path))
    assert found == Library(soname, f"<{soname}>")


def test_the_newer_libxenstore_goes_first(tmp_path: Path) -> None:
    linker = Linker({"libxenstore.so.3.0", "libxenstore.so.4"})
    xenctrl = Library("libxenctrl.so.4.16", None, (4, 16))
    found = companions(linker, "libxenstore", xenctrl, no_sysfs(tmp_path))
    assert found.name == "libxenstore.so.4"


def test_companions_of_a_path_lie_beside_it(tmp_path: Path) -> None:
    linker = Linker({"xen/lib/libxenlight.so.4.18", "libxenlight.so.4.18", "libxenevtchn.so.1"})
    xenctrl = Library("xen/lib/libxenctrl.so.4.18", None, (4, 18))
    root = no_sysfs(tmp_path)
    found = companions(linker, "libxenlight", xenctrl, root)
    assert found.name == "xen/lib/libxenlight.so.4.18"
    assert companions(linker, "libxenevtchn", xenctrl, root).name == "libxenevtchn.so.1"
    assert linker.asked[-2:] == ["xen/lib/libxenevtchn.so.1", "libxenevtchn.so.1"]


def test_libxenlight_of_a_libxenctrl_without_a_version(tmp_path: Path) -> None:
    linker = Linker({"libxenlight.so.4.20", f"libxenlight.so.4.{NEWEST[1]}"})
    unknown = Library("mine.so", None)
    root = sysfs(tmp_path, "4", "20")
    assert companions(linker, "libxenlight", unknown, root).name == "libxenlight.so.4.20"
    root = no_sysfs(tmp_path)
    assert companions(linker, "libxenlight", unknown, root).name == "libxenlight.so.4.22"


def test_a_companion_that_is_not_there(tmp_path: Path) -> None:
    xenctrl = Library("xen/libxenctrl.so.4.17", None, (4, 17))
    with pytest.raises(LibraryError) as caught:
        companions(Linker(), "libxenstore", xenctrl, no_sysfs(tmp_path))
    for name in ("xen/libxenstore.so.4", "xen/libxenstore.so.3.0", "libxenstore.so.3.0"):
        assert f"  {name}: cannot open" in str(caught.value)


# Mismatch.


@pytest.mark.parametrize("library", [None, (4, 17)])
def test_no_mismatch(library: tuple[int, int] | None) -> None:
    assert mismatch(library, (4, 17)) is None


def test_a_mismatch_of_domctls() -> None:
    text = mismatch((4, 17), (4, 18))
    assert text is not None
    assert "libxenctrl is of Xen 4.17, but Xen 4.18 is running" in text
    assert "refuses pause, monitor and other domctls with EACCES" in text


def test_a_mismatch_with_equal_domctls() -> None:
    text = mismatch((4, 20), (4, 21))
    assert text is not None
    assert "the domctls agree" in text
