"""Reasoning in miniature: the checker, sampling, the losses, equal bits for equal seeds."""

import copy
import math
import re

import pytest
import torch
from torch import Tensor, nn

from kdlib import reasoning

# --- an independent reader of the language: strings and plain Python, no tables ----------------


def evaluated(question: str) -> list[int]:
    """The remainders after each operation of "3 +2 ×4 ="."""
    first, *operations = question.removesuffix(" =").split()
    values = [int(first)]
    for operation in operations:
        sign, number = operation[0], int(operation[1:])
        values.append((values[-1] + number if sign == "+" else values[-1] * number) % 7)
    return values[1:]


def answered(response: str) -> int | None:
    """The number after the first #, if there is one."""
    found = re.search(r"#( ([0-6])(?= |$))?", response)
    return int(found[2]) if found and found[2] else None


def spoken(question: str, values: list[int]) -> str:
    """The whole work, as a careful person would write it."""
    operations = question.removesuffix(" =").split()[1:]
    steps = "".join(f"{o} {v} " for o, v in zip(operations, values, strict=True))
    return f"{steps}# {values[-1]} ."


def untrained(width: int = 16, layers: int = 2, seed: int = 5) -> reasoning.Reasoner:
    return reasoning.Reasoner(width, layers, seed)


def babble(count: int, seed: int) -> Tensor:
    """Random tokens, some of them answers, as a poor network might write them."""
    words = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 12, reasoning.ANSWER, reasoning.STOP])
    picked = torch.randint(
        0, len(words), (count, reasoning.RESPONSE), generator=torch.manual_seed(seed)
    )
    return words[picked]


def test_the_checker_agrees_with_one_that_reads_strings() -> None:
    questions = reasoning.draw(400, reasoning.generator(1))
    values, responses = reasoning.remainders(questions), babble(400, 2)
    truth, given = reasoning.truth(questions), reasoning.answers(responses)
    for row, question in enumerate(questions):
        expected = evaluated(reasoning.text(question))
        assert values[row].tolist()[: len(expected)] == expected
        assert truth[row] == expected[-1]
        said = answered(reasoning.text(responses[row]))
        token = given[row].item()
        assert (token if token < 7 else None) == said
    right = reasoning.right(questions, responses)
    expected_right = [
        answered(reasoning.text(r)) == evaluated(reasoning.text(q))[-1]
        for q, r in zip(questions, responses, strict=True)
    ]
    assert right.tolist() == expected_right
    assert 0 < right.sum() < 400


def test_a_worked_response_is_what_a_careful_person_writes() -> None:
    questions = reasoning.draw(200, reasoning.generator(3))
    worked = torch.arange(200) % 2 == 0
    responses = reasoning.write(questions, reasoning.remainders(questions), worked)
    for row in range(200):
        question = reasoning.text(questions[row])
        values = evaluated(question)
        text = spoken(question, values) if worked[row] else f"# {values[-1]} ."
        assert reasoning.text(responses[row]) == text
    assert reasoning.flawless(questions, responses).tolist() == worked.tolist()
    lengths = (questions[:, 1:-1] != reasoning.PAD).sum(1)
    assert reasoning.steps_written(responses).tolist() == (lengths * worked).tolist()


def test_a_right_answer_after_a_wrong_step_is_right_but_not_flawless() -> None:
    questions = reasoning.draw(500, reasoning.generator(4), operations=4)
    sloppy = reasoning.remainders(questions, 1.0, reasoning.generator(5))
    sloppy[:, -1] = reasoning.truth(questions)
    responses = reasoning.write(questions, sloppy, torch.ones(500, dtype=torch.bool))
    assert reasoning.right(questions, responses).all()
    assert not reasoning.flawless(questions, responses).any()


def test_the_corpus_has_its_share_of_worked_responses_and_of_slips() -> None:
    questions, responses = reasoning.corpus(20_000, reasoning.generator(6), 0.3, 0.1)
    worked = reasoning.steps_written(responses) > 0
    assert abs(worked.float().mean() - 0.3) < 0.02
    assert reasoning.right(questions, responses)[~worked].all()
    one = worked & ((questions[:, 1:-1] != reasoning.PAD).sum(1) == 1)
    assert abs(reasoning.right(questions, responses)[one].float().mean() - 0.9) < 0.03


# --- sampling ----------------------------------------------------------------------------------


