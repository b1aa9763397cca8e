# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds what the lab boots, from Debian packages, and caches it outside the tree.

Nothing here is mounted and nothing is installed on the machine: packages are fetched through
private apt configurations (same mirror, other suites, signatures checked) and unpacked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gzip
import hashlib
import inspect
import json
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

HERE = Path(__file__).resolve().parent
PATH = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"  # su leaves them out
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# command or file the build needs -> Debian package that has it
NEEDS = {
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "tar": "tar",
    "gcc": "gcc",
    "g++": "g++",
    "make": "make",
    "patch": "patch",
    "ld": "binutils",
    "xz": "xz-utils",
    str(KEYRING): "debian-archive-keyring",
}

EMULATOR_SUITE = "trixie"
KERNEL_SUITE = "bookworm"
BOCHS_OPTIONS = (
    "--enable-x86-64 --enable-vmx=2 --enable-cpu-level=6 --enable-evex --enable-avx --enable-pci "
    "--disable-debugger --disable-debugger-gui --disable-gdb-stub --enable-repeat-speedups "
    "--enable-handlers-chaining --enable-fast-function-calls --enable-configurable-msrs "
    "--with-nogui --disable-docbook --disable-large-ramfile --disable-show-ips"
).split()

PYTHON_PACKAGES = (
    "python3-minimal",
    "libpython3-stdlib",
    "python3-cffi-backend",
    "python3-pyelftools",
    "python3-pytest",
    "python3-hypothesis",
    "python3-rich",
)

# What Xen's libraries and tools need that is not theirs, where the two come from two suites.
LIBRARIES_OF_XEN = (
    "libyajl2", "libuuid1", "libext2fs2", "liblzma5", "libzstd1", "zlib1g", "libncurses6",
    "libtinfo6", "libbz2-1.0", "libfdt1", "libgcc-s1", "liblzo2-2",
)  # fmt: skip

MODULES = (
    "xen_privcmd", "xen_evtchn", "xen_gntdev", "xen_gntalloc", "xenfs", "ata_piix", "sd_mod",
)  # fmt: skip

# In the closure of the packages above, of no use to a dom0 that never configures a package.
NOT_UNPACKED = {
    "adduser", "debconf", "dpkg", "gcc-12-base", "gcc-14-base", "login.defs", "media-types",
    "passwd", "perl-base", "readline-common", "sensible-utils", "systemd", "sysvinit-utils", "tar",
    "tzdata", "ucf", "udev", "libpam-modules", "libpam-modules-bin",
}  # fmt: skip

NOT_KEPT = re.compile(
    r"usr/share/(doc|man|locale|info|lintian|bash-completion|perl5|python3/debpython|bug|apport|"
    r"common-licenses|zoneinfo|gcc|gdb|doc-base|menu|applications|pixmaps|icons)(/|$)"
    r"|usr/lib/x86_64-linux-gnu/(gconv|perl-base|audit)(/|$)"
    r"|usr/lib/python3[.0-9]*/(test|idlelib|lib2to3|tkinter|turtledemo|ensurepip|pydoc_data)(/|$)"
    r"|usr/lib/xen-[0-9.]*/boot/"
    r"|usr/lib/(udev|systemd|apt)/|lib/(udev|systemd)/|etc/(init\.d|cron|logrotate)"
)


@dataclasses.dataclass(frozen=True)
class Release:
    """One Xen release and the Debian suites its parts come from."""

    xen: str
    suite: str
    root_suite: str
    xen_packages: tuple[str, ...]


def _release(xen: str, suite: str) -> Release:
    return Release(xen, suite, suite, (f"xen-utils-{xen}", f"libxenmisc{xen}"))


