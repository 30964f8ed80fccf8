"""The store: killed while writing, bytes changed, disk full: never a wrong run, nothing lost."""

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import a_full_disk, exit_codes, process
from torch import Tensor

from kdlib import files, store
from kdlib.store import StoreError

RECORD = {
    "recipe": {"model": "mlp-8", "seed": 0},
    "metrics": {"status": "ok", "test_errors": 7},
    "curves": {"step": [1, 2], "train_loss": [0.5, math.nan]},
    "seconds": 1.5,
    "provenance": {"date": "2025-01-01T00:00:00+00:00"},
}
WEIGHTS = {"b": torch.arange(3.0), "a.weight": torch.randn(4, 3, dtype=torch.float64).T}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def is_whole(found: tuple[dict[str, Any], dict[str, Tensor]] | None) -> bool:
    """Whether a run came back as it was written."""
    if found is None:
        return False
    record, weights = found
    kept = {name: record[name] for name in RECORD}
    return (
        json.dumps(kept) == json.dumps(RECORD)  # as text, since NaN is not itself
        and weights.keys() == WEIGHTS.keys()
        and all(torch.equal(weight, WEIGHTS[name]) for name, weight in weights.items())
    )


def test_the_weights_come_in_one_order() -> None:
    store.write("key", RECORD, {name: torch.zeros(1) for name in "fdbaec"})
    for _ in range(3):
        found = store.read("key")
        assert found is not None
        assert list(found[1]) == list("abcdef")


def visible() -> list[str]:
    return sorted(path.name for path in store.folder().glob("[!.]*"))


def test_a_run_comes_back_as_it_was_written(home: Path) -> None:
    assert store.stored() == []
    assert store.read("key") is None
    store.write("key", RECORD, WEIGHTS)
    assert is_whole(store.read("key"))
    assert store.folder() == home / "runs"
    assert sorted(path.name for path in (home / "runs").glob("key/*")) == [
        "run.json",
        "weights.safetensors",
    ]


def test_tensors_that_share_memory_are_stored_each_under_its_name() -> None:
    base = torch.arange(6.0).view(2, 3)
    shared = {"a": base, "tied": base, "view": base[0], "transposed": base.T, "b": base[:, 1]}
    store.write("key", RECORD, shared)
    found = store.read("key")
    assert found is not None
    assert found[1].keys() == shared.keys()
    assert all(torch.equal(found[1][name], weight) for name, weight in shared.items())


def test_what_is_stored_is_listed_oldest_first() -> None:
    store.write("new", RECORD | {"provenance": {"date": "2025-02-01"}}, WEIGHTS)
    store.write("old", RECORD, WEIGHTS)
    old, new = store.stored()
    assert (old.key, new.key) == ("old", "new")
    assert (old.recipe, old.seconds, old.status) == (RECORD["recipe"], 1.5, "ok")
    files = list((store.folder() / "old").iterdir())
    assert old.size_bytes == sum(file.stat().st_size for file in files) > 200
    path = store.folder() / "old" / "run.json"
    path.write_text(path.read_text().replace('"ok"', '"oh"'))
    assert [entry.status for entry in store.stored()] == ["damaged", "ok"]
    (store.folder() / "new" / "run.json").write_text("{")
    assert [entry.status for entry in store.stored()] == ["damaged", "damaged"]


# --- damage


@pytest.mark.parametrize("name", ["run.json", "weights.safetensors"])
@pytest.mark.filterwarnings("ignore:the stored run")
def test_no_changed_byte_gives_another_run(name: str) -> None:
    store.write("key", RECORD, WEIGHTS)
    path = store.folder() / "key" / name
    content = path.read_bytes()
    noticed = 0
    for place in range(0, len(content), 5):
        for flip in (1, 64, 255):
            damaged = bytearray(content)
            damaged[place] ^= flip
            path.write_bytes(damaged)
            found = store.read("key")
            assert found is None or is_whole(found)  # a blank between two words means nothing
            noticed += found is None
    assert noticed > 0.9 * (len(content) // 5) * 3 or name == "run.json"
    path.write_bytes(content)
    assert is_whole(store.read("key"))


@pytest.mark.parametrize("name", ["run.json", "weights.safetensors"])
@pytest.mark.parametrize("left", [0, 1, 100, -1])
def test_a_truncated_run_is_none(name: str, left: int) -> None:
    store.write("key", RECORD, WEIGHTS)
    path = store.folder() / "key" / name
    path.write_bytes(path.read_bytes()[:left])
    with pytest.warns(UserWarning, match="the stored run .*key is damaged: it is trained again"):
        assert store.read("key") is None
    store.write("key", RECORD, WEIGHTS)
    assert is_whole(store.read("key"))


@pytest.mark.parametrize("text", ["null", "5", "[]", "{}", '{"digest": 1, "run": 2}', "\xff"])
def test_json_that_is_no_run_is_none(text: str) -> None:
    store.write("key", RECORD, WEIGHTS)
    (store.folder() / "key" / "run.json").write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match="damaged"):
        assert store.read("key") is None


