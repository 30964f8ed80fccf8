"""Bytes flipped and files cut short: each time it is noticed, or it changes nothing."""

import contextlib
import functools
import gzip
import hashlib
import os
import random
import shutil
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import torch
from helpers import blobs, tiny_book

import kdlib
from kdlib import data, files, loop, runs, store, weights
from kdlib.book import chapters, execute, reference
from torture import ordeal
from torture.ordeal import Lost, Tally, Wrong

# What kdlib refuses a damaged file with.
REFUSALS = (data.DataError, store.StoreError, chapters.BookError, ValueError)


def damage(rng: random.Random, path: Path) -> str:
    """Change one bit or byte of a file, or cut it short; in words."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    if rng.random() < 0.25:
        path.write_bytes(content[:place])
        return f"{path.name} cut to {place} of {len(content)} bytes"
    flip = rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
    content[place] ^= flip
    path.write_bytes(content)
    return f"{path.name}, byte {place} of {len(content)} ^ {flip}"


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """A refusal is one of kdlib's own errors, in one line, and means that damage was found."""
    try:
        yield
    except REFUSALS as error:
        if "\n" in str(error) or not str(error):
            raise Lost(f"a refusal that is not one line: {error!r}") from None


def in_datasets(rng: random.Random, folder: Path, budget: float) -> Tally:
    """Files of MNIST's layout, and those of mnist-5k."""
    return ordeal.repeat(a_dataset, rng, folder, ordeal.times(40, budget))


def a_dataset(rng: random.Random, folder: Path) -> None:
    """Small files in the place of MNIST's: how they are read and checked is the same."""
    names = list(files.SOURCES["mnist"][1])
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, array in zip(names, blobs(), strict=True):
        kind = 0x800 + array.dim()
        head = struct.pack(f">{1 + array.dim()}I", kind, *array.shape)
        (raw / name).write_bytes(head + array.to(torch.uint8).numpy().tobytes())
    digests = {name: hashlib.sha256((raw / name).read_bytes()).hexdigest() for name in names}
    sample = folder / "mnist_5k.csv.gz"
    with gzip.open(sample, "wb", compresslevel=1) as packed:
        np.savetxt(packed, np.random.default_rng(0).integers(0, 10, (50, 785)), "%d", ",")
    digest = hashlib.sha256(gzip.decompress(sample.read_bytes())).hexdigest()
    with replaced(files, SOURCES={"mnist": ("MNIST", digests)}, DIGEST_5K=digest,
                  path_5k=lambda: sample):  # fmt: skip
        expected = {name: arrays(name, folder) for name in ("mnist", "mnist-5k")}
        name = rng.choice(["mnist", "mnist", "mnist-5k"])
        what = damage(rng, sample if name == "mnist-5k" else raw / rng.choice(names))
        with refused():
            if not same_arrays(arrays(name, folder), expected[name]):
                raise Wrong(f"other digits, unnoticed: {what}")
    data._load.cache_clear()
    data._read_5k.cache_clear()


def arrays(name: str, folder: Path) -> list[torch.Tensor]:
    data._load.cache_clear()
    data._read_5k.cache_clear()
    found = data.load(name, "cpu", folder)
    return [part for split in (found.full, found.test) for part in (split.images, split.labels)]


