"""`make torture`: kdlib's store, press and checks under all that goes wrong on real machines.

Processes are killed, bytes flipped, disks filled; parameters are nonsense, and networks change
behind the store's back. Each ordeal is a function `(rng, folder, budget) -> Tally`; budget is 1
for a torture of ten minutes. TORTURE_SECONDS makes all of them longer or shorter, TORTURE_SEED
repeats one. It ends what it started alone, writes into a temporary folder of its own, and ends with
if anything was lost or wrong.
"""

import json
import os
import random
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What starts in another folder finds the code that is tortured here too.
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))

from benchmarks import report  # noqa: E402
from kdlib import files, slots  # noqa: E402
from kdlib.provenance import processor  # noqa: E402
from torture import damage, disks, inputs, kills, networks  # noqa: E402
from torture.ordeal import say  # noqa: E402

FULL = 600.0  # seconds, on two cores
ORDEALS = {
    "`kill -9` of `train_all` in one process": kills.in_one_process,
    "`kill -9` of `train_all` in several processes": kills.in_several_processes,
    "`kill -9` of an executor’s worker": kills.in_an_executors_worker,
    "`kill -9` of `kdlib run`": kills.in_kdlib_run,
    "bytes flipped and files cut: datasets": damage.in_datasets,
    "… stored runs": damage.in_runs,
    "… checkpoints": damage.in_checkpoints,
    "… executed pages": damage.in_pages,
    "… recorded results": damage.in_records,
    "… shipped weights": damage.in_shipped_weights,
    "a full disk": disks.full,
    "a read-only store": disks.read_only,
    "two processes and pruning": disks.shared_by_two,
    "four processes and pruning": disks.shared_by_four,
    "bad arguments of `kdlib`": inputs.of_commands,
    "bad parameters of chapters": inputs.of_chapters,
    "bad calls of `fit`, `Recipe` and the losses": inputs.of_functions,
    "registered networks that change": networks.that_change,
}


def torture(seconds: float, seed: int, folder: Path) -> dict[str, Any]:
    """All ordeals, one after another; their record."""
    started, rows = time.monotonic(), []
    say(f"TORTURE_SEED={seed} TORTURE_SECONDS={seconds:g}")
    for number, (name, ordeal) in enumerate(ORDEALS.items()):
        # For work on one of them.
        if os.environ.get("TORTURE_ONLY", "") not in name:
            continue
        begun = time.monotonic()
        tally = ordeal(random.Random(f"{seed} {name}"), folder / str(number), seconds / FULL)
        rows.append({"ordeal": name, **tally._asdict()})
        say(f"{time.monotonic() - begun:6.1f} s  {name}: {tally}")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "disks": disks.kind(),
        "machine": f"{processor()}, {slots.cores()} cores",
        "seconds": round(time.monotonic() - started),
        "seed": seed,
        "rows": rows,
    }


def main() -> int:
    """Torture, print the table, keep the record; 1 if anything was lost or wrong."""
    seconds = float(os.environ.get("TORTURE_SECONDS") or FULL)
    seed = int(os.environ.get("TORTURE_SEED") or random.SystemRandom().randrange(2**32))
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        record = torture(seconds, seed, Path(folder))
    print(report.torture(record))
    # The book shows a torture of full length.
    if seconds >= FULL and "TORTURE_ONLY" not in os.environ:
        text = json.dumps(record, indent=1, ensure_ascii=False)
        files.put(report.RESULTS / "torture.json", f"{text}\n".encode())
        report.render()
    return int(any(row["lost"] or row["wrong"] for row in record["rows"]))


if __name__ == "__main__":
    sys.exit(main())
