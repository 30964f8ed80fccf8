"""`python -m benchmarks`: measure on the CPU; `--gpu`: the part for a GPU."""

import argparse
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import programme, report
from kdlib import data


def main() -> int:
    """Measure, keep the record, render the page. 1 where a system failed or differed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="measure a GPU's sweep")
    parser.add_argument("--device", help="default: cpu, with --gpu cuda")
    parser.add_argument("--quick", action="store_true", help="a trial of seconds, kept in _build")
    parser.add_argument("--results", type=Path, help="folder for the record and its rendering")
    parser.add_argument("--render", action="store_true", help="render what has been measured")
    chosen = parser.parse_args()
    if chosen.render:
        report.render(chosen.results or report.RESULTS, chosen.results or report.PAGES)
        return 0
    device = str(data.resolve_device(chosen.device or ("cuda" if chosen.gpu else "cpu")))
    folder = chosen.results or (Path("_build/benchmarks") if chosen.quick else None)
    path = (folder or report.RESULTS) / ("cuda.json" if chosen.gpu else "cpu.json")
    scale = programme.GPU if chosen.gpu else programme.CPU
    if chosen.quick:
        scale = replace(scale, **programme.QUICK)
    measure = programme.on_gpu if chosen.gpu else programme.on_cpu
    record = measure(scale, device, programme.save_to(path))
    print(f"kept in {path}, after {record['seconds']:.0f} s")
    if importlib.util.find_spec("matplotlib") is None:
        print("no matplotlib here: `python -m benchmarks --render` elsewhere draws the page")
    else:
        report.render(folder or report.RESULTS, folder or report.PAGES)
    trouble = [] if chosen.quick else report.unmet(record)
    for line in trouble:
        print(line, file=sys.stderr)
    return bool(trouble)


if __name__ == "__main__":
    sys.exit(main())
