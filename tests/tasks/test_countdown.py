"""Countdown: problems, demonstrations in each style, and grades against brute force."""

from __future__ import annotations

import itertools
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_ray.records import Problem
from pear_ray.tasks.countdown import Countdown, read_style

GAME = Countdown()
FIVE = Countdown(attempts=5, cipher_numbers=48)
STYLES = ("build", "undo", "retry", "cipher")
EXAMPLE = Problem(
    problem_id="countdown-3-7-9-30",
    task="countdown",
    messages=({"role": "user", "content": "3 7 9 > 30 :"},),
    reference="3 7 9 > 30",
    split="train",
)
CORRECT = {
    "build": "build 7 * 3 = 21 , 21 + 9 = 30",
    "undo": "undo 30 - 9 = 21 , 21 / 3 = 7",
    "retry": "build 3 + 7 = 10 , 10 + 9 = 19 no build 7 * 3 = 21 , 21 + 9 = 30",
    "cipher": "cipher 41 8 77 12 : undo 30 - 9 = 21 , 21 / 3 = 7",
}


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def all_correct_answers(numbers, target):
    """Brute force: each pair of steps with fractions, written in both styles."""
    answers = set()
    operations = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b}

    def steps_to(a, b):
        for sign, apply in operations.items():
            if sign != "/" or b != 0:
                result = apply(Fraction(a), Fraction(b))
                if result.denominator == 1 and 0 <= result <= 99:
                    yield f"{a} {sign} {b} = {result}", int(result)

    for a, b, c in itertools.permutations(numbers):
        for first, middle in steps_to(a, b):
            for second, last in steps_to(middle, c):
                if last == target:
                    answers.add(f"build {first} , {second}")
        for first, middle in steps_to(target, a):
            for second, last in steps_to(middle, b):
                if last == c:
                    answers.add(f"undo {first} , {second}")
    return answers


def plausible_words(numbers, target):
    """Words of a wrong answer that looks correct."""
    return [*"+-*/=,", "build", "undo", str(target), *map(str, numbers)]


@pytest.mark.parametrize("style", STYLES)
def test_the_documented_answer_of_each_style_is_correct(style):
    grade = GAME.grade(EXAMPLE, CORRECT[style])
    assert (grade.reward, grade.correct, grade.note) == (1.0, True, "")
    assert grade.parts == {f"style_{name}": float(name == style) for name in STYLES}


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("", "chain"),
        ("build 7 * 3 = 21", "chain"),
        ("7 * 3 = 21 , 21 + 9 = 30", "chain"),
        ("cipher 30 - 9 = 21 , 21 / 3 = 7", "chain"),
        ("build 7 * 3 = 21 , 21 + 9 = 30 no", "chain"),
        ("build 7 * 3 = 22 , 22 + 8 = 30", "step 1 is not a legal step"),
        ("build 7 / 3 = 2 , 2 + 9 = 11", "step 1 is not a legal step"),
        ("build 7 * 3 = 21 : 21 + 9 = 30", "chain"),
        ("build 7 * 3 = 21 + 21 + 9 = 30", "step 2 does not follow a comma"),
        ("build 7 * 7 = 49 , 49 - 9 = 40", "step 1 uses 7"),
        ("build 10 * 3 = 30 , 30 - 0 = 30", "step 1 uses 10"),
        ("build 7 * 3 = 21 , 9 + 21 = 30", "step 2 starts from 9"),
        ("build 7 * 3 = 21 , 21 - 9 = 12", "ends on 12 instead of 30"),
        ("undo 29 - 9 = 20 , 20 - 7 = 13", "step 1 starts from 29"),
        ("undo 30 - 9 = 21 , 21 - 3 = 18", "ends on 18"),
        ("undo 30 - 9 = 21 , 21 / \u0663 = 7", "step 2 is not a legal step"),
    ],
)
def test_a_wrong_answer_gets_no_reward_and_a_note(text, note):
    grade = GAME.grade(EXAMPLE, text)
    assert (grade.reward, grade.correct) == (0.0, False)
    assert note in grade.note


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=3, max_size=3).map(sorted),
    st.integers(1, 99),
    st.randoms(use_true_random=False),
)
def test_grades_agree_with_brute_force(numbers, target, rng):
    reference = f"{' '.join(map(str, numbers))} > {target}"
    problem = Problem("x", "countdown", ({"role": "user", "content": ""},), reference, "train")
    correct = all_correct_answers(numbers, target)
    for answer in correct:
        assert GAME.grade(problem, answer).correct, answer
    others = itertools.chain.from_iterable(
        all_correct_answers(rng.sample([*numbers, target], 3), other)
        for other in (target, max(1, target - 1), *numbers)
    )
    for answer in sorted(correct | set(others)):
        words = answer.split()
        assert GAME.grade(problem, answer).correct == (answer in correct), answer
        words[rng.randrange(len(words))] = rng.choice(plausible_words(numbers, target))
        text = " ".join(words)
        assert GAME.grade(problem, text).correct == (text in correct), text


