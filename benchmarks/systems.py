"""Each system distils the same student from the same teacher, in its own usual way.

A system is a function of a `Training`: it trains `training.job.steps` steps, calls
`training.after(step)` after each (kdlib: after each turn), and returns the trained students.
All descend by SGD with Nesterov momentum at a constant learning rate, from equal weights.
"""

import itertools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

import kdlib
from kdlib import data, loop, losses, models

Students = list[nn.Module]


@dataclass(frozen=True)
class Task:
    """What is distilled, and how: equal for every system."""

    teacher: str
    student: str
    batch_size: int
    dataset: str = "mnist"
    learning_rate: float = 0.02
    momentum: float = 0.9
    temperature: float = 4.0
    hard_weight: float = 0.3


@dataclass(frozen=True)
class Job:
    """One system on one task. kdlib only: runs, processes, cached logits, precision."""

    task: Task
    system: str
    steps: int
    every: int  # steps a turn; the first turn is the warm-up
    runs: int = 1
    processes: int = 1  # side by side, each with its share of the runs and of the threads
    threads: int | None = None  # of all processes together; by default those of the machine
    cached: bool = True
    precision: str = "fp32"
    temperatures: tuple[float, ...] = ()  # of the runs, in a cycle; by default the task's
    seed: int = 0

    @property
    def label(self) -> str:
        """The system's name in a table."""
        parts = [LABELS[self.system], "" if self.precision == "fp32" else self.precision]
        if self.runs > 1:
            apart = self.system == "kdlib-in-turn"
            parts.append(f"{self.runs} one by one" if apart else f"stack of {self.runs}")
        if self.processes > 1:
            parts.append(f"in {self.processes} processes")
        if self.threads == 1:
            parts.append("one thread")
        parts += ["" if self.cached else "teacher on every batch"]
        return ", ".join(part for part in parts if part)

    def temperature(self, run: int) -> float:
        """The temperature of one of the runs."""
        return (self.temperatures or (self.task.temperature,))[run % len(self.temperatures or "1")]


@dataclass
class Training:
    """All that a system needs, on its device. `note` holds what it wants to have recorded."""

    job: Job
    dataset: data.Dataset
    teacher: nn.Module
    device: torch.device
    after: Callable[[int], bool]  # tells that a step is done; True: that was the last one
    note: dict[str, Any] = field(default_factory=dict)

    def student(self, run: int = 0) -> nn.Module:
        """The untrained student of a run, the same for every system."""
        return network(self.job.task.student, self.job.seed + run).to(self.device)