# Debian's 4.14 comes with Python 3.9, which the package does not support. Its libraries and
# tools depend on nothing newer than bookworm has, so they are unpacked over a bookworm root.
RELEASES = {
    "4.14": Release(
        "4.14",
        "bullseye",
        "bookworm",
        (
            "xen-utils-4.14", "xen-utils-common", "libxenmisc4.14", "xenstore-utils",
            "libxencall1", "libxendevicemodel1", "libxenevtchn1", "libxenforeignmemory1",
            "libxengnttab1", "libxenhypfs1", "libxenstore3.0", "libxentoolcore1",
            "libxentoollog1",
        ),
    ),
    "4.17": _release("4.17", "bookworm"),
    "4.20": _release("4.20", "trixie"),
}  # fmt: skip


class LabError(Exception):
    """The lab cannot go on; the message says why and what helps."""


def say(text: str) -> None:
    """Prints one line of progress."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


def cache_dir() -> Path:
    """Where images live: XENALTP2M_LAB_CACHE, or below the user's cache directory."""
    named = os.environ.get("XENALTP2M_LAB_CACHE")
    if named:
        return Path(named).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "xenaltp2m-lab"


@contextlib.contextmanager
def locked(name: str, waiting_for: str) -> Iterator[None]:
    """Holds the cache's lock `name`; says so when another process has it."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with open(cache_dir() / f"{name}.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for {waiting_for} (another process holds {handle.name})")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def command(arguments: Sequence[str | Path], *, cwd: Path | None = None, tries: int = 1,
            env: Mapping[str, str] | None = None, log: Path | None = None) -> str:  # fmt: skip
    """Runs a program, returns its output, raises LabError with the output's tail on failure.

    Args:
        arguments: The program and its arguments.
        cwd: Where it runs.
        tries: How often to try; for what uses the network.
        env: Variables added to the environment.
        log: Keeps all output there.
    """
    words = [str(word) for word in arguments]
    for attempt in range(1, tries + 1):
        done = subprocess.run(
            words,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C", "PATH": PATH, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if log is not None:
            log.write_text(done.stdout)
        if done.returncode == 0:
            return done.stdout
        if attempt < tries:
            say(f"{words[0]} failed, try {attempt + 1} of {tries} in {5 * attempt} s")
            time.sleep(5 * attempt)
    tail = "\n".join(done.stdout.splitlines()[-15:])
    raise LabError(f"{' '.join(words[:12])} failed ({done.returncode}):\n{tail}")


def missing() -> list[str]:
    """Debian packages this machine lacks for building the images."""
    lacking = {
        package
        for need, package in NEEDS.items()
        if not (Path(need).exists() if "/" in need else shutil.which(need))
    }
    return sorted(lacking)


def require(install: bool = False) -> None:
    """Raises LabError where the lab cannot run at all.

    Args:
        install: Call apt-get for what building images needs.
    """
    if not sys.platform.startswith("linux") or not shutil.which("apt-get"):
        raise LabError("the lab is built from Debian packages: it needs a Debian machine (apt-get)")
    if os.geteuid() != 0:
        raise LabError("the lab needs root (chroot, file ownership in images): run it with sudo")
    packages = missing()
    if packages and install:
        say(f"installing {' '.join(packages)}")
        command(["apt-get", "update"], tries=3)
        command(
            ["apt-get", "install", "-y", "--no-install-recommends", *packages],
            tries=3,
            env={"DEBIAN_FRONTEND": "noninteractive"},
        )


def mirrors() -> tuple[str, str | None]:
    """Debian's archive and security archive as this machine's own apt knows them."""
    text = command(["apt-get", "indextargets", "--format", "$(REPO_URI)|$(ORIGIN)|$(LABEL)"])
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 2]
    archive = {uri for uri, origin, label in rows if (origin, label) == ("Debian", "Debian")}
    security = {
        uri for uri, origin, label in rows if (origin, label) == ("Debian", "Debian-Security")
    }
    named = os.environ.get("XENALTP2M_LAB_MIRROR")
    if named:
        return named, None
    if not archive:
        raise LabError(
            "apt on this machine knows no Debian archive: run apt-get update, "
            "or name a mirror in XENALTP2M_LAB_MIRROR"
        )
    return sorted(archive)[0], sorted(security)[0] if security else None


class Apt:
    """apt-get for one suite, apart from the machine's own state."""

    def __init__(self, suite: str) -> None:
        self.suite = suite
        self.home = cache_dir() / "apt" / suite
        self._fresh = False

    def _run(self, *arguments: str, cwd: Path | None = None) -> str:
        options = {
            "Dir::Etc::sourcelist": self.home / "debian.sources",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State::lists": self.home / "lists",
            "Dir::State::status": self.home / "status",
            "Dir::Cache::archives": self.home / "archives",
            "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "",
            "APT::Architecture": "amd64",
            "APT::Sandbox::User": "root",
            "Acquire::Retries": "3",
            "Acquire::Languages": "none",
        }
        words: list[str | Path] = ["apt-get", "-y", "--no-install-recommends"]
        for name, value in options.items():
            words += ["-o", f"{name}={value}"]
        return command([*words, *arguments], cwd=cwd, tries=4)

    def _update(self) -> None:
        if self._fresh:
            return
        for name in ("lists/partial", "archives/partial"):
            (self.home / name).mkdir(parents=True, exist_ok=True)
        (self.home / "status").write_text("")
        archive, security = mirrors()
        suites = [(archive, self.suite)]
        if security:
            suites.append((security, f"{self.suite}-security"))
        (self.home / "debian.sources").write_text(
            "\n".join(
                f"Types: deb deb-src\nURIs: {uri}\nSuites: {suite}\nComponents: main\n"
                f"Signed-By: {KEYRING}\n"
                for uri, suite in suites
            )
        )
        say(f"reading the package lists of {self.suite}")
        self._run("update")
        self._fresh = True

    def closure(self, packages: Sequence[str]) -> list[Path]:
        """Fetches packages with all they depend on.

        Returns:
            The .deb files.
        """
        self._update()
        plan = re.findall(
            r"^Inst (\S+) \((\S+) .*\[(\w+)\]\)",
            self._run("--simulate", "install", *packages),
            re.MULTILINE,
        )
        say(f"fetching {len(plan)} packages of {self.suite}")
        self._run("--download-only", "install", *packages)
        return [
            self.home / "archives" / f"{name}_{version.replace(':', '%3a')}_{machine}.deb"
            for name, version, machine in plan
        ]

    def only(self, packages: Sequence[str]) -> list[Path]:
        """Fetches these packages and nothing they depend on."""
        self._update()
        say(f"fetching {' '.join(packages)} of {self.suite}")
        target = self.home / "only" / hashlib.sha256(" ".join(packages).encode()).hexdigest()[:12]
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        self._run("download", *packages, cwd=target)
        return sorted(target.glob("*.deb"))

    def source(self, package: str, target: Path) -> None:
        """Fetches a source package's archives into `target`.

        They are checked against the suite's signed index, so its .dsc is not needed.
        """
        self._update()
        say(f"fetching the source of {package} of {self.suite}")
        for part in ("--tar-only", "--diff-only"):
            self._run("source", "--download-only", part, package, cwd=target)

    def newest_kernel(self) -> str:
        """Name of the package that linux-image-amd64 depends on."""
        self._update()
        plan = self._run("--simulate", "install", "linux-image-amd64")
        found = re.search(r"^Inst (linux-image-[0-9]\S*-amd64) ", plan, re.MULTILINE)
        if not found:
            raise LabError(f"{self.suite} has no linux-image-amd64")
        return found.group(1)