@torch.no_grad()
def test_sampling_with_a_cache_takes_what_a_plain_forward_pass_finds_likeliest() -> None:
    network, questions = untrained(), reasoning.draw(30, reasoning.generator(7))
    responses = reasoning.sample(network, questions, 0.0)
    for question, response in zip(questions, responses, strict=True):
        tokens = question[None]
        for given in response:
            logits = network(tokens)[0, -1]
            logits[reasoning.PAD] = -math.inf
            likeliest = logits.argmax()
            assert given == likeliest
            if given == reasoning.STOP:
                break
            tokens = torch.cat([tokens, given.view(1, 1)], 1)


@torch.no_grad()
def test_a_cache_gives_the_logits_of_a_plain_forward_pass() -> None:
    network, questions = untrained(), reasoning.draw(10, reasoning.generator(8))
    tokens = torch.cat([questions, babble(10, 9)], 1)
    cache: list[list[Tensor]] = [[] for _ in network.blocks]
    parts = [network(questions, cache)]
    parts += [network(token[:, None], cache) for token in tokens[:, reasoning.QUESTION :].T]
    torch.testing.assert_close(torch.cat(parts, 1), network(tokens))


@torch.no_grad()
def test_samples_follow_the_softened_probabilities() -> None:
    network, source = untrained(), reasoning.generator(10)
    question = reasoning.draw(1, source)
    logits = network(question)[0, -1]
    logits[reasoning.PAD] = -math.inf
    responses = reasoning.sample(network, question.repeat(4000, 1), 2.0, source)
    shares = torch.bincount(responses[:, 0], minlength=len(reasoning.WORDS)) / 4000
    torch.testing.assert_close(shares, torch.softmax(logits / 2, -1), atol=0.03, rtol=0)


@torch.no_grad()
def test_the_logits_of_responses_are_those_of_their_tokens_alone() -> None:
    network = untrained()
    questions, responses = reasoning.corpus(12, reasoning.generator(11))
    logits = reasoning.token_logits(network, questions, responses)
    expected = []
    for question, response in zip(questions, responses, strict=True):
        tokens = torch.cat([question, response[response != reasoning.PAD]])
        expected.append(network(tokens[None, :-1])[0, reasoning.QUESTION - 1 :])
    torch.testing.assert_close(logits, torch.cat(expected))


# --- training ----------------------------------------------------------------------------------


def test_advantages_are_deviations_within_the_group() -> None:
    found = reasoning.advantages(torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]]))
    torch.testing.assert_close(found[0], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-3, rtol=0)
    assert found[1].tolist() == [0, 0, 0, 0]


def test_the_policy_gradient_of_a_hand_made_case() -> None:
    """Logits 0 over three words: the gradient of weight · log p is weight · (one-hot − 1/3)."""
    logits = torch.zeros(2, 3, requires_grad=True)
    loss = reasoning.policy_loss(logits, torch.tensor([0, 2]), torch.tensor([1.5, -0.5]))
    assert loss.item() == pytest.approx(-(1.5 - 0.5) * math.log(1 / 3) / 2)
    loss.backward()
    by_hand = -torch.tensor([[1.5 * 2 / 3, -0.5, -0.5], [0.5 / 3, 0.5 / 3, -0.5 * 2 / 3]]) / 2
    torch.testing.assert_close(logits.grad, by_hand)


def test_reinforcement_raises_what_is_rewarded() -> None:
    """A reward for stopping at once, whatever the question."""

    def brief(questions: Tensor, responses: Tensor) -> Tensor:
        return responses[:, 0] == reasoning.STOP

    network = untrained()
    history = reasoning.reinforce(
        network, reasoning.generator(12), steps=60, rate=0.01, problems=8, reward=brief
    )
    assert len(history["reward"]) == len(history["steps"]) == 60
    assert history["reward"][-1] > 0.9 > 0.3 > history["reward"][0]


def test_a_perfect_imitation_has_no_loss_in_either_direction() -> None:
    teacher = untrained()
    questions, responses = reasoning.corpus(20, reasoning.generator(13))
    for divergence in ("forward", "reverse"):
        losses = reasoning.distil(
            copy.deepcopy(teacher), teacher, questions, responses, reasoning.generator(14),
            steps=1, rate=1e-3, own=1.0, divergence=divergence,
        )  # fmt: skip
        assert losses == [pytest.approx(0, abs=1e-6)]


def test_the_two_divergences_weigh_by_the_teacher_and_by_the_student() -> None:
    teacher, student = untrained(seed=1), untrained(seed=2)
    questions, responses = reasoning.corpus(128, reasoning.generator(15))
    found = {}
    for name in ("forward", "reverse"):
        found[name] = reasoning.distil(
            copy.deepcopy(student), teacher, questions, responses, reasoning.generator(16),
            steps=1, rate=1e-3, batch=400, divergence=name,
        )[0]  # fmt: skip
    with torch.no_grad():
        rows = torch.randint(0, 128, (400,), generator=reasoning.generator(16))
        logs = [
            reasoning.token_logits(net, questions[rows], responses[rows]).log_softmax(-1)
            for net in (teacher, student)
        ]
    for name, (p, q) in {"forward": logs, "reverse": logs[::-1]}.items():
        kl = nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
        assert found[name] == pytest.approx(kl.item(), rel=1e-4)


