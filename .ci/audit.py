"""Print every package that lalm and its extras need, with its version and licence.

Exit code 1 for a licence that would bind users of lalm (GPL and relatives) or that is not known.

    python .ci/audit.py

What is installed here is read, nothing is downloaded. A package that is required but not installed is listed as such.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("sts", "track", "serve", "dev")
# MPL-2.0 binds changes to its own files, not users; NVIDIA's libraries come with torch's CUDA builds only.
PERMISSIVE = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|ISC|PSF|Python Software Foundation|MPL|Mozilla|Unlicense|HPND|Zlib|CC0|CMU-Mu|"
    r"Public Domain|NVIDIA|MIT-0)\b",
    re.IGNORECASE,
)
COPYLEFT = re.compile(r"\b[AL]?GPL|General Public License|SSPL|BUSL|\bEUPL", re.IGNORECASE)


def licence_of(name: str) -> str:
    """The licence as the metadata of an installed package give it, else ''."""
    found = distribution(name).metadata
    if expression := found.get("License-Expression"):
        return expression
    marks = [mark.rpartition(":: ")[2] for mark in found.get_all("Classifier") or [] if mark.startswith("License ::")]
    marks = [mark for mark in marks if mark != "OSI Approved"]
    text = " ".join((found.get("License") or "").split())[:60]
    return ", ".join(marks) or text


def is_refused(licence: str) -> bool:
    """Whether a licence binds users, or is not known. "GPL OR MIT" leaves the choice."""
    choices = re.split(r"\s+OR\s+", licence)
    return not any(PERMISSIVE.search(choice) and not COPYLEFT.search(choice) for choice in choices)


def needed_packages(root: str, extras: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The installed packages that `root` needs, and those that are not installed."""
    found, missing, waiting = set(), set(), [(canonicalize_name(root), extras)]
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in found:
            continue
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            missing.add(name)
            continue
        found.add((name, wanted))
        for text in requires:
            needed = Requirement(text)
            environments = [{"extra": extra} for extra in (*wanted, "")]
            if needed.marker is None or any(needed.marker.evaluate(environment) for environment in environments):
                waiting.append((canonicalize_name(needed.name), tuple(sorted(needed.extras))))
    return sorted({name for name, _ in found} - {canonicalize_name(root)}), sorted(missing)


def main() -> int:
    packages, missing = needed_packages("lalm", EXTRAS)
    refused = []
    for name in packages:
        licence = licence_of(name)
        print(f"{name:28}{distribution(name).version:18}{licence or 'unknown'}")
        if is_refused(licence):
            refused.append(name)
    for name in missing:
        print(f"{name:28}{'not installed':18}")
    print(f"audit: {len(packages)} packages, {len(refused)} refused{': ' * bool(refused)}{', '.join(refused)}")
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
