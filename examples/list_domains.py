# SPDX-License-Identifier: LGPL-2.1-or-later
"""List the domains of a host, and who may use the altp2m of each."""

import argparse

import xenaltp2m as xa


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connect", choices=("libxc", "mock"), default="mock")
    options = parser.parse_args()

    with xa.connect(options.connect) as xen:
        print(f"Xen {xen.release}")
        for info in xen.domains():
            with xen.domain(info.domid) as domain:
                mode = domain.altp2m_mode.name.lower() if info.hvm else "none: it is PV"
                print(f"{info.domid:5} {domain.name}: {info.vcpus} vCPU(s), altp2m {mode}")


if __name__ == "__main__":
    main()
