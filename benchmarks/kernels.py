"""`python -m benchmarks.kernels`: where the time of a step goes, kernel by kernel."""

import argparse
from dataclasses import replace

import torch
from torch.profiler import profile

from benchmarks import programme
from benchmarks.systems import Job, Training, kdlib_fit, network
from kdlib import data


def table(job: Job, device: torch.device, rows: int = 20) -> str:
    """The slowest kernels of a job's last `every` steps, on the device's own clock."""
    profiler = profile()

    def after(step: int) -> bool:
        last = step == job.steps
        if last:
            profiler.stop()
        elif step == job.steps - job.every:  # the steps before were the warm-up
            profiler.start()
        return last

    dataset = data.load(job.task.dataset, device)
    teacher = network(job.task.teacher, 0).to(device)
    kdlib_fit(Training(job, dataset, teacher, device, after))
    clock = "cuda" if device.type == "cuda" else "cpu"
    averages = profiler.key_averages()
    return str(averages.table(sort_by=f"self_{clock}_time_total", row_limit=rows))


def main(arguments: list[str] | None = None) -> None:
    """Profile a stack of students and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--runs", type=int, default=programme.GPU.sweep, help="students in a stack")
    parser.add_argument("--steps", type=int, default=100, help="to profile, after as many others")
    given = parser.parse_args(arguments)
    task = replace(programme.PLAIN, batch_size=given.batch, dataset=given.dataset)
    job = Job(task, "kdlib", 2 * given.steps, given.steps, given.runs, precision=given.precision)
    print(table(job, data.resolve_device(given.device)))


if __name__ == "__main__":
    main()
