"""Print the pinned requirements that this interpreter lacks; list other versions on stderr."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def pins(path: Path) -> list[tuple[str, str]]:
    """Return (package, version) of every line that applies to this Python, `-r` files inline."""
    found = []
    for line in path.read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            found += pins(path.parent / line[3:].strip())
        elif line:
            pin, _, marker = (part.strip() for part in line.partition(";"))
            match = re.fullmatch(r'python_version (>=|<) "3\.(\d+)"', marker) if marker else None
            if match and (sys.version_info[1] >= int(match[2])) != (match[1] == ">="):
                continue
            name, _, number = pin.partition("==")
            found.append((name, number))
    return found


def main() -> None:
    other = []
    for name, number in pins(Path(sys.argv[1])):
        try:
            have = version(name)
        except PackageNotFoundError:
            # Any build of DALI will do: the right one depends on the CUDA of this environment.
            if not (name.startswith("nvidia-dali-cuda") and _has_dali()):
                print(f"{name}=={number}")
            continue
        if have.split("+")[0] != number:
            other.append(f"{name} {have} (tested: {number})")
    if other:
        print(
            f"note: the active environment has {', '.join(other)}; left unchanged", file=sys.stderr
        )


def _has_dali() -> bool:
    from importlib.util import find_spec

    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    main()
