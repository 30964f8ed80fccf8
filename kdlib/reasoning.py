"""Reasoning in miniature: a language that a machine can check, a transformer, RL, distillation.

A question is a number from 0 to 6 and one to six operations, taken from left to right modulo 7:
`3 +2 ×4 =`. A bare response is `# 6 .`, the answer between two marks. A worked response first
copies each operation and writes the remainder so far: `+2 5 ×4 6 # 6 .`.

The file reads from top to bottom: the language and its checker, the network, sampling, and four
ways to train: on text, on the outcome alone, on a teacher's probabilities, on one's own samples.
It follows DeepSeek-AI 2025. Chapter 9 uses it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdlib import check
from kdlib.losses import cross_entropy, distillation_loss, soft_loss

# --- the language --------------------------------------------------------------------------

MODULUS, MOST = 7, 6  # remainders are 0 to 6; a question has at most six operations
OPERATIONS = [("+", n) for n in range(1, MODULUS)] + [("×", n) for n in range(2, MODULUS)]
# A token is a remainder (0 to 6), an operation (from FIRST on) or one of four marks.
FIRST = MODULUS
PAD, EQUALS, ANSWER, STOP = range(FIRST + len(OPERATIONS), FIRST + len(OPERATIONS) + 4)
WORDS = [*map(str, range(MODULUS)), *(f"{sign}{n}" for sign, n in OPERATIONS), "", "=", "#", "."]
QUESTION, RESPONSE = MOST + 2, 2 * MOST + 3  # the length of each in tokens, padding included
_COLUMNS = [[r + n if s == "+" else r * n for r in range(MODULUS)] for s, n in OPERATIONS]
NEXT = torch.tensor(_COLUMNS).T % MODULUS  # NEXT[r, o]: the remainder after operation o on r

SHARE = check.number(0, 1)
RULES = {
    "count": check.COUNT,
    "operations": check.optional(check.whole(1, MOST)),
    "temperature": check.number(0),
    "own": SHARE,
    "worked": SHARE,
    "slips": SHARE,
    "steps": check.COUNT,
    "rate": check.POSITIVE,
    "batch": check.COUNT,
    "problems": check.COUNT,
    "group": check.whole(2),
    "divergence": check.one_of("forward", "reverse"),
}


def generator(seed: int) -> torch.Generator:
    """A source of random numbers: equal seeds, equal questions, samples and networks."""
    return torch.Generator().manual_seed(check.value("seed", seed, check.whole()))


def draw(count: int, source: torch.Generator, operations: int | None = None) -> Tensor:
    """Random questions, int64 (count, QUESTION): a number, operations, padding, `=`.

    operations: how many each has; None draws 1 to MOST evenly.
    """
    check.values(RULES, operations=operations, count=count)
    lengths = torch.randint(1, MOST + 1, (count, 1), generator=source)
    if operations is not None:
        lengths = torch.full_like(lengths, operations)
    questions = torch.full((count, QUESTION), EQUALS)
    questions[:, 0] = torch.randint(0, MODULUS, (count,), generator=source)
    drawn = torch.randint(FIRST, PAD, (count, MOST), generator=source)
    questions[:, 1:-1] = torch.where(torch.arange(MOST) < lengths, drawn, PAD)
    return questions


def remainders(
    questions: Tensor, slips: float = 0.0, source: torch.Generator | None = None
) -> Tensor:
    """The remainder after each operation, (N, MOST); the last column holds the answers.

    slips: the chance that a step goes wrong; what follows goes on from the wrong remainder.
    """
    check.values(RULES, slips=slips)
    value, columns = questions[:, 0], []
    for operation in questions[:, 1:-1].T:
        follows = NEXT[value, (operation - FIRST).clamp(max=len(OPERATIONS) - 1)]
        if slips > 0:
            wrong = (follows + torch.randint(1, MODULUS, value.shape, generator=source)) % MODULUS
            slipped = torch.rand(len(value), generator=source) < slips
            follows = torch.where(slipped, wrong, follows)
        value = torch.where(operation == PAD, value, follows)
        columns.append(value)
    return torch.stack(columns, 1)


def truth(questions: Tensor) -> Tensor:
    """The right answers, (N,)."""
    return remainders(questions)[:, -1]


def write(questions: Tensor, values: Tensor, worked: Tensor) -> Tensor:
    """Responses that state these remainders, (N, RESPONSE); worked: which rows show steps."""
    steps = torch.stack([questions[:, 1:-1], values], 2)
    shown = (steps[:, :, :1] != PAD) & worked[:, None, None]
    responses = functional.pad(torch.where(shown, steps, PAD).flatten(1), (0, 3), value=PAD)
    end = torch.tensor([ANSWER, 0, STOP]).repeat(len(values), 1)
    end[:, 1] = values[:, -1]
    return responses.scatter(1, 2 * shown.sum(1) + torch.arange(3), end)


def corpus(
    count: int, source: torch.Generator, worked: float = 0.5, slips: float = 0.1
) -> tuple[Tensor, Tensor]:
    """A sloppy web in miniature: questions and responses, a share of them worked.

    Bare answers are right. In worked ones each step slips with a chance.
    """
    check.values(RULES, worked=worked, slips=slips)
    questions = draw(count, source)
    shows = torch.rand(count, generator=source) < worked
    sloppy = remainders(questions, slips, source)
    values = torch.where(shows[:, None], sloppy, remainders(questions))
    return questions, write(questions, values, shows)


def answers(responses: Tensor) -> Tensor:
    """The token after the first `#` of each response; PAD if there is none."""
    after = functional.pad(responses, (0, 1), value=PAD)
    found = responses == ANSWER
    place = found.int().argmax(1, keepdim=True) + 1
    return torch.where(found.any(1), after.gather(1, place)[:, 0], PAD)


def right(questions: Tensor, responses: Tensor) -> Tensor:
    """Which responses give the right answer, whatever their steps: (N,) bool."""
    return answers(responses) == truth(questions)


def flawless(questions: Tensor, responses: Tensor) -> Tensor:
    """Which responses write every step, all of them right, and then the answer: (N,) bool."""
    ideal = write(questions, remainders(questions), torch.ones(len(questions), dtype=torch.bool))
    return (responses == ideal).all(1)


def steps_written(responses: Tensor) -> Tensor:
    """How many remainders a response writes before its first `#`: (N,)."""
    before = (responses == ANSWER).cumsum(1) == 0
    return ((responses < MODULUS) & before).sum(1)


def text(tokens: Tensor) -> str:
    """Tokens as a reader sees them."""
    return " ".join(WORDS[token] for token in tokens.tolist() if token != PAD)


# --- the network ---------------------------------------------------------------------------


class Block(nn.Module):
    """One layer of a transformer: attention to what came before, then a small MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.project, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        layers = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(*layers)

    def forward(self, x: Tensor, past: list[Tensor]) -> Tensor:
        """x: (N, length, width). past: keys and values so far, which those of x join."""
        rows, length, width = x.shape
        parts = self.project(self.norms[0](x)).view(rows, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        if past:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        past[:] = key, value
        # After a past there is one token, and it may attend to everything.
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=length > 1)
        x = x + self.merge(seen.transpose(1, 2).reshape(rows, length, width))
        result: Tensor = x + self.mlp(self.norms[1](x))
        return result


