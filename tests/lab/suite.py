# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs the live tests on real Xen in the lab, and shows what pytest said there.

    suite.py --xen 4.17

builds the wheel and boots twice: once for the contract and the live suite, as root, as another
user, and with libraries of another release; once more without ``altp2m=1``. Reports in junit's
format, logs and the console are left in the results directory. The exit status is pytest's.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree as ET

from images import RELEASES, images, say

HERE = Path(__file__).resolve().parent
TREE = HERE.parent.parent
PYTEST = "python3 -m pytest -p no:cacheprovider -q --tb=short -W error"
LIMIT = 3000
"""Seconds of wall time a boot may take; the whole suite takes about 1800 on a busy machine."""
SKEWED = "4.17"
"""The release whose library is put on the other hypervisors."""

MAIN = """
export XENALTP2M_LIVE=1 status=0
{pytest} --junitxml=$RESULTS/live.xml tests/contract tests/live || status=1
chmod a+rwx $RESULTS
su lab -c "XENALTP2M_LIVE=1 XENALTP2M_ENVIRONMENT=unprivileged {pytest} \\
    --junitxml=$RESULTS/unprivileged.xml tests/live/environment" || status=1
if [ -d skew ]; then
    XENALTP2M_ENVIRONMENT=skew XENALTP2M_LIBXENCTRL=$PWD/skew/libxenctrl.so.{skewed} \\
    LD_LIBRARY_PATH=$PWD/skew {pytest} \\
        --junitxml=$RESULTS/skew.xml tests/live/environment || status=1
fi
exit $status
"""
OFF = """
export XENALTP2M_LIVE=1 XENALTP2M_ENVIRONMENT=switched_off
{pytest} --junitxml=$RESULTS/switched_off.xml tests/live/environment
"""


def build_wheel(target: Path) -> Path:
    """Build the wheel that dom0 gets."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(target), "."]
    subprocess.run(command, cwd=TREE, check=True)
    [wheel] = target.glob("*.whl")
    return wheel


def package(name: str) -> Path:
    """Return where a package is that the tests have here, and dom0 has not."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def foreign_libraries(target: Path) -> Path:
    """Gather the libraries of :data:`SKEWED` under their sonames."""
    target.mkdir()
    for library in (images(SKEWED).root / "usr/lib/x86_64-linux-gnu").glob("libxen*.so.*"):
        shutil.copyfile(library, target / library.name)  # follows links
    return target


def boot(xen: str, wheel: Path, results: Path, job: str, *more: str) -> int:
    """Boot once and run a job."""
    puts = ["tests/__init__.py", "tests/thorough.py", "tests/contract", "tests/live"]
    names = "hello", "checker", "racer", "paged", "insider"
    puts += [f"examples/guest/{name}.elf" for name in names]
    puts += [f"examples/guest/{name}.cfg" for name in ("checker", "insider")]
    puts += ["tests/lab/guest/events.elf", "tests/lab/guest/corners.elf"]
    puts += ["examples/count_system_calls.py"]
    puts += ["docs/start.md", "docs/howto/ve-inside.md"]
    command = [sys.executable, str(HERE / "run.py"), "--xen", xen, "--results", str(results)]
    command += ["--timeout", str(LIMIT)]
    command += ["--wheel", str(wheel), *more]
    for put in puts:
        command += ["--put", f"{TREE / put}:{put}"]
    command += ["--put", f"{package('capstone')}:capstone"]
    text = job.format(pytest=PYTEST, skewed=SKEWED)
    return subprocess.run([*command, "--", text], check=False).returncode


def total(results: Path) -> dict[str, int]:
    """Add up the junit reports below a directory."""
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for report in results.rglob("*.xml"):
        for suite in ET.parse(report).getroot().iter("testsuite"):
            for key in counts:
                counts[key] += int(suite.get(key, 0))
    return counts


def main() -> int:
    """Run the suite for one release."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--xen", choices=[*RELEASES], default="4.17", help="release to boot")
    parser.add_argument("--results", type=Path, help="directory (default: results/RELEASE)")
    arguments = parser.parse_args()
    results = arguments.results or TREE / "results" / arguments.xen
    shutil.rmtree(results, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="xenaltp2m-suite-") as name:
        scratch = Path(name)
        wheel = build_wheel(scratch)
        skew = []
        if arguments.xen != SKEWED:
            skew = ["--put", f"{foreign_libraries(scratch / 'skew')}:skew"]
        status = boot(arguments.xen, wheel, results / "live", MAIN, "--linux", *skew)
        off = boot(arguments.xen, wheel, results / "off", OFF, "--xen-option=-altp2m")
    counts = total(results)
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    say(f"Xen {arguments.xen}: junit reports and logs in {results}")
    print(f"{passed} passed, {failed} failed, {counts['skipped']} skipped", flush=True)
    return status or off or int(not passed)


if __name__ == "__main__":
    sys.exit(main())