_apts: dict[str, Apt] = {}


def apt(suite: str) -> Apt:
    """The suite's apt, made once per process so that its lists are read once."""
    return _apts.setdefault(suite, Apt(suite))


def built(name: str, inputs: object, *makers: Callable[..., object], keep: int = 2) -> Path:
    """Returns the cached result of `makers[0](directory)`, running it when inputs changed.

    The key covers `inputs` and the source text of all `makers`. Of results of the same name the
    `keep` used last remain.
    """
    text = json.dumps([inputs, [inspect.getsource(maker) for maker in makers]], default=str)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    place = cache_dir() / f"{name}@{key}"
    if place.is_dir():
        os.utime(place)
        return place
    with locked("build", "an image build"):
        if place.is_dir():
            return place
        if packages := missing():
            raise LabError(
                f"missing packages: {' '.join(packages)}\n"
                f"  apt-get install {' '.join(packages)}   (or give --install)"
            )
        started = time.monotonic()
        say(f"building {name}")
        work = cache_dir() / f"{name}.building"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        makers[0](work)
        work.rename(place)
        os.utime(place)
        found = sorted(cache_dir().glob(f"{name}@*"), key=lambda path: path.stat().st_mtime)
        for old in found[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        say(f"built {name} in {time.monotonic() - started:.0f} s")
    return place


def unpack(debs: Sequence[Path], root: Path) -> None:
    """Unpacks packages into a merged-usr tree without running their scripts."""
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    for deb in debs:
        if deb.name.split("_")[0] in NOT_UNPACKED:
            continue
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE
        ) as source:
            done = subprocess.run(
                ["tar", "-x", "--keep-directory-symlink", "-C", root], stdin=source.stdout
            )
        if source.returncode or done.returncode:
            raise LabError(f"cannot unpack {deb}")


