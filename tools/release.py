"""``make release URL=https://...``: build what is uploaded, if everything for it is there.

The public address of the repository stands in one place, ``Repository`` in ``[project.urls]`` of
pyproject.toml. This command fills it in there and in the files that repeat it for their readers
(SECURITY.md, CITATION.cff), checks version, CHANGELOG and working tree, and builds sdist and wheel
into ``dist/``. It uploads nothing.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.long_description import (
    long_description,
    read_repository,
    read_version,
    relative_links,
)

__all__ = ["check", "main"]

ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.release")
    parser.add_argument("--url", default="", help="public address of the repository")
    args = parser.parse_args(argv)
    try:
        check(ROOT, args.url)
    except ValueError as error:
        print(f"no release: {error}", file=sys.stderr)
        return 2
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(dist), str(ROOT)], check=True)
    built = sorted(map(str, dist.iterdir()))
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *built], check=True)
    version = read_version(ROOT)
    print(f"\nNow: git tag v{version}, push it, and twine upload {' '.join(built)}")
    return 0


def check(root: Path, url: str = "") -> None:
    """Check all that a release needs, and fill in the address.

    Args:
        root: Of the repository.
        url: Its public address; empty for the one in pyproject.toml.

    Raises:
        ValueError: For what is missing, in words.
    """
    version = read_version(root)
    url = url.rstrip("/") or read_repository(root)
    if not url:
        raise ValueError(
            "`URL` must be the repository's public address: make release URL=https://..."
        )
    if not re.fullmatch(r"https://[\w.-]+\.\w+(/[\w.~-]+)+", url):
        raise ValueError(f"`URL` must be an https address of a repository, got {url!r}")
    if changed := _git(root, "status", "--porcelain"):
        raise ValueError(f"the working tree must be clean, but has\n{changed}\ncommit or stash it")
    heading = rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)$"
    found = re.search(heading, (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(
            f"CHANGELOG.md must have a section of this version, dated: ## [{version}] - "
            "YYYY-MM-DD; write it"
        )
    if filled := _fill(root, url, version, date=found[1]):
        raise ValueError(
            f"address, version and date were filled in now: look at {', '.join(filled)}, commit "
            "and run the command again"
        )
    readme = (root / "README.md").read_text()
    if left := relative_links(long_description(readme, url, version)):
        raise ValueError(
            f"README.md must have links of the form [text](path) alone, got {', '.join(left)}: "
            "write them so"
        )


def _fill(root: Path, url: str, version: str, date: str) -> list[str]:
    """Write what a release knows into the files that say it; returns those that have changed."""
    addresses = {
        "Repository": url,
        "Changelog": f"{url}/blob/v{version}/CHANGELOG.md",
        "Issues": f"{url}/issues",
    }
    table = "".join(f'{name} = "{address}"\n' for name, address in addresses.items())
    citation = f'version: {version}\ndate-released: "{date}"\nrepository-code: "{url}"\n'
    changes = {
        "pyproject.toml": (r"(?<=\[project\.urls\]\n)(#[^\n]*\n)?(\w+ = [^\n]*\n)*", r"\1" + table),
        "CITATION.cff": (r"^version: .*\n(date-released: .*\n)?(repository-code: .*\n)?", citation),
        "SECURITY.md": (
            r"(?<=<!-- contact -->\n)(.*\n)*(?=<!-- /contact -->)",
            f"{url}/security/advisories/new\n",
        ),
    }
    filled = []
    for name, (place, text) in changes.items():
        before = (root / name).read_text()
        after, count = re.subn(place, text, before, count=1, flags=re.MULTILINE)
        if count == 0:
            raise ValueError(f"{name} must have a place for the address, got none: {place}")
        if after != before:
            (root / name).write_text(after)
            filled.append(name)
    return filled


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