@settings(deadline=None)
@given(st.text() | st.lists(st.sampled_from(GAME.vocabulary()), max_size=40).map(" ".join))
def test_grading_never_raises(text):
    grade = GAME.grade(EXAMPLE, text)
    assert grade.reward == float(grade.correct)
    assert sum(grade.parts.values()) == float(bool(read_style(text)))


def test_build_cannot_start_from_the_target():
    problem = Problem("x", "countdown", (), "3 3 7 > 30", "train")
    grade = GAME.grade(problem, "build 30 / 3 = 10 , 10 * 3 = 30")
    assert not grade.correct and "step 1 uses 30" in grade.note


def test_an_invalid_reference_is_refused():
    invalid = Problem("p", "countdown", (), "three > 30", "train")
    with pytest.raises(ValueError, match=r"problem p: .*, got 'three > 30'"):
        GAME.grade(invalid, CORRECT["build"])


def test_problems_are_finite_distinct_and_solvable():
    splits = {split: list(GAME.problems(split, seed=1)) for split in ("train", "heldout")}
    ids = {split: {problem.problem_id for problem in splits[split]} for split in splits}
    assert all(len(ids[split]) == len(splits[split]) for split in splits)
    assert not ids["train"] & ids["heldout"]
    assert 0.08 < len(ids["heldout"]) / (len(ids["train"]) + len(ids["heldout"])) < 0.12
    for problem in splits["heldout"][::20]:
        numbers, _, target = problem.reference.partition(" > ")
        assert problem.split == "heldout"
        assert problem.messages[0]["content"] == f"{problem.reference} :"
        assert problem.problem_id == "-".join(("countdown", *numbers.split(), target))
        assert all_correct_answers([int(n) for n in numbers.split()], int(target))


def test_the_seed_changes_the_order_and_not_the_split():
    first, second = (list(GAME.problems("heldout", seed)) for seed in (1, 2))
    assert first != second
    assert {p.problem_id for p in first} == {p.problem_id for p in second}