def emulator() -> Path:
    """Bochs and the BIOS images it needs."""
    patches = sorted((HERE / "bochs").glob("*.patch"))

    def make(work: Path) -> None:
        source = work / "source"
        source.mkdir()
        apt(EMULATOR_SUITE).source("bochs", source)
        tarball = next(source.glob("bochs_*.orig.tar.*"))
        packaging = next(source.glob("bochs_*.debian.tar.*"))
        tree = source / "tree"
        tree.mkdir()
        command(["tar", "-xf", tarball, "--strip-components=1", "-C", tree])
        command(["tar", "-xf", packaging, "-C", tree])
        series = (tree / "debian/patches/series").read_text().splitlines()
        names = [line.split()[0] for line in series if line.strip() and not line.startswith("#")]
        for patch in [*(tree / "debian/patches" / name for name in names), *patches]:
            command(["patch", "-p1", "-N", "-i", patch], cwd=tree)
        say("compiling the emulator (a minute on two cores)")
        flags = {"CXXFLAGS": "-O3 -fno-plt", "CFLAGS": "-O3 -fno-plt"}
        command(["./configure", *BOCHS_OPTIONS], cwd=tree, env=flags, log=work / "configure.log")
        command(["make", f"-j{os.cpu_count() or 1}"], cwd=tree, log=work / "make.log")
        shutil.copy2(tree / "bochs", work / "bochs")
        command(["strip", work / "bochs"])
        bios = work / "bios"
        unpack(apt(EMULATOR_SUITE).only(["bochsbios", "vgabios"]), bios)
        for name in ("bochs/BIOS-bochs-latest", "vgabios/vgabios.bin"):
            found = (bios / "usr/share" / name).resolve()
            shutil.copy2(found, work / Path(name).name)
        shutil.rmtree(bios)
        shutil.rmtree(source)

    inputs = [EMULATOR_SUITE, BOCHS_OPTIONS, [patch.read_text() for patch in patches]]
    return built("emulator", inputs, make, unpack)


def hypervisor(release: Release) -> Path:
    """Directory with `xen`, the hypervisor's ELF image."""

    def make(work: Path) -> None:
        unpack(apt(release.suite).only([f"xen-hypervisor-{release.xen}-amd64"]), work / "tree")
        packed = work / "tree/boot" / f"xen-{release.xen}-amd64.gz"
        (work / "xen").write_bytes(gzip.decompress(packed.read_bytes()))
        shutil.rmtree(work / "tree")

    return built(f"xen-{release.xen}", [release.xen, release.suite], make, unpack)


