"""The command line: papermill over the chain of chapters, then the site."""

import argparse
import sys
from collections.abc import Sequence

EXAMPLES = """\
examples:
  kdlib run                                        all chapters, at a laptop's scale
  kdlib run --profile smoke                        the whole chain in two minutes
  kdlib run 03_temperature -p temperatures '[1, 4, 20]' -p seed 3
  kdlib run --plan                                 what would be trained, and how long it takes
  kdlib build                                      the site, from what has been executed
  kdlib data mnist --fetch                         download MNIST and check it
  kdlib runs --prune                               forget all trained networks

folders: KDLIB_HOME holds the runs and the data (default: the platform's cache folder),
KDLIB_DATA the datasets alone, in torchvision's layout.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it did what was asked, 1 with one line that says why not."""
    options = _parser().parse_args(arguments)
    from kdlib.book.chapters import BookError
    from kdlib.data import DataError
    from kdlib.store import StoreError

    try:
        return int(options.command(options) or 0)
    except (BookError, DataError, StoreError, ValueError, OSError) as error:
        print(f"kdlib: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"kdlib: this command needs {error.name}: pip install 'kdlib[book]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nkdlib: stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kdlib",
        description="Execute and render the book on knowledge distillation.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="execute chapters through papermill")
    run.add_argument("chapters", nargs="*", metavar="CHAPTER", help="default: all, in order")
    run.add_argument(
        "--profile", choices=("smoke", "quick", "full"), default="quick",
        help="scale: smoke (tests), quick (the notebooks' own), full (a GPU)",
    )  # fmt: skip
    run.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="given",
        help="a parameter for every chosen chapter that has it, as papermill takes it",
    )  # fmt: skip
    run.add_argument("--force", action="store_true", help="execute what is up to date too")
    run.add_argument("--plan", action="store_true", help="list the runs and their time only")
    run.set_defaults(command=_run)

    build = commands.add_parser("build", help="render what has been executed to _build/html")
    build.add_argument(
        "--profile", choices=("smoke", "quick", "full"),
        help="pages of this profile alone (default: the latest of each chapter)",
    )  # fmt: skip
    build.set_defaults(command=_build)

    data = commands.add_parser("data", help="say which datasets are there, or fetch them")
    data.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    data.add_argument("--fetch", action="store_true", help="download what is missing or damaged")
    data.set_defaults(command=_data)

    runs = commands.add_parser("runs", help="list the trained networks in the store")
    runs.add_argument(
        "--prune", nargs="*", metavar="KEY", help="remove runs by key; without a key, all"
    )
    runs.set_defaults(command=_runs)

    reference = commands.add_parser("reference", help="results that are recorded in the book")
    deeds = reference.add_subparsers(required=True, metavar="ACTION")
    record = deeds.add_parser("record", help="write chapters' full results into book/reference")
    record.add_argument("chapters", nargs="*", metavar="CHAPTER", help="default: all that ran")
    record.add_argument("--profile", default="full")
    record.add_argument("--commit", help="of the code that ran, where this is no clone")
    record.set_defaults(command=_record)
    return parser


def _run(options: argparse.Namespace) -> None:
    from kdlib.book import chapters as book
    from kdlib.book import execute as chain

    chosen = book.choose(options.chapters)
    jobs, note = book.jobs(chosen, options.profile, dict(options.given))
    if note:
        print(f"kdlib: {note}", flush=True)
    if options.plan:
        for job in jobs:
            print("\n".join(chain.rehearse(job)), flush=True)
        return
    for job in jobs:
        print(f"{job.chapter}: ", end="", flush=True)
        print(chain.execute(job, force=options.force), flush=True)


def _build(options: argparse.Namespace) -> None:
    from kdlib.book import site

    index = site.build(options.profile)
    print("\n".join(site.summary(options.profile)))
    print(f"the book is at {index}")


def _data(options: argparse.Namespace) -> int:
    from kdlib import data

    unknown = set(options.names) - set(data.names())
    if unknown:
        raise ValueError(f"unknown dataset {unknown.pop()!r}: expected {', '.join(data.names())}")
    chosen = [s for s in data.available() if not options.names or s.name in options.names]
    if options.fetch:
        for status in chosen:
            if status.state != "verified":
                data.fetch(status.name)
        chosen = [s for s in data.available() if not options.names or s.name in options.names]
    for status in chosen:
        print(f"{status.name:14} {status.state:9} {status.folder}  ({status.detail})")
    return int(bool(options.names) and any(status.state != "verified" for status in chosen))


def _runs(options: argparse.Namespace) -> None:
    from kdlib import store

    if options.prune is not None:
        freed = store.prune(options.prune or None)
        print(f"{freed / 2**20:.1f} MiB freed in {store.folder()}")
        return
    entries = store.stored()
    for entry in entries:
        recipe = entry.recipe
        print(
            f"{entry.key}  {recipe.get('model', '?'):16} {recipe.get('dataset', '?'):14}"
            f"{'distilled' if recipe.get('teacher') else 'hard':10}{entry.status:9}"
            f"{entry.seconds:7.1f} s {entry.size_bytes / 2**20:7.2f} MiB  {entry.created}"
        )
    total = sum(entry.size_bytes for entry in entries) / 2**20
    print(f"{len(entries)} runs, {total:.1f} MiB, in {store.folder()}")


def _record(options: argparse.Namespace) -> None:
    from kdlib.book import chapters as book
    from kdlib.book import reference

    named = book.choose(options.chapters) if options.chapters else reference.kept(options.profile)
    for chapter in named:
        print(reference.record(chapter, options.profile, options.commit))