def test_numbers_changed_by_hand_are_noticed() -> None:
    store.write("key", RECORD, WEIGHTS)
    path = store.folder() / "key" / "run.json"
    path.write_text(path.read_text().replace('"test_errors": 7', '"test_errors": 6'))
    with pytest.warns(UserWarning, match="damaged"):
        assert store.read("key") is None


def test_the_weights_of_another_run_are_noticed() -> None:
    store.write("key", RECORD, WEIGHTS)
    store.write("other", RECORD, {name: weight + 1 for name, weight in WEIGHTS.items()})
    shutil.copy(store.folder() / "other" / "weights.safetensors", store.folder() / "key")
    with pytest.warns(UserWarning, match="damaged"):
        assert store.read("key") is None


def test_a_run_under_another_key_is_not_given() -> None:
    store.write("key", RECORD, WEIGHTS)
    shutil.copytree(store.folder() / "key", store.folder() / "other")
    with pytest.warns(UserWarning, match="damaged"):
        assert store.read("other") is None


# --- killed while writing


class Killed(BaseException):
    """What no handler of errors catches: the rest of the process does not happen."""


DEEDS = [(os, "fsync"), (os, "replace"), (shutil, "rmtree"), (Path, "mkdir")]


@contextlib.contextmanager
def killed_at(number: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Iterator[None]:
    """In the place of the n-th deed of the disk comes an error."""
    left = [number]

    def instead(deed: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise error
            return deed(*arguments, **more)

        return act

    with monkeypatch.context() as patch:
        for owner, name in DEEDS:
            patch.setattr(owner, name, instead(getattr(owner, name)))
        yield


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("number", range(1, 12))
@pytest.mark.filterwarnings("ignore:the stored run")
def test_killed_anywhere_in_a_write(
    number: int, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("other", RECORD, WEIGHTS)
    if there:  # a damaged run is in the way
        store.write("key", RECORD | {"seconds": 9.0}, WEIGHTS)
        (store.folder() / "key" / "run.json").write_text("{")
    with contextlib.suppress(Killed), killed_at(number, monkeypatch, Killed()):
        store.write("key", RECORD, WEIGHTS)
    found = store.read("key")
    assert found is None or is_whole(found)
    assert is_whole(store.read("other"))
    assert {entry.key for entry in store.stored()} <= {"key", "other"}
    store.write("key", RECORD, WEIGHTS)
    assert is_whole(store.read("key"))
    assert visible() == ["key", "other"]
    assert not list(store.folder().glob(".*.new"))


def write_and_die(deed: str) -> None:
    """In a process of its own: killed, with nothing tidied up, at a deed of the disk."""

    def kill(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, deed, kill)
    store.write("key", RECORD, WEIGHTS)


@pytest.mark.parametrize("deed", ["fsync", "replace"])
def test_a_process_killed_while_it_writes(deed: str) -> None:
    store.write("other", RECORD, WEIGHTS)
    assert exit_codes(process(write_and_die, deed)) == [-signal.SIGKILL]
    assert list(store.folder().glob(".key.new/*"))  # it had begun
    assert store.read("key") is None
    assert [entry.key for entry in store.stored()] == ["other"]
    store.write("key", RECORD, WEIGHTS)
    assert is_whole(store.read("key"))
    assert not list(store.folder().glob(".key.new"))


# --- disks that are full, folders that cannot be written


def test_a_full_disk_loses_nothing() -> None:
    store.write("other", RECORD, WEIGHTS)
    store.save_checkpoint(["key"], {"step": 1})
    with a_full_disk(), pytest.raises(StoreError, match=r"cannot store a run in .*--prune.*stays"):
        store.write("key", RECORD, WEIGHTS)
    with a_full_disk(), pytest.raises(StoreError, match=r"cannot write a checkpoint .*stays"):
        store.save_checkpoint(["key"], {"step": 2})
    assert is_whole(store.read("other"))
    assert store.read("key") is None
    assert store.load_checkpoint(["key"]) == {"step": 1}
    assert not list(store.folder().rglob("*.new"))


@pytest.mark.parametrize("number", range(1, 10))
def test_an_error_anywhere_in_a_write_is_a_store_error(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("other", RECORD, WEIGHTS)
    full = OSError(errno.ENOSPC, "No space left on device")
    # The store's lock makes folders too.
    monkeypatch.setattr(store, "_alone", contextlib.nullcontext)
    deeds = [deed for deed in DEEDS if deed[1] != "rmtree"]
    monkeypatch.setattr("test_store.DEEDS", deeds)
    with killed_at(number, monkeypatch, full):
        expected = pytest.raises(StoreError, match="No space left on device")
        with expected if number <= 7 else contextlib.nullcontext():
            # For each of two files a folder, its bytes and its place, then the run's place.
            store.write("key", RECORD, WEIGHTS)
    assert is_whole(store.read("key")) is (number > 7)
    assert len(visible()) == 1 + (number > 7)
    assert not list(store.folder().rglob("*.new"))
    assert is_whole(store.read("other"))


@pytest.fixture
def locked_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store that may be read and not written, by a user who is not root."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    monkeypatch.setenv("KDLIB_HOME", str(place))
    store.write("other", RECORD, WEIGHTS)
    root = os.geteuid() == 0
    for path in (place, *place.rglob("*")):
        path.chmod(0o555)
    if root:
        os.seteuid(65534)
    yield place
    if root:
        os.seteuid(0)
    place.chmod(0o755)
    for folder, below, _ in os.walk(place):
        for name in below:
            (Path(folder) / name).chmod(0o755)
    shutil.rmtree(place)


def test_a_read_only_store_can_be_read_and_says_that_it_cannot_be_written(
    locked_place: Path,
) -> None:
    assert is_whole(store.read("other"))
    assert [entry.key for entry in store.stored()] == ["other"]
    with pytest.raises(StoreError, match=r"cannot store a run in .*Permission.*KDLIB_HOME"):
        store.write("key", RECORD, WEIGHTS)
    with pytest.raises(StoreError, match=r"cannot write to the store .*Permission.*KDLIB_HOME"):
        store.locked(["key"]).__enter__()
    with pytest.raises(StoreError, match=r"cannot write a checkpoint .*Permission.*KDLIB_HOME"):
        store.save_checkpoint(["key"], {"step": 1})


@pytest.fixture
def below_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that not even root can make."""
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "file"))


def test_a_store_that_cannot_be_made(below_a_file: None, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot store a run"):
        store.write("key", RECORD, WEIGHTS)
    with pytest.raises(StoreError, match="cannot write to the store"):
        store.locked(["key"]).__enter__()
    assert store.stored() == []
    assert (tmp_path / "file").read_text() == "no folder"


def test_a_checkpoint_folder_that_cannot_be_made(below_a_file: None) -> None:
    with pytest.raises(StoreError, match="cannot write a checkpoint"):
        store.save_checkpoint(["key"], {"step": 1})


def test_reading_from_a_store_that_cannot_be_made(below_a_file: None) -> None:
    assert store.read("key") is None
    assert store.load_checkpoint(["key"]) is None


# --- pruning


def test_what_a_process_writes_is_not_pruned_as_a_leftover(monkeypatch: pytest.MonkeyPatch) -> None:
    put = files.put
    pruning: list[Any] = []

    def put_while_another_prunes(path: Path, content: bytes) -> None:
        put(path, content)
        if not pruning:
            pruning.append(process(store.prune))
            pruning[0].join(0.5)  # it waits until the run is in its place
            assert pruning[0].is_alive()

    monkeypatch.setattr(files, "put", put_while_another_prunes)
    store.write("key", RECORD, WEIGHTS)
    assert exit_codes(*pruning) == [0]
    assert visible() == []


def test_runs_are_pruned_by_key() -> None:
    store.write("key", RECORD, WEIGHTS)
    store.write("other", RECORD, WEIGHTS)
    size = store.stored()[0].size_bytes
    assert store.prune(["key"]) == size
    assert visible() == ["other"]
    with pytest.raises(StoreError, match="no stored run 'key': see `kdlib runs`"):
        store.prune(["key"])
    assert is_whole(store.read("other"))


def test_pruning_all_takes_checkpoints_and_leftovers_too() -> None:
    store.write("key", RECORD, WEIGHTS)
    store.save_checkpoint(["other"], {"step": 1})
    (store.folder() / ".other.new").mkdir()
    with store.locked(["key"]):
        pass
    assert store.prune() > 0
    assert [path.name for path in store.folder().iterdir()] == [".locks"]
    assert store.prune() == 0
    assert store.load_checkpoint(["other"]) is None


@pytest.mark.parametrize("key", ["..", ".", "../data", "", "key/..", ".checkpoints"])
def test_only_runs_are_pruned(home: Path, key: str) -> None:
    (home / "data").mkdir(parents=True)
    (home / "data" / "file").write_text("precious")
    store.write("key", RECORD, WEIGHTS)
    store.save_checkpoint(["other"], {"step": 1})
    with pytest.raises(StoreError, match="no stored run"):
        store.prune([key])
    assert (home / "data" / "file").exists()
    elsewhere = home / "data" / "key"
    elsewhere.mkdir()
    (elsewhere / "run.json").write_text("{}")
    with pytest.raises(StoreError, match="no stored run"):
        store.prune([str(elsewhere)])
    assert elsewhere.exists()
    assert is_whole(store.read("key"))
    assert store.load_checkpoint(["other"])


# --- checkpoints


def snapshot(step: int) -> dict[str, Any]:
    return {
        "weights": {"a": torch.full((500,), float(step))},
        "velocity": [torch.ones(3, dtype=torch.float64)],
        "step": step,
        "curves": {"train_loss": [[0.1, math.nan]]},
    }


def test_a_checkpoint_comes_back_until_it_is_dropped() -> None:
    assert store.load_checkpoint(["a", "b"]) is None
    assert store.unfinished() == []
    store.save_checkpoint(["a", "b"], snapshot(1))
    store.save_checkpoint(["a", "b"], snapshot(2))
    store.save_checkpoint(["b", "a"], snapshot(3))
    found = store.load_checkpoint(["a", "b"])
    assert found is not None
    assert found["step"] == 2
    assert torch.equal(found["weights"]["a"], torch.full((500,), 2.0))
    assert found["velocity"][0].dtype == torch.float64
    assert math.isnan(found["curves"]["train_loss"][0][1])
    assert sorted(store.unfinished()) == [["a", "b"], ["b", "a"]]
    store.drop_checkpoint(["a", "b"])
    store.drop_checkpoint(["a", "b"])
    assert store.unfinished() == [["b", "a"]]


@pytest.mark.parametrize("left", [0, 10, 1000, -1])
def test_a_truncated_checkpoint_is_left_out(left: int) -> None:
    store.save_checkpoint(["a"], snapshot(1))
    (path,) = (store.folder() / ".checkpoints").iterdir()
    path.write_bytes(path.read_bytes()[:left])
    with pytest.warns(UserWarning, match="the checkpoint .* is damaged"):
        assert store.load_checkpoint(["a"]) is None
    with pytest.warns(UserWarning, match="is damaged"):
        assert store.unfinished() == []
    store.save_checkpoint(["a"], snapshot(2))
    assert store.load_checkpoint(["a"]) is not None


def test_a_checkpoint_under_another_name_is_left_out() -> None:
    store.save_checkpoint(["a"], snapshot(1))
    (path,) = (store.folder() / ".checkpoints").iterdir()
    path.rename(path.with_stem("other"))
    with pytest.warns(UserWarning, match="is damaged"):
        assert store.unfinished() == []


@pytest.mark.filterwarnings("ignore:the checkpoint")
def test_no_changed_byte_gives_another_checkpoint() -> None:
    store.save_checkpoint(["a"], snapshot(1))
    (path,) = (store.folder() / ".checkpoints").iterdir()
    content = path.read_bytes()
    for place in range(0, len(content), 37):
        damaged = bytearray(content)
        damaged[place] ^= 64
        path.write_bytes(damaged)
        found = store.load_checkpoint(["a"])
        assert found is None or (
            found["step"] == 1 and torch.equal(found["weights"]["a"], torch.ones(500))
        )


def test_what_was_left_of_a_killed_checkpoint_goes_with_it() -> None:
    assert exit_codes(process(checkpoint_and_die)) == [-signal.SIGKILL]
    assert len(list((store.folder() / ".checkpoints").iterdir())) == 2
    store.drop_checkpoint(["a"])
    assert list((store.folder() / ".checkpoints").iterdir()) == []


def checkpoint_and_die() -> None:
    """In a process of its own: killed between a checkpoint's bytes and its place."""
    store.save_checkpoint(["a"], snapshot(1))
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    store.save_checkpoint(["a"], snapshot(2))


def test_killed_while_a_checkpoint_is_written() -> None:
    assert exit_codes(process(checkpoint_and_die)) == [-signal.SIGKILL]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = store.load_checkpoint(["a"])
        assert found is not None
        assert found["step"] == 1
        assert store.unfinished() == [["a"]]


# --- locks


def hold(key: str, file: Path) -> None:
    """In a process of its own: a line when the lock is held, one when it is let go."""
    with store.locked([key]):
        with file.open("a") as lines:
            print("in", file=lines)
        with file.open("a") as lines:
            print("out", file=lines)


def test_a_lock_is_held_by_one_process(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    with store.locked(["b", "a"]):
        waiting = [process(hold, key, file) for key in ("a", "b", "a")]
        free = process(hold, "c", tmp_path / "free")
        assert exit_codes(free) == [0]
        assert not file.exists()
    assert exit_codes(*waiting) == [0, 0, 0]
    assert len(file.read_text().split()) == 6
    assert files.home() == store.folder().parent