def kernel() -> Path:
    """Directory with `vmlinux`, an ELF, and `modules/`, numbered in the order to load them."""

    def make(work: Path) -> None:
        source = apt(KERNEL_SUITE)
        unpack(source.only([source.newest_kernel()]), work / "tree")
        vmlinuz = next((work / "tree/boot").glob("vmlinuz-*")).read_bytes()
        (work / "vmlinux").write_bytes(elf_of(vmlinuz))
        found = {
            path.stem.replace("-", "_"): path
            for path in sorted((work / "tree/usr/lib/modules").rglob("*.ko"))
        }
        (work / "modules").mkdir()
        for number, name in enumerate(load_order(MODULES, found)):
            shutil.copy2(found[name], work / "modules" / f"{number:02}-{name}.ko")
        shutil.rmtree(work / "tree")

    return built("kernel", [KERNEL_SUITE, MODULES], make, unpack, elf_of, load_order)


def elf_of(vmlinuz: bytes) -> bytes:
    """The ELF compressed with xz inside a Linux boot image.

    Xen's own decompressor would take 13 s of the emulator's time for it.
    """
    magic = b"\xfd7zXZ\x00"
    at = vmlinuz.find(magic)
    while at >= 0:
        with contextlib.suppress(lzma.LZMAError):
            payload = lzma.LZMADecompressor().decompress(vmlinuz[at:])
            if payload.startswith(b"\x7fELF"):
                return payload
        at = vmlinuz.find(magic, at + 1)
    raise LabError("no xz-compressed kernel in the boot image")


