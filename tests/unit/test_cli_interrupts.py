# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ctrl-C at any moment of any command: the guest is as it was, and the exit code is true."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import xenaltp2m as xa
from tests.thorough import THOROUGH
from xenaltp2m import cli
from xenaltp2m.backend import mock
from xenaltp2m.backend.mock import MockBackend

ROOT = Path(__file__).parents[2]
GUESTS = ROOT / "examples" / "guest"
HELLO, RACER = str(GUESTS / "hello.elf"), str(GUESTS / "racer.elf")
MOMENTS = int(os.environ.get("XENALTP2M_INTERRUPTS", "12"))
"""Of each command; more find more."""
READ_ONLY = {"list", "views", "doctor"}

COMMANDS = {
    "list": ["list"],
    "doctor": ["doctor", "guest"],
    "views": ["views", "guest"],
    "watch": ["watch", "guest", "--image", HELLO, "--symbol", "target", "--count", "5"],
    "watch bytes": ["watch", "guest", "--bytes", "0x101000:4", "--cr3", "--count", "5"],
    "trace": ["trace", "guest", "hit:u", "--symbols", RACER, "--returns", "--count", "5"],
    "protect": ["protect", "guest", "--image", HELLO, "--symbol", "target", "--duration", "0"],
    "state restore": ["state", "restore", "STATE", "guest", "--duration", "0"],
    "rescue": ["rescue", "guest", "--force"],
    "demo": ["demo", "--count", "5"],
}


class WatchedMock(MockBackend):
    """The mock that the command line opens; it notes what was left when it is closed."""

    made: list[WatchedMock]

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **(keywords | {"memory_pages": 1 << 14}))
        self.made.append(self)
        self.left: list[str] | None = None

    def close(self) -> None:
        if self.left is None:
            self.left = list(self._remains())
        super().close()

    def _remains(self) -> Iterator[str]:
        yield from map(str, self.open_resources())
        if not self.ready:
            return
        guest = self.domain(1)
        for what, found in {
            "altp2m": guest.active,
            "views": any(view.exists for view in guest.views),
            # The ring's own page leaves the guest's p2m with the first monitor, for good.
            "pages": guest.pages - self._memory[0] not in (0, -1),
            "limit": guest.max_pages != self._memory[1],
            "pauses": guest.pauses > (not self.runs),
            "listened": guest.listened,
            "crashed": guest.crashed,
            "single steps": any(vcpu.single_step for vcpu in guest.vcpus),
            "waiting": any(vcpu.event_pauses for vcpu in guest.vcpus),
        }.items():
            if found:
                yield what

    ready = runs = False
    """Whether its guest is made, and a command asks about it; whether the guest was started."""

    def altp2m_get_domain_state(self, domid: int) -> bool:
        self._be_ready()
        return super().altp2m_get_domain_state(domid)

    def domain_unpause(self, domid: int) -> None:
        super().domain_unpause(domid)
        self.runs = True
        self._be_ready()

    def _be_ready(self) -> None:
        if not self.ready:
            guest = self.domain(1)
            self._memory = guest.pages, guest.max_pages
            self.ready = True


@pytest.fixture(autouse=True)
def mocks(monkeypatch: pytest.MonkeyPatch) -> list[WatchedMock]:
    made: list[WatchedMock] = []
    monkeypatch.setattr(WatchedMock, "made", made, raising=False)
    monkeypatch.setattr(mock, "MockBackend", WatchedMock)
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    backend = MockBackend()
    backend.add_domain("guest", vcpus=2)
    with xa.connect(backend) as xen, xen.domain("guest") as dom, dom.altp2m() as altp2m:
        view = altp2m.create_view(label="hooks")
        [shadow] = dom.add_pages()
        view.set_access(range(0x100, 0x140), xa.Access.RX)
        view.remap(0x105, shadow, access=xa.Access.X)
        altp2m.switch_to_view(view)
        state = xa.capture(altp2m, contents=True)
    path = tmp_path_factory.mktemp("states") / "views.json"
    path.write_bytes(state.to_bytes())
    return str(path)


class Moments:
    """Counts calls that the package makes once there is a guest; at one of them comes Ctrl-C."""

    def __init__(self, at: int | None) -> None:
        self.count = 0
        self._at = at

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event not in ("call", "c_call") or "xenaltp2m" not in frame.f_code.co_filename:
            return
        if WatchedMock.made and WatchedMock.made[-1].ready:
            self.count += 1
            if self.count == self._at:
                signal.raise_signal(signal.SIGINT)

    @contextmanager
    def counted(self) -> Iterator[None]:
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)


def pressed(command: list[str], saved: str, at: int | None) -> tuple[int, int]:
    """Run a command; return its exit code and how many moments there were."""
    arguments = ["--connect", "mock", *(saved if part == "STATE" else part for part in command)]
    moments = Moments(at)
    with moments.counted():
        code = cli.main(arguments)
    return code, moments.count


# Where it comes while Python closes a generator, it is told there, and lost: nothing ends early.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_left(
    name: str, saved: str, mocks: list[WatchedMock], capsys: pytest.CaptureFixture[str]
) -> None:
    command = COMMANDS[name]
    assert pressed(command, saved, None)[0] == cli.DONE  # imports are done, too
    code, total = pressed(command, saved, None)
    assert code == cli.DONE
    assert [one.left for one in mocks] == [[], []]
    chance = random.Random(name)
    count = MOMENTS // 4 if name == "demo" and not THOROUGH else MOMENTS  # which takes longest
    moments = sorted({1, total, *(chance.randrange(1, total) for _ in range(count))})
    codes = []
    if name in READ_ONLY:  # they may end while they close what was only read
        warnings.simplefilter("ignore", ResourceWarning)
    for moment in moments:
        mocks.clear()
        capsys.readouterr()
        code, _ = pressed(command, saved, moment)
        codes.append(code)
        assert code in (cli.DONE, cli.INTERRUPTED), capsys.readouterr().err
        [one] = mocks
        if one.left is None and name in READ_ONLY:
            one.close()
        assert one.left == [], f"{name}, moment {moment} of {total}"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
        assert "Traceback" not in capsys.readouterr().err
    assert cli.INTERRUPTED in codes


def test_a_command_that_cleans_up_nothing_is_found(mocks: list[WatchedMock]) -> None:
    """The test above can fail."""
    backend = WatchedMock()
    backend.add_domain("guest")
    backend.domain_unpause(1)
    backend.altp2m_set_domain_state(1, True)
    backend.altp2m_create_view(1, 0)
    backend.domain_pause(1)
    backend.close()
    assert backend.left == ["altp2m", "views", "pauses"]
    assert json.dumps(backend.left)