def trained(seed: int) -> reasoning.Reasoner:
    """A little of every kind of training."""
    network, source = untrained(seed=seed), reasoning.generator(seed)
    questions, responses = reasoning.corpus(50, source)
    reasoning.fine_tune(network, questions, responses, source, steps=3, rate=1e-3, batch=8)
    reasoning.distil(
        network, untrained(seed=9), questions, responses, source,
        steps=3, rate=1e-3, batch=8, own=0.5, divergence="reverse",
    )  # fmt: skip
    reasoning.reinforce(network, source, steps=2, rate=1e-3, problems=4, group=2)
    return network


def test_equal_seeds_give_equal_bits_and_others_do_not() -> None:
    first, second, other = (trained(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_network_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    trained(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_on_text_learns_it() -> None:
    network, source = untrained(32), reasoning.generator(17)
    questions = reasoning.draw(300, source, operations=1)
    responses = reasoning.write(questions, reasoning.remainders(questions), torch.zeros(300) > 0)
    losses = reasoning.fine_tune(network, questions, responses, source, steps=150, rate=0.01)
    found = reasoning.measure(network, 10_000, losses, count=200)
    assert found["status"] == "ok"
    assert found["accuracy_1"] > 60
    assert found["steps_1"] == found["unfinished_1"] == 0


# --- what goes wrong ---------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_training_and_is_reported() -> None:
    network = untrained()
    before = copy.deepcopy(network.state_dict())
    losses = reasoning.fit(network, lambda: network.out.weight.sum() * math.inf, steps=5, rate=1e-3)
    assert len(losses) == 1
    assert math.isnan(losses[0])
    assert all(torch.equal(before[name], now) for name, now in network.state_dict().items())
    assert reasoning.measure(network, 10_000, losses, count=50)["status"] == "diverged"


def test_a_network_with_one_answer_to_everything_counts_as_diverged() -> None:
    network, source = untrained(), reasoning.generator(18)
    questions = reasoning.draw(64, source)
    same = torch.full((64, reasoning.MOST), 3)
    responses = reasoning.write(questions, same, torch.zeros(64) > 0)
    losses = reasoning.fine_tune(network, questions, responses, source, steps=60, rate=0.01)
    found = reasoning.measure(network, 10_000, losses, count=50)
    assert math.isfinite(losses[-1])
    assert found["status"] == "diverged"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("generator(-1)", r"seed is -1: expected a whole number"),
        ("draw(0, S)", r"count is 0"),
        (
            "draw(5, S, operations=7)",
            r"operations is 7: expected None or a whole number from 1 to 6",
        ),
        ("remainders(Q, slips=1.5)", r"slips is 1.5: expected a number in \[0, 1\]"),
        ("corpus(5, S, worked='half')", r"worked is 'half'"),
        ("sample(N, Q, -1.0)", r"temperature is -1.0"),
        ("fine_tune(N, Q, R, S, steps=0, rate=1.0)", r"steps is 0"),
        ("fine_tune(N, Q, R, S, steps=1, rate=0)", r"rate is 0"),
        ("fine_tune(N, Q, R, S, steps=1, rate=1.0, batch=True)", r"batch is True"),
        ("distil(N, N, Q, R, S, steps=1, rate=1.0, own=2)", r"own is 2"),
        ("distil(N, N, Q, R, S, steps=1, rate=1.0, divergence='js')", r"one of forward, reverse"),
        ("distil(N, N, Q, R, S, steps=1, rate=1.0, temperature=0)", r"temperature is 0"),
        ("reinforce(N, S, steps=1, rate=1.0, group=1)", r"group is 1: expected .* 2 or more"),
        ("reinforce(N, S, steps=1, rate=1.0, problems=0)", r"problems is 0"),
    ],
)
def test_bad_parameters_are_refused_in_a_line(call: str, message: str) -> None:
    source = reasoning.generator(0)
    questions, responses = reasoning.corpus(5, source)
    names = {"S": source, "Q": questions, "R": responses, "N": untrained()}
    with pytest.raises(ValueError, match=message) as error:
        eval(call, vars(reasoning) | names)
    assert "\n" not in str(error.value)
