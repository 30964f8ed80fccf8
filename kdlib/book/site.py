"""The site: `jupyter-book build`, and the finished pages in place of the old ones."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kdlib.book.chapters import BookError, chapters, made, pages, root

# In this Python, whatever the PATH has. Any warning is a failure, a broken reference too.
COMMAND = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build"]
STRICT = ["-W", "--keep-going", "-n"]


def build(profile: str | None = None) -> Path:
    """Render the site into _build/html; its index page.

    profile: of the executed pages that are shown; by default each chapter's latest.
    The old site stays until the new one is whole. Raises BookError when a page is damaged, holds
    an error or Jupyter Book complains of anything.
    """
    work = root() / "_build"
    work.mkdir(exist_ok=True)
    for page in pages(profile).values():
        made(page)
    # A name that the next execution removes, should this process be killed.
    with tempfile.TemporaryDirectory(dir=work, prefix=f".run-{os.getpid()}-") as folder:
        finished = subprocess.run(
            [*COMMAND, ".", "--path-output", folder, *STRICT],
            cwd=root(),
            # Some of Sphinx's extensions open files in the locale's encoding.
            env=os.environ | {"KDLIB_PROFILE": profile or "", "PYTHONUTF8": "1"},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        fresh = Path(folder) / "_build" / "html"
        if finished.returncode or not (fresh / "index.html").is_file():
            log = work / "build.log"
            log.write_text(finished.stdout + finished.stderr, encoding="utf-8")
            lines = re.sub(r"\x1b\[[\d;]*m", "", finished.stderr).splitlines()
            wrong = [line for line in lines if re.search("WARNING|ERROR|Error|holds", line)]
            raise BookError("\n".join(["the site could not be built:", *wrong[:20], f"see {log}"]))
        _swap(fresh, work / "html")
    return work / "html" / "index.html"


def summary(profile: str | None = None) -> list[str]:
    """One line per chapter: what was executed, at which profile, on which data, how long."""
    ran = pages(profile)
    lines = []
    for chapter in chapters():
        if chapter not in ran:
            lines.append(f"  {chapter:28} not executed yet")
            continue
        about = made(ran[chapter])
        lines.append(
            f"  {chapter:28} {about['profile']:6} {about['dataset']:14} "
            f"{about['seconds']:6.0f} s  {about['date']}"
        )
    return lines


def _swap(fresh: Path, place: Path) -> None:
    """Put the new site where the old one is."""
    old = place.with_name(f".old-{place.name}")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.replace(place, old)
    os.replace(fresh, place)
    shutil.rmtree(old, ignore_errors=True)
