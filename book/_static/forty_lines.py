"""Distillation in forty lines of PyTorch: chapter 1's, as one file.

It needs torch and torchvision, downloads MNIST to ./data, and takes about
a minute. A teacher is trained on 5,000 digits. Three small networks learn
the same digits from their labels, and three from the teacher's soft
targets. A test keeps these lines equal to the chapter's.
"""

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

Digits, folder, count = torchvision.datasets.MNIST, "data", 5000
teacher_steps, teacher_rate = 1000, 0.1
student_steps, hard_rate, soft_rate = 1000, 0.2, 0.025
temperature, seed, numbers = 8.0, 0, range(3)

train_set = Digits(folder, train=True, download=True)
test_set = Digits(folder, train=False, download=True)
x = train_set.data[:count].view(-1, 784) / 255
y = train_set.targets[:count]
test_x, test_y = test_set.data.view(-1, 784) / 255, test_set.targets


def train(network, loss, steps, rate):
    sgd = torch.optim.SGD(network.parameters(), rate, 0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(sgd, rate, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        sgd.zero_grad()
        loss(network(x[rows]), rows).backward()
        sgd.step()
        schedule.step()
    with torch.no_grad():
        return int((network(test_x).argmax(1) != test_y).sum())


torch.manual_seed(seed)
teacher = nn.Sequential(
    nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 6, 5), nn.ReLU(),
    nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84),
    nn.ReLU(), nn.Linear(84, 10),
)  # fmt: skip


def hard(logits, rows):
    return F.cross_entropy(logits, y[rows])


teacher_errors = train(teacher, hard, teacher_steps, teacher_rate)
teacher_logits = teacher(x).detach()


def small():
    layers = nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(50, 10))


def soft(logits, rows):
    targets = F.softmax(teacher_logits[rows] / temperature, 1)
    logs = F.log_softmax(logits / temperature, 1)
    return temperature**2 * F.kl_div(logs, targets, reduction="batchmean")


errors = {"labels": [], "soft targets": []}
ways = ("labels", hard, hard_rate), ("soft targets", soft, soft_rate)
for number in numbers:
    for name, loss, rate in ways:
        torch.manual_seed(number)  # the same first weights and batches
        errors[name].append(train(small(), loss, student_steps, rate))

print("teacher", teacher_errors, errors)