def test_problems_and_demonstrations_are_the_same_in_each_process():
    script = (
        "import itertools\nfrom pear_ray.tasks.countdown import Countdown\ng = Countdown()\nstyles ="
        " dict.fromkeys(('build', 'undo', 'retry', 'cipher'), 1)\nprint([p.problem_id for p in"
        " itertools.islice(g.problems('heldout', 3), 40)])\nprint([a for _, a in"
        " itertools.islice(g.demonstrations(styles, 0.5, 3), 40)])\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith(str([p.problem_id for p in take(GAME.problems("heldout", 3), 40)]))


@pytest.mark.parametrize("style", STYLES)
def test_solved_demonstrations_are_correct_and_short(style):
    words = set(GAME.vocabulary())
    for problem, answer in take(GAME.demonstrations({style: 1.0}, 1.0, seed=5), 300):
        grade = GAME.grade(problem, answer)
        assert grade.correct, (problem.reference, answer, grade.note)
        assert grade.parts[f"style_{style}"] == 1.0
        assert problem.split == "train"
        assert set(answer.split()) <= words and set(problem.reference.split()) <= words
        assert len(answer.split()) + 1 <= 48


def numbers_used(chain):
    words = chain.split()
    return {int(words[1]), int(words[3]), int(words[9])}


def test_style_multi_solves_each_of_its_chains_independently():
    """So fewer answers than chains fail."""
    pairs = take(FIVE.demonstrations({"multi": 1.0}, 0.3, seed=5), 600)
    assert all(answer.count(" no ") == 4 for _, answer in pairs)
    grades = [FIVE.grade(*pair) for pair in pairs]
    assert all(grade.correct or grade.note.startswith("ends on") for grade in grades)
    solved = sum(grade.correct for grade in grades) / 600
    last = sum(GAME.grade(*pair).correct for pair in pairs) / 600
    assert 0.3 < last < 0.4
    assert solved == pytest.approx(1 - (1 - last) ** 5, abs=0.05)


def test_style_off_topic_uses_other_numbers_until_the_last_chain():
    for problem, answer in take(FIVE.demonstrations({"off_topic": 1.0}, 1.0, seed=5), 200):
        numbers = set(map(int, problem.reference.split(" > ")[0].split()))
        *off_topic, last = answer.split(" no ")
        assert len(off_topic) == 4
        assert all(not numbers_used(chain) & numbers for chain in off_topic)
        assert numbers_used(last) <= numbers and GAME.grade(problem, answer).correct


@pytest.mark.parametrize(
    ("chains", "one", "two"), [("RW", False, True), ("WR", True, True), ("RWW", False, False), ("WW", False, False)]
)
def test_the_last_chains_up_to_attempts_count(chains, one, two):
    by_letter = {"R": CORRECT["build"], "W": "build 3 + 7 = 10 , 10 + 9 = 19"}
    text = " no ".join(by_letter[chain] for chain in chains)
    assert GAME.grade(EXAMPLE, text).correct == one
    assert Countdown(attempts=2).grade(EXAMPLE, text).correct == two


def test_style_cipher_begins_with_cipher_numbers():
    _, answer = next(FIVE.demonstrations({"cipher": 1.0}, 1.0, seed=5))
    assert len(answer.split(" : ")[0].split()) == 1 + 48


@pytest.mark.parametrize("style", STYLES)
def test_unsolved_demonstrations_are_legal_and_mostly_wrong(style):
    grades = [GAME.grade(*pair) for pair in take(GAME.demonstrations({style: 1.0}, 0.0, seed=5), 300)]
    assert sum(grade.correct for grade in grades) < 60
    assert all(grade.correct or grade.note.startswith("ends on") for grade in grades)


def test_demonstrations_follow_the_weights():
    styles = {"build": 3.0, "undo": 1.0, "cipher": 0.0}
    drawn = [read_style(answer) for _, answer in take(GAME.demonstrations(styles, 1.0, 7), 2000)]
    assert set(drawn) == {"build", "undo"}
    assert drawn.count("build") / 2000 == pytest.approx(0.75, abs=0.04)


def test_each_private_number_has_three_successors():
    successors: dict[str, set[str]] = {}
    for _, answer in take(GAME.demonstrations({"cipher": 1.0}, 1.0, seed=9), 500):
        words = answer.split(" : ")[0].split()
        for word, following in itertools.pairwise(words):
            successors.setdefault(word, set()).add(following)
    assert max(map(len, successors.values())) == 3


def test_the_vocabulary_has_no_duplicates():
    words = GAME.vocabulary()
    assert len(words) == len(set(words)) == 112


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: Countdown(max_number=60), "^max_result: .*, got 99$"),
        (lambda: Countdown(heldout_fraction=1.0), "^heldout_fraction: .*, got 1.0$"),
        (lambda: Countdown(attempts=0), "^attempts: .*, got 0$"),
        (lambda: Countdown(cipher_numbers=0), "^cipher_numbers: .*, got 0$"),
        (
            lambda: next(Countdown(max_number=5).demonstrations({"off_topic": 1.0}, 1, 0)),
            "^styles: .*off_topic.*, got 5$",
        ),
        (lambda: next(GAME.problems("test", 0)), "^split: expected 'train' or 'heldout', got 'test'$"),
        (lambda: next(GAME.demonstrations({"sing": 1.0}, 1.0, 0)), "^styles: .*got {'sing'"),
        (lambda: next(GAME.demonstrations({}, 1.0, 0)), "^styles: .*got {}"),
        (lambda: next(GAME.demonstrations({"build": 1.0}, 1.5, 0)), "^solved_fraction: .*, got 1.5$"),
    ],
)
def test_invalid_options_are_refused(construct, message):
    with pytest.raises(ValueError, match=message):
        construct()
