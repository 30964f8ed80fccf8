"""Execute and render the book on knowledge distillation.

examples:
  kdlib run                                        all chapters, at a laptop's scale
  kdlib run --profile smoke                        the whole chain in about four minutes
  kdlib run 03_temperature -p temperatures '[1, 4, 20]' -p seed 3
  kdlib run --plan                                 what would be trained, and how long it takes
  kdlib build                                      the site, from what has been executed
  kdlib data mnist --fetch                         download MNIST and check it
  kdlib runs --prune                               remove all trained networks
  kdlib export mnist-plain-student out.onnx        a network as a file for other programs

folders: KDLIB_HOME holds the runs and the data (default: the platform's cache folder),
KDLIB_DATA the datasets alone, in torchvision's layout.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kdlib import check, data, export, store
from kdlib.book import chapters, execute, reference

PROFILES = ("smoke", "quick", "full")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it is done, 1 with one line that tells why not."""
    options = _parser().parse_args(arguments)
    # A terminal's encoding may lack “–”, and a line with “?” is better than none.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        return int(options.command(options) or 0)
    except ModuleNotFoundError as error:
        extra = "export" if options.command is _export else "book"
        reason = f"this command needs {error.name}: in a clone, pip install '.[{extra}]'"
    except (chapters.BookError, data.DataError, store.StoreError, ValueError, OSError) as error:
        reason = str(error)
    except KeyboardInterrupt:
        print("\nkdlib: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"kdlib: {reason}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    # The text at the top of this file is the manual.
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("kdlib", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _run_options(commands.add_parser("run", help="execute chapters through papermill"))
    build = commands.add_parser("build", help="render what has been executed to _build/html")
    build.add_argument(
        "--profile", choices=PROFILES,
        help="pages of this profile alone (default: the latest of each chapter)",
    )  # fmt: skip
    build.set_defaults(command=_build)
    files = commands.add_parser("data", help="list the datasets, or fetch them")
    files.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    files.add_argument("--fetch", action="store_true", help="download what is missing or damaged")
    files.set_defaults(command=_data)
    runs = commands.add_parser("runs", help="list the trained networks in the store")
    prune = "remove runs by key; without a key, all of them"
    runs.add_argument("--prune", nargs="*", metavar="KEY", help=prune)
    runs.set_defaults(command=_runs)
    _export_options(commands.add_parser("export", help="write a trained network as an ONNX file"))
    _record_options(commands.add_parser("reference", help="results recorded in the book"))
    return parser


def _run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("chapters", nargs="*", metavar="CHAPTER", help="default: all, in order")
    run.add_argument(
        "--profile", choices=PROFILES, default="quick",
        help="scale: smoke (tests), quick (the notebooks' own), full (a GPU)",
    )  # fmt: skip
    run.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="given",
        help="a parameter for every chosen chapter that has it, as papermill takes it",
    )  # fmt: skip
    run.add_argument(
        "--jobs", type=int, metavar="N",
        help="chapters executed at a time (default: by cores and memory; 1 with a GPU)",
    )  # fmt: skip
    run.add_argument("--force", action="store_true", help="execute what is up to date too")
    run.add_argument("--plan", action="store_true", help="only list the runs and their time")
    run.set_defaults(command=_run)


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="pretrained, or the start of a run's key")
    parser.add_argument("path", metavar="FILE", type=Path, help="the file to write: out.onnx")
    parser.add_argument("--int8", action="store_true", help="quantise its linear layers")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.set_defaults(command=_export)


def _record_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    record = actions.add_parser("record", help="write chapters' full results into book/reference")
    record.add_argument("chapters", nargs="*", metavar="CHAPTER", help="default: all that ran")
    record.add_argument("--profile", default="full")
    record.add_argument("--commit", help="of the code that ran, if this is no clone")
    record.set_defaults(command=_record)


def _run(options: argparse.Namespace) -> None:
    chosen = chapters.choose(options.chapters)
    jobs, note = chapters.jobs(chosen, options.profile, dict(options.given))
    many = execute.at_once(len(jobs)) if options.jobs is None else options.jobs
    check.value("--jobs", many, check.COUNT)
    if note:
        print(f"kdlib: {note}", flush=True)
    if options.plan:
        for job in jobs:
            print(execute.rehearse(job), flush=True)
    else:
        execute.execute(jobs, many, lambda line: print(line, flush=True), force=options.force)


def _build(options: argparse.Namespace) -> None:
    # Importing it needs the book's packages, which the other commands do without.
    from kdlib.book import site

    index = site.build(options.profile)
    print("\n".join(site.summary(options.profile)))
    print(f"the book is at {index}")


def _data(options: argparse.Namespace) -> int:
    known = check.one_of(*data.names())
    names = [check.value("dataset", name, known) for name in options.names] or data.names()
    for status in data.available():
        if options.fetch and status.name in names and status.state != "verified":
            data.fetch(status.name)
    chosen = [status for status in data.available() if status.name in names]
    for status in chosen:
        print(f"{status.name:14} {status.state:9} {status.folder}  ({status.detail})")
    return int(bool(options.names) and any(status.state != "verified" for status in chosen))


def _runs(options: argparse.Namespace) -> None:
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


def _export(options: argparse.Namespace) -> None:
    print(export.export(options.name, options.path, int8=options.int8, force=options.force))


def _record(options: argparse.Namespace) -> None:
    named = chapters.choose(options.chapters) if options.chapters else None
    for chapter in named or reference.kept(options.profile):
        print(reference.record(chapter, options.profile, options.commit))