def network(name: str, seed: int) -> nn.Module:
    """An untrained network, its weights drawn by a seed."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return models.build(name)


class Digits(Dataset[tuple[Tensor, int]]):
    """Images one by one through PIL and transforms, as torchvision's MNIST gives them.

    The mean and deviation of 0 and 1 cost what others would, and keep the teacher's inputs.
    """

    def __init__(self, split: data.Split) -> None:
        self.split = data.Split(split.images.cpu(), split.labels.cpu())
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.0,), (1.0,))]
        )

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.split.images[index].numpy(), mode="L")
        return self.transform(image), int(self.split.labels[index])


def article(training: Training) -> Students:
    """The article's loop: a DataLoader, the teacher on every batch, loss and hits read each step.

    Left out: its progress bar and its three TensorBoard scalars a step, which slow it further.
    """
    task, student, teacher = training.job.task, training.student().train(), training.teacher
    loader = DataLoader(Digits(training.dataset.full), task.batch_size, shuffle=True)
    optimizer = torch.optim.SGD(
        student.parameters(), task.learning_rate, task.momentum, nesterov=True
    )
    hard, soft = nn.CrossEntropyLoss(), nn.KLDivLoss(reduction="batchmean")
    scale, loss_sum, correct, total = task.temperature, 0.0, 0, 0
    for step, (inputs, targets) in enumerate(_endless(loader), 1):
        inputs, targets = inputs.to(training.device), targets.to(training.device)
        optimizer.zero_grad()
        logits = student(inputs)
        with torch.no_grad():
            taught = teacher(inputs)
        distance = soft(torch.log_softmax(logits / scale, 1), torch.softmax(taught / scale, 1))
        loss = task.hard_weight * hard(logits, targets)
        loss = loss + (1 - task.hard_weight) * scale**2 * distance
        loss.backward()
        optimizer.step()
        loss_sum += loss.item()
        total += len(targets)
        correct += logits.argmax(1).eq(targets).sum().item()
        if training.after(step):
            break
    return [student]


def torchdistill(training: Training) -> Students:
    """torchdistill's box, configured as its examples are, on the article's data loader."""
    from torchdistill.core.distillation import get_distillation_box

    logging.getLogger("torchdistill").setLevel(logging.WARNING)
    task, student = training.job.task, training.student()
    ends = {"teacher": _last(training.teacher), "student": _last(student)}
    sides = {
        side: {
            "forward_proc": "forward_batch_only",
            "sequential": [],
            "requires_grad": side == "student",
            "forward_hook": {"input": [], "output": [end]},
        }
        for side, end in ends.items()
    }
    settings = {
        "student_module_path": ends["student"],
        "student_module_io": "output",
        "teacher_module_path": ends["teacher"],
        "teacher_module_io": "output",
        "temperature": task.temperature,
        "alpha": task.hard_weight,
        "reduction": "batchmean",
    }
    descent = {"lr": task.learning_rate, "momentum": task.momentum, "nesterov": True}
    config = sides | {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler, "kwargs": {}},
            "kwargs": {"batch_size": task.batch_size},
        },
        "val_data_loader": {},
        "optimizer": {"key": "SGD", "kwargs": descent},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "kd": {"criterion": {"key": "KDLoss", "kwargs": settings}, "weight": 1.0}
                }
            },
        },
    }
    box = get_distillation_box(
        training.teacher,
        student,
        {"train": Digits(training.dataset.full)},
        config,
        training.device,
        None,
        False,
        1,
    )
    box.pre_epoch_process(epoch=0)
    for step, (inputs, targets, extra) in enumerate(_endless(box.train_data_loader), 1):
        inputs, targets = inputs.to(training.device), targets.to(training.device)
        loss = box.forward_process(inputs, targets, extra)
        box.post_forward_process(loss)
        if training.after(step):
            break
    return [student]


def keras(training: Training) -> Students:
    """Keras's Distiller on the torch backend: `fit` on arrays that lie ready as floats."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    keras.config.set_image_data_format("channels_first")  # torch's own layout, the faster here
    task, network = training.job.task, training.student()
    teacher, student = _to_keras(training.teacher), _to_keras(network)
    distiller = keras.distillation.Distiller(
        teacher=teacher,
        student=student,
        distillation_losses=keras.distillation.LogitsDistillation(
            # the default, "kl_divergence", is taken for some other loss and gets the logits
            temperature=task.temperature,
            loss=keras.losses.KLDivergence(),
        ),
        student_loss_weight=task.hard_weight,
    )
    distiller.compile(
        optimizer=keras.optimizers.SGD(task.learning_rate, task.momentum, nesterov=True),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )

    class Turns(keras.callbacks.Callback):  # type: ignore[misc]
        """Counts the steps over all epochs."""

        done = 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.done += 1
            self.model.stop_training = training.after(self.done)

    full = training.dataset.full
    distiller.fit(
        data.to_input(full.images).cpu().numpy(),
        full.labels.cpu().numpy(),
        batch_size=task.batch_size,
        epochs=training.job.steps,  # more than needed: Turns stops it
        verbose=0,
        callbacks=[Turns()],
    )
    _from_keras(student, network)
    return [network]


def kdlib_fit(training: Training) -> Students:
    """kdlib.fit: one student, or a stack of them; the teacher asked once, or on every batch."""
    job, task = training.job, training.job.task
    students = [training.student(run) for run in range(job.runs)]
    full, teacher = training.dataset.full, training.teacher
    targets = [full.labels]
    if job.cached:
        started = time.perf_counter()
        targets.append(loop.predict(teacher, full.images))
        training.note["teacher_seconds"] = time.perf_counter() - started
    model: nn.Module = students[0]
    scale: float | Tensor = job.temperature(0)
    if job.runs > 1:
        model, teacher = loop.Stack(students), loop.Stack([teacher] * job.runs)
        scale = torch.tensor([job.temperature(run) for run in range(job.runs)])
        scale = scale.to(training.device)

    def loss(logits: Tensor, labels: Tensor, taught: Tensor) -> Tensor:
        return losses.distillation_loss(
            logits, taught, labels, temperature=scale, hard_weight=task.hard_weight
        )

    def on_report(state: loop.State) -> None:
        last = training.after(state.step)
        if last and training.device.type == "cuda":  # the memory of training and of evaluation
            loop.count_errors(model, training.dataset.test.images, training.dataset.test.labels)
            training.note["peak_bytes"] = torch.cuda.max_memory_allocated(training.device)

    kdlib.fit(
        model,
        [full.images, *targets],
        loss,
        steps=job.steps,
        batch_size=task.batch_size,
        learning_rate=task.learning_rate,
        momentum=task.momentum,
        schedule="constant",
        teacher=None if job.cached else teacher,
        precision=job.precision,
        seed=[job.seed + run for run in range(job.runs)] if job.runs > 1 else job.seed,
        report_every=job.every,
        on_report=on_report,
    )
    if isinstance(model, loop.Stack):
        for student, weights in zip(students, model.unstack(), strict=True):
            student.load_state_dict(weights)
    return students