def same_arrays(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(one.equal(other) for one, other in zip(first, second, strict=True))


@contextlib.contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    """A module with other values."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)


def in_runs(rng: random.Random, folder: Path, budget: float) -> Tally:
    """Stored runs: read, used as teachers, listed."""
    os.environ["KDLIB_HOME"] = str(folder / "whole")
    made = quietly(ordeal.recipes(random.Random(0))[:1])
    a_run = functools.partial(a_stored_run, folder / "whole", made)
    return ordeal.repeat(a_run, rng, folder, ordeal.times(50, budget))


def a_stored_run(whole: Path, made: list[kdlib.Run], rng: random.Random, folder: Path) -> None:
    """Damage a run, list it, and ask for it again."""
    shutil.copytree(whole, folder / "home")
    listed = {entry.key: entry for entry in store.stored()}
    # Most of a run is weights, and most of what can be read wrongly is in the record.
    path = rng.choice(sorted(store.folder().glob(rng.choice(["*/run.json", "[!.]*/*"]))))
    what = damage(rng, path)
    for entry in store.stored():
        # The size is that of the files as they are.
        same = {"size_bytes": entry.size_bytes, "key": entry.key}
        if entry.status != "damaged" and vars(entry) != vars(listed[entry.key]) | same:
            raise Wrong(f"a list with other numbers, unnoticed: {what}")
    for before, run in zip(made, quietly([run.recipe for run in made]), strict=True):
        facts = [(one.seconds, one.provenance) for one in (before, run)]
        if ordeal.bits(run) != ordeal.bits(before) or (run.cached and facts[0] != facts[1]):
            raise Wrong(f"another run, unnoticed: {what}")
    ordeal.whole()


def quietly(recipes: list[kdlib.Recipe]) -> list[kdlib.Run]:
    """Runs, without the warning that one was damaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [kdlib.train(recipe, "cpu") for recipe in recipes]


def in_checkpoints(rng: random.Random, folder: Path, budget: float) -> Tally:
    """The checkpoint of an interrupted training."""
    return ordeal.repeat(a_checkpoint, rng, folder, ordeal.times(40, budget))


_bits: dict[kdlib.Recipe, str] = {}


def a_checkpoint(rng: random.Random, folder: Path) -> None:
    """Interrupt a training, damage its checkpoint, and go on."""
    recipe = ordeal.recipes(random.Random(rng.randrange(2)))[1]
    if recipe not in _bits:
        (run,) = quietly([recipe])
        _bits[recipe] = ordeal.bits(run)
        store.prune()
    left = rng.randrange(1, 8)
    save = store.save_checkpoint

    def interrupt(*given: Any) -> None:
        nonlocal left
        save(*given)
        left -= 1
        if not left:
            raise KeyboardInterrupt

    with (
        replaced(store, save_checkpoint=interrupt),
        replaced(runs, CHECKPOINT_SECONDS=0.0),
        contextlib.suppress(KeyboardInterrupt),
    ):
        quietly([recipe])
    (path,) = (store.folder() / ".checkpoints").iterdir()
    what = damage(rng, path)
    (run,) = quietly([recipe])
    if ordeal.bits(run) != _bits[recipe]:
        raise Wrong(f"another run, unnoticed: {what}")
    ordeal.tidy()


def in_pages(rng: random.Random, folder: Path, budget: float) -> Tally:
    """Executed pages: one that is damaged is neither up to date nor published."""
    return ordeal.repeat(a_page, rng, folder, ordeal.times(30, budget))


def a_page(rng: random.Random, folder: Path) -> None:
    """Damage a page; see what `kdlib run` and `kdlib build` would make of it."""
    book = tiny_book(folder / "book", {"01_chapter": ["print('errors', 67)"] * 3})
    with contextlib.chdir(book):
        (job,), _ = chapters.jobs(["01_chapter"], "quick", {})
        path = as_executed(job)
        before = shown(path)
        what = damage(rng, path)
        with refused(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if execute.is_up_to_date(job) and shown(path) != before:
                raise Wrong(f"a page with other content counts as up to date: {what}")
            if chapters.made(path) and shown(path) != before:
                raise Wrong(f"a page with other content is published: {what}")


def as_executed(job: chapters.Job) -> Path:
    """The page of a chapter as the press leaves it, without running papermill."""
    notebook = chapters.read_notebook(job.source)
    for cell in notebook.cells[2:]:
        cell.outputs = [nbformat.v4.new_output("stream", text="errors 67\n")]
    job.page.parent.mkdir(parents=True)
    execute.publish(notebook, job, execute.digest_of_sources(job), 1.0, job.page)
    return job.page


def shown(path: Path) -> Any:
    """What a reader sees of a page, and how it says it was made."""
    try:
        notebook = chapters.read_notebook(path)
    except Exception:
        return None
    return [[(c.cell_type, c.source, c.get("outputs")) for c in notebook.cells], notebook.metadata]


def in_records(rng: random.Random, folder: Path, budget: float) -> Tally:
    """The book's recorded results."""
    return ordeal.repeat(a_record, rng, folder, ordeal.times(20, budget))


def a_record(rng: random.Random, folder: Path) -> None:
    """Damage a copy of a record, then read it as a chapter does."""
    original = rng.choice(sorted(reference.folder().glob("*.json")))
    copy = Path(shutil.copy(original, folder))
    expected = reference._read(copy)
    what = damage(rng, copy)
    with refused():
        if reference._read(copy) != expected:
            raise Wrong(f"other results, unnoticed: {what}")


def in_shipped_weights(rng: random.Random, folder: Path, budget: float) -> Tally:
    """The networks that come with kdlib, and what is recorded about them."""
    os.environ["KDLIB_HOME"] = str(folder / "store")
    (run,) = quietly(ordeal.recipes(random.Random(0))[1:2])
    a_network = functools.partial(a_shipped_network, run)
    return ordeal.repeat(a_network, rng, folder, ordeal.times(20, budget))


def a_shipped_network(run: kdlib.Run, rng: random.Random, folder: Path) -> None:
    """Damage a small network."""
    weights.keep("small", run, folder)
    expected = weights.pretrained("small", "cpu", folder=folder)
    what = damage(rng, folder / rng.choice(["small.json", "small.safetensors"]))
    with refused():
        found = weights.pretrained("small", "cpu", folder=folder)
        facts = [found.recipe, found.metrics, found.seconds, found.provenance]
        if facts != [expected.recipe, expected.metrics, expected.seconds, expected.provenance]:
            raise Wrong(f"other facts, unnoticed: {what}")
        if ordeal.bits(found) != ordeal.bits(expected):
            raise Wrong(f"other weights, unnoticed: {what}")
        loop.predict(found.model(), data.load("blobs", "cpu").test.images)