class Reasoner(nn.Module):
    """A transformer that gives the logits of each next token.

    Its weights come from the seed alone. width 64, layers 2: 104,384 weights.
    """

    def __init__(self, width: int, layers: int, seed: int, heads: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tokens = nn.Embedding(len(WORDS), width)
            self.places = nn.Embedding(QUESTION + RESPONSE, width)
            self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
            self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, len(WORDS), bias=False)
            for table in (self.tokens, self.places):
                nn.init.normal_(table.weight, std=0.3)

    def forward(self, tokens: Tensor, cache: list[list[Tensor]] | None = None) -> Tensor:
        """Logits (N, length, words). cache: one empty list per layer, then what they hold:
        the question goes in whole, later tokens one by one."""
        cache = [[] for _ in self.blocks] if cache is None else cache
        start = cache[0][0].shape[2] if cache[0] else 0
        x = self.tokens(tokens) + self.places.weight[start : start + tokens.shape[1]]
        for block, past in zip(self.blocks, cache, strict=True):
            x = block(x, past)
        logits: Tensor = self.out(self.norm(x))
        return logits


@torch.no_grad()
def sample(
    network: Reasoner, questions: Tensor, temperature: float, source: torch.Generator | None = None
) -> Tensor:
    """A response to each question, (N, RESPONSE), drawn at a temperature; 0 takes the likeliest.

    A response ends with `.` or after RESPONSE tokens.
    """
    check.values(RULES, temperature=temperature)
    responses = torch.full((len(questions), RESPONSE), PAD)
    cache: list[list[Tensor]] = [[] for _ in network.blocks]
    unfinished, tokens = torch.ones(len(questions), dtype=torch.bool), questions
    for place in range(RESPONSE):
        logits = network(tokens, cache)[:, -1]
        logits[:, PAD] = -math.inf  # padding is no word
        if temperature > 0:
            chances = torch.softmax(logits / temperature, -1)
            drawn = torch.multinomial(chances, 1, generator=source)[:, 0]
        else:
            drawn = logits.argmax(-1)
        responses[:, place] = torch.where(unfinished, drawn, PAD)
        unfinished &= drawn != STOP
        if not unfinished.any():
            break
        tokens = responses[:, place : place + 1]
    return responses


def token_logits(network: Reasoner, questions: Tensor, responses: Tensor) -> Tensor:
    """The logits of every token that the responses hold, (tokens, words), row after row."""
    written = responses != PAD
    longest = int(written.sum(1).max())
    logits: Tensor = network(torch.cat([questions, responses[:, : longest - 1]], 1))
    return logits[:, QUESTION - 1 :][written[:, :longest]]


# --- training ------------------------------------------------------------------------------