def load_order(names: Sequence[str], found: Mapping[str, Path]) -> list[str]:
    """Modules with all they depend on, dependencies first."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order:
            return
        match = re.search(rb"\0depends=([^\0]*)\0", found[name].read_bytes())
        for other in match.group(1).decode().split(",") if match else []:
            if other:
                visit(other.replace("-", "_"))
        order.append(name)

    for name in names:
        visit(name)
    return order


def root(release: Release) -> Path:
    """Directory with `tree`, the dom0 root file system."""

    def make(work: Path) -> None:
        tree = work / "tree"
        tree.mkdir()
        base = list(PYTHON_PACKAGES) + ["busybox-static"]
        if release.suite == release.root_suite:
            unpack(apt(release.root_suite).closure([*base, *release.xen_packages]), tree)
        else:
            unpack(apt(release.root_suite).closure([*base, *LIBRARIES_OF_XEN]), tree)
            unpack(apt(release.suite).only(release.xen_packages), tree)
        configure(tree, release)

    inputs = [dataclasses.asdict(release), PYTHON_PACKAGES, LIBRARIES_OF_XEN, sorted(NOT_UNPACKED),
              NOT_KEPT.pattern]  # fmt: skip
    return built(f"root-{release.xen}", inputs, make, unpack, configure)


def configure(tree: Path, release: Release) -> None:
    """Does what the packages' scripts would have done, as far as the lab needs it."""
    for path in sorted(tree.rglob("*"), reverse=True):
        if NOT_KEPT.match(str(path.relative_to(tree))):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    for name in ("dev", "proc", "sys", "run", "tmp", "root", "etc", "var", "home/lab", "mnt"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    shutil.rmtree(tree / "var/run", ignore_errors=True)
    (tree / "var/run").symlink_to("/run")
    etc = tree / "etc"
    (etc / "passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n"
        "lab:x:1000:1000:unprivileged user:/home/lab:/bin/sh\n"
    )
    (etc / "group").write_text("root:x:0:\ntty:x:5:\nnogroup:x:65534:\nlab:x:1000:\n")
    (etc / "hostname").write_text("dom0\n")
    (etc / "hosts").write_text("127.0.0.1 localhost dom0\n")
    os.chown(tree / "home/lab", 1000, 1000)
    # Debian's wrappers look for the running release on each call; the lab knows it.
    programs = tree / f"usr/lib/xen-{release.xen}/bin"
    for program in sorted(programs.iterdir()):
        for place in (tree / "usr/bin", tree / "usr/sbin"):
            if (place / program.name).is_symlink() or (place / program.name).exists():
                (place / program.name).unlink()
        (tree / "usr/sbin" / program.name).symlink_to(
            f"/usr/lib/xen-{release.xen}/bin/{program.name}"
        )
    for line in command(["chroot", tree, "/bin/busybox", "--list-full"]).split():
        applet = tree / "usr/bin" / Path(line).name
        if not applet.exists() and not applet.is_symlink():
            if not (tree / "usr/sbin" / applet.name).is_symlink():
                applet.symlink_to("/bin/busybox")
    command(["ldconfig", "-r", tree])
    # Unchecked: Python takes the compiled file without looking at its source's date.
    command(
        ["chroot", tree, "/usr/bin/python3", "-m", "compileall", "-q",
         "--invalidation-mode", "unchecked-hash", "/usr/lib/python3", *(
             f"/usr/lib/{path.name}" for path in (tree / "usr/lib").glob("python3.*"))]
    )  # fmt: skip


def guest() -> Path:
    """Directory with `guest.elf`, the smallest PVH guest."""
    sources = [HERE / "guest" / name for name in ("guest.S", "guest.ld")]

    def make(work: Path) -> None:
        command(
            ["gcc", "-m32", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none",
             "-Wl,-T", sources[1], sources[0], "-o", work / "guest.elf"]
        )  # fmt: skip

    return built("guest", [source.read_text() for source in sources], make)


def loader() -> Path:
    """Directory with `start.bin`, a boot sector."""
    source = HERE / "loader" / "start.S"

    def make(work: Path) -> None:
        command(
            ["gcc", "-m32", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none",
             "-Wl,--oformat=binary,-Ttext=0x7c00", source, "-o", work / "start.bin"]
        )  # fmt: skip
        if (work / "start.bin").stat().st_size != 512:
            raise LabError("the boot sector must be 512 bytes long")

    return built("loader", source.read_text(), make)


class Cpio:
    """A newc archive, the format of an initial ramdisk; several may follow one another."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._serial = 0
        self._seen: set[str] = set()

    def add(self, name: str, mode: int, data: bytes = b"", owner: int = 0,
            device: tuple[int, int] = (0, 0)) -> None:  # fmt: skip
        """Writes one entry; `mode` holds the file type as in stat."""
        if name in self._seen:
            return
        self._seen.add(name)
        self._serial += 1
        encoded = name.encode() + b"\0"
        fields = (self._serial, mode, owner, owner, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
        self._out.write(head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4))

    def parents(self, name: str) -> None:
        """Writes the directories above `name`."""
        for parent in reversed(Path(name).parents[:-1]):
            self.add(str(parent), stat.S_IFDIR | 0o755)

    def tree(self, source: Path, prefix: str = "") -> None:
        """Writes a file or directory, with everything below it, as `prefix`."""
        info = source.lstat()
        owner = info.st_uid if info.st_uid == 1000 else 0
        if prefix:
            self.parents(prefix)
            if source.is_symlink():
                self.add(prefix, stat.S_IFLNK | 0o777, os.readlink(source).encode())
            elif source.is_dir():
                self.add(prefix, info.st_mode, owner=owner)
            elif source.is_file():
                self.add(prefix, info.st_mode, source.read_bytes(), owner)
        if source.is_dir() and not source.is_symlink():
            for child in sorted(source.iterdir()):
                self.tree(child, f"{prefix}/{child.name}" if prefix else child.name)

    def close(self) -> None:
        """Ends the archive, padded so that another may follow it."""
        self.add("TRAILER!!!", 0)
        self._out.write(b"\0" * (-self._out.tell() % 512))


def initrd(release: Release) -> Path:
    """Directory with `root.cpio`: dom0's whole root, its modules, start-up and guests."""
    tree = root(release) / "tree"
    modules = kernel() / "modules"
    elf = guest() / "guest.elf"
    scripts = sorted(path for path in (HERE / "dom0").iterdir() if path.is_file())

    def make(work: Path) -> None:
        with open(work / "root.cpio", "wb") as out:
            archive = Cpio(out)
            for name, major, minor in (("console", 5, 1), ("null", 1, 3), ("kmsg", 1, 11)):
                archive.parents(f"dev/{name}")
                archive.add(f"dev/{name}", stat.S_IFCHR | 0o600, device=(major, minor))
            for script in scripts:
                name = script.name if script.name == "init" else f"usr/sbin/{script.name}"
                archive.parents(name)
                archive.add(name, stat.S_IFREG | 0o755, script.read_bytes())
            archive.tree(modules, "lab/modules")
            archive.tree(elf, "lab/guest.elf")
            for vcpus in (1, 4):
                for mode in ("disabled", "mixed", "external", "limited"):
                    archive.add(
                        f"lab/{mode}-{vcpus}.cfg",
                        stat.S_IFREG | 0o644,
                        (
                            f'name = "{mode}-{vcpus}"\ntype = "pvh"\nkernel = "/lab/guest.elf"\n'
                            f'memory = 16\nvcpus = {vcpus}\naltp2m = "{mode}"\n'
                        ).encode(),
                    )
            archive.tree(tree)
            archive.close()

    inputs = [str(tree), str(modules), str(elf), [script.read_text() for script in scripts]]
    return built(f"initrd-{release.xen}", inputs, make, Cpio)


def linux_guest() -> Path:
    """Directory with `vmlinux`, `initrd` and `linux.cfg`: a Debian kernel as a PVH guest."""
    vmlinux = kernel() / "vmlinux"
    busybox = root(RELEASES["4.17"]) / "tree/usr/bin/busybox"
    script = HERE / "guest" / "init"

    def make(work: Path) -> None:
        with open(work / "initrd", "wb") as out:
            archive = Cpio(out)
            archive.parents("dev/console")
            archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
            archive.add("dev/null", stat.S_IFCHR | 0o666, device=(1, 3))
            archive.add("dev/zero", stat.S_IFCHR | 0o666, device=(1, 5))
            archive.add("init", stat.S_IFREG | 0o755, script.read_bytes())
            archive.tree(busybox, "bin/busybox")
            archive.close()
        (work / "vmlinux").symlink_to(vmlinux)
        (work / "linux.cfg").write_text(
            'name = "linux"\ntype = "pvh"\nkernel = "/lab/linux/vmlinux"\n'
            'ramdisk = "/lab/linux/initrd"\nmemory = 192\nvcpus = 1\naltp2m = "external"\n'
            'extra = "console=hvc0 nokaslr quiet cryptomgr.notests mitigations=off"\n'
        )

    return built("linux-guest", [str(vmlinux), str(busybox), script.read_text()], make, Cpio)


@dataclasses.dataclass(frozen=True)
class Images:
    """All that one boot needs."""

    release: Release
    emulator: Path
    loader: Path
    xen: Path
    vmlinux: Path
    initrd: Path
    root: Path


def images(version: str) -> Images:
    """Builds, or finds in the cache, what booting this Xen release takes."""
    if version not in RELEASES:
        raise LabError(f"no Xen {version} here, only {', '.join(RELEASES)}")
    release = RELEASES[version]
    return Images(
        release,
        emulator(),
        loader() / "start.bin",
        hypervisor(release) / "xen",
        kernel() / "vmlinux",
        initrd(release) / "root.cpio",
        root(release) / "tree",
    )
