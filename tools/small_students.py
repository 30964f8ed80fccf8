"""The two small students of the page on which a reader draws a digit; both come with kdlib.

Both have 2×30 units and start from the same weights. One is trained on labels, the other on the
soft targets of the teacher that comes with kdlib. The digits that the page offers are written
too: for each class, the test digit on which the two students differ most while the teacher is
right.

    python tools/small_students.py
"""

import base64
import json
import time
from pathlib import Path

import torch

import kdlib
from kdlib import Recipe, Run, data, files, loop, losses, models, provenance, weights

EXAMPLES = Path(__file__).parent.parent / "book/_static/draw-examples.js"
TEMPERATURE = 3.0  # the best for 2×30 in chapter 7
PLAIN = Recipe("mlp-30x30", steps=6_000, batch_size=250, learning_rate=0.1)


def trained(recipe: Recipe, teacher: Run) -> Run:
    """A student as a run: on labels, or on the soft targets of a teacher from its weights."""
    digits = data.load(recipe.dataset, "cpu")
    torch.manual_seed(recipe.seed)
    network = models.build(recipe.model)
    targets = teacher.logits("full") if recipe.teacher else digits.full.labels

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if recipe.teacher:
            return losses.soft_loss(logits, target, recipe.temperature)
        return losses.cross_entropy(logits, target)

    start = time.perf_counter()
    kdlib.fit(
        network,
        (digits.full.images, targets),
        loss,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
    )
    errors = loop.count_errors(network, digits.test.images, digits.test.labels)
    return Run(
        recipe=recipe,
        metrics={"status": "ok", "test_errors": errors},
        curves={},
        weights=network.state_dict(),
        seconds=time.perf_counter() - start,
        provenance=provenance.provenance(torch.device("cpu"), recipe.precision),
        cached=False,
        device=torch.device("cpu"),
    )


def examples(teacher: Run, students: list[Run]) -> dict[str, str]:
    """Label -> the pixels of one test digit, in base64."""
    test = data.load("mnist", "cpu").test
    p, q = (losses.soften(run.logits("test"), 1.0) for run in students)
    apart = (p - q).abs().sum(1)
    apart[teacher.logits("test").argmax(1) != test.labels] = -1
    found = {}
    for label in range(10):
        row = torch.where(test.labels == label, apart, -1.0).argmax()
        found[str(label)] = base64.b64encode(bytes(test.images[row].flatten().tolist())).decode()
    return found


def main() -> None:
    """Train both students, keep them, and write the examples."""
    teacher = kdlib.pretrained("mnist-teacher", "cpu")
    distilled = PLAIN.distil(teacher.recipe, temperature=TEMPERATURE).replace(learning_rate=0.05)
    students = [trained(recipe, teacher) for recipe in (PLAIN, distilled)]
    for name, run in zip(("plain", "distilled"), students, strict=True):
        print(weights.keep(f"mnist-small-{name}-student", run))
    text = f"window.kdExamples = {json.dumps(examples(teacher, students), indent=1)};\n"
    files.put(EXAMPLES, text.encode())


if __name__ == "__main__":
    main()