def fit(network: Reasoner, loss: Callable[[], Tensor], *, steps: int, rate: float) -> list[float]:
    """Take steps of AdamW on what loss() returns; the losses.

    The rate rises for 20 steps, then falls to a tenth. Gradients are cut to length 1.
    A loss that is not finite ends the training: it diverged, and nan is its last loss.
    """
    check.values(RULES, steps=steps, rate=rate)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    losses: list[float] = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        value = loss()
        if not math.isfinite(value.item()):
            return [*losses, math.nan]
        losses.append(value.item())
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return losses


def fine_tune(
    network: Reasoner,
    questions: Tensor,
    responses: Tensor,
    source: torch.Generator,
    *,
    steps: int,
    rate: float,
    batch: int = 128,
) -> list[float]:
    """Train on text: the cross-entropy of each token of the responses; the losses."""
    check.values(RULES, batch=batch)

    def loss() -> Tensor:
        rows = torch.randint(0, len(questions), (batch,), generator=source)
        logits = token_logits(network, questions[rows], responses[rows])
        return cross_entropy(logits, responses[rows][responses[rows] != PAD])

    return fit(network, loss, steps=steps, rate=rate)


def distil(
    network: Reasoner,
    teacher: Reasoner,
    questions: Tensor,
    responses: Tensor,
    source: torch.Generator,
    *,
    steps: int,
    rate: float,
    batch: int = 128,
    temperature: float = 1.0,
    own: float = 0.0,
    divergence: str = "forward",
) -> list[float]:
    """Train on a teacher's probabilities of each next token; the losses.

    own: the share of steps whose responses the student samples itself (on-policy).
    divergence: "forward" is KL(teacher || student), "reverse" KL(student || teacher).
    Raises ValueError for a temperature of 0. Agarwal et al. 2024 (GKD).
    """
    check.values(RULES, batch=batch, own=own, divergence=divergence)

    def loss() -> Tensor:
        rows = torch.randint(0, len(questions), (batch,), generator=source)
        asked, given = questions[rows], responses[rows]
        if torch.rand((), generator=source) < own:
            given = sample(network, asked, 1.0, source)
        with torch.no_grad():
            targets = token_logits(teacher, asked, given)
        logits = token_logits(network, asked, given)
        if divergence == "reverse":
            return soft_loss(targets, logits, temperature)
        return distillation_loss(logits, targets, None, temperature=temperature, hard_weight=0)

    return fit(network, loss, steps=steps, rate=rate)


def advantages(rewards: Tensor) -> Tensor:
    """How much better each response is than its group's mean, in standard deviations.

    rewards: (problems, group). A group with equal rewards gives zeros.
    Shao et al. 2024 (GRPO).
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4)


def policy_loss(logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """Minus the mean of weight · log p(token): its gradient raises what had an advantage.

    logits: (tokens, words), tokens and weights: (tokens,). Williams 1992 (REINFORCE).
    """
    logs = torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]
    return -(weights * logs).mean()


def reinforce(
    network: Reasoner,
    source: torch.Generator,
    *,
    steps: int,
    rate: float,
    problems: int = 32,
    group: int = 8,
    reward: Callable[[Tensor, Tensor], Tensor] = right,
) -> dict[str, list[float]]:
    """Train on the outcome alone: sample a group of responses to each problem, reinforce the
    better ones. By step: the mean reward, the mean number of steps written, the loss.

    reward: (questions, responses) -> (N,); by default 1 for the right answer, else 0.
    """
    check.values(RULES, problems=problems, group=group)
    history: dict[str, list[float]] = {"reward": [], "steps": []}

    def loss() -> Tensor:
        questions = draw(problems, source).repeat_interleave(group, 0)
        responses = sample(network, questions, 1.0, source)
        rewards = reward(questions, responses).float()
        history["reward"].append(rewards.mean().item())
        history["steps"].append(steps_written(responses).float().mean().item())
        written = responses != PAD
        weights = advantages(rewards.view(problems, group)).view(-1, 1).expand_as(written)
        logits = token_logits(network, questions, responses)
        return policy_loss(logits, responses[written], weights[written])

    history["loss"] = fit(network, loss, steps=steps, rate=rate)
    return history


def measure(
    network: Reasoner, seed: int, losses: Sequence[float] = (), count: int = 1000
) -> dict[str, Any]:
    """What a network does with new questions of 1, 3 and 6 operations, greedily.

    accuracy_k: right answers in %; steps_k: steps written; unfinished_k: responses without `.`
    in %. status: "diverged" if the losses end in nan, or if all answers to questions of one
    operation are the same, so that the training came to nothing; else "ok".
    """
    found: dict[str, Any] = {}
    given = torch.empty(0)
    for operations in (6, 3, 1):
        # Chapter 9 keeps seeds from 10,000 on for questions that no training draws from.
        questions = draw(count, generator(seed + operations), operations)
        responses = sample(network, questions, 0.0)
        given = answers(responses)
        found[f"accuracy_{operations}"] = 100 * right(questions, responses).float().mean().item()
        found[f"steps_{operations}"] = steps_written(responses).float().mean().item()
        ended = (responses == STOP).any(1).float().mean().item()
        found[f"unfinished_{operations}"] = 100 * (1 - ended)
    learned = len(given.unique()) > 1 and not (losses and math.isnan(losses[-1]))
    return found | {"status": "ok" if learned else "diverged"}