def kdlib_in_turn(training: Training) -> Students:
    """A process of a sweep, as `train_all` runs one for each thread of a CPU: its students
    one after another, the teacher asked once."""
    job, task, full = training.job, training.job.task, training.dataset.full
    taught = loop.predict(training.teacher, full.images)
    students = [training.student(run) for run in range(job.runs)]
    states: dict[int, dict[str, Any]] = {}
    for done in range(job.every, job.steps + 1, job.every):
        for run, student in enumerate(students):
            scale = job.temperature(run)

            # The next part of a student's training goes on with its momentum and its batches.
            def on_report(state: loop.State, run: int = run) -> None:
                states[run] = state.snapshot()

            def loss(
                logits: Tensor, labels: Tensor, taught: Tensor, scale: float = scale
            ) -> Tensor:
                return losses.distillation_loss(
                    logits, taught, labels, temperature=scale, hard_weight=task.hard_weight
                )

            kdlib.fit(
                student,
                [full.images, full.labels, taught],
                loss,
                steps=done,
                report_every=job.every,
                on_report=on_report,
                resume=states.get(run),
                batch_size=task.batch_size,
                learning_rate=task.learning_rate,
                momentum=task.momentum,
                schedule="constant",
                precision=job.precision,
                seed=job.seed + run,
            )
        training.after(done)
    return students


SYSTEMS: dict[str, Callable[[Training], Students]] = {
    "article": article,
    "keras": keras,
    "torchdistill": torchdistill,
    "kdlib": kdlib_fit,
    "kdlib-in-turn": kdlib_in_turn,
}
LABELS = {
    "kdlib": "kdlib",
    "article": "the article’s loop",
    "keras": "Keras 3, Distiller on torch",
    "torchdistill": "torchdistill",
    "kdlib-in-turn": "kdlib",
}
PEERS = ("article", "keras", "torchdistill")


def _endless(loader: DataLoader[Any]) -> Any:
    """Epoch after epoch."""
    return itertools.chain.from_iterable(itertools.repeat(loader))


def _last(network: nn.Module) -> str:
    """The path of the layer that gives the logits."""
    return [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)][-1]


def _to_keras(network: nn.Module) -> Any:
    """One of kdlib's networks in Keras's layers, its weights copied."""
    import keras

    made = {
        nn.Conv2d: lambda x: keras.layers.Conv2D(x.out_channels, x.kernel_size),
        nn.Linear: lambda x: keras.layers.Dense(x.out_features),
        nn.MaxPool2d: lambda x: keras.layers.MaxPooling2D(x.kernel_size),
        nn.ReLU: lambda x: keras.layers.ReLU(),
        nn.Flatten: lambda x: keras.layers.Flatten("channels_last"),  # else it reorders first
    }
    layers = [made[type(layer)](layer) for layer in network.modules() if type(layer) in made]
    twin = keras.Sequential([keras.Input((1, 28, 28)), *layers])
    for (kernel, bias), layer in _pairs(twin, network):
        weight = layer.weight.detach().cpu()
        order = (2, 3, 1, 0) if isinstance(layer, nn.Conv2d) else (1, 0)
        kernel.assign(weight.permute(order).numpy())
        bias.assign(layer.bias.detach().cpu().numpy())
    return twin


def _from_keras(twin: Any, network: nn.Module) -> None:
    """Copy the weights back."""
    with torch.no_grad():
        for (kernel, bias), layer in _pairs(twin, network):
            order = (3, 2, 0, 1) if isinstance(layer, nn.Conv2d) else (1, 0)
            layer.weight.copy_(kernel.value.permute(order))
            layer.bias.copy_(bias.value)


def _pairs(twin: Any, network: nn.Module) -> list[tuple[Any, Any]]:
    """(kernel, bias) of Keras beside the layer of PyTorch that has the same weights."""
    theirs = [layer.weights for layer in twin.layers if layer.weights]
    ours = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return list(zip(theirs, ours, strict=True))
