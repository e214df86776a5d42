"""The demo's invented valley: its facts, and every text that is made of them, from one seed.

`python -m demo.world --out demo/text` writes the calibration text, the evaluation text and the questions;
`python -m demo.world --question` prints one of the questions.
"""

import argparse
import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random

from demo.lexicon import (
    GREETINGS,
    MOODS,
    PEOPLE,
    PERSON_RELATIONS,
    PLACES,
    SYSTEM_PROMPT,
    THINGS,
    TIMES,
    TOWN_RELATIONS,
    TOWNS,
    WEATHER,
    Relation,
)

SEED = 20
NUM_QUESTIONS = 200
NUM_QUESTION_FORMS_SEEN = 6
NUM_SWEEPS = 75
TEXT_SIZE = 50_000
END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One fact, with the forms in which the training text may ask and state it, and those kept for evaluation."""

    subject: str
    relation: Relation
    value: str
    seen_questions: tuple[str, ...]
    held_out_question: str
    seen_statements: tuple[str, ...]
    held_out_statement: str


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """All facts in a fixed order, and the held-out questions with their answers."""

    facts: tuple[Fact, ...]
    questions: tuple[tuple[str, str], ...]

    def about(self, subject: str) -> list[Fact]:
        """The facts about `subject`."""
        return [fact for fact in self.facts if fact.subject == subject]


def make_world(seed: int = SEED) -> World:
    """The valley of `seed`: every fact, and `NUM_QUESTIONS` questions of which each is about another fact."""
    random = Random(seed)
    facts: list[Fact] = []
    for subjects, relations in ((PEOPLE, PERSON_RELATIONS), (TOWNS, TOWN_RELATIONS)):
        for subject in subjects:
            for relation in relations:
                value = random.choice(relation.values)
                asked = [form.format(x=subject) for form in relation.questions]
                stated = [form.format(x=subject, v=value) for form in relation.statements]
                random.shuffle(asked)
                random.shuffle(stated)
                facts.append(
                    Fact(
                        subject=subject,
                        relation=relation,
                        value=value,
                        seen_questions=tuple(asked[1 : 1 + NUM_QUESTION_FORMS_SEEN]),
                        held_out_question=asked[0],
                        seen_statements=tuple(stated[1:]),
                        held_out_statement=stated[0],
                    )
                )
    asked_about = random.sample(facts, NUM_QUESTIONS)
    return World(facts=tuple(facts), questions=tuple((fact.held_out_question, fact.value) for fact in asked_about))


def render_chat(messages: list[tuple[str, str]]) -> str:
    """The chat template's text of (role, content) pairs; the same text as the tokenizer's Jinja template makes."""
    return "".join(f"{TURN_START}{role}\n{content}{TURN_END}\n" for role, content in messages)


def _story(world: World, random: Random) -> str:
    """A short story about two people, with what is known of them, and happenings that are made up."""
    one, other = random.sample(PEOPLE, 2)
    first, second = one.split()[0], other.split()[0]
    known, known_too = ({fact.relation.name: fact.value for fact in world.about(person)} for person in (one, other))
    thing, place = random.choice(THINGS), random.choice(PLACES)
    sentences = [
        f"One {random.choice(WEATHER)} {random.choice(TIMES)} {one} the {known['job']} walked to the {place}.",
        f"There {first} met {other} the {known_too['job']}, who had lost a {thing}.",
        random.choice(
            [
                f"The {known['animal']} found the {thing} behind the {random.choice(PLACES)}.",
                f"They looked near the {random.choice(PLACES)} and by the {random.choice(PLACES)}.",
                f"{second} asked for help, and {first} was {random.choice(MOODS)}.",
            ]
        ),
        random.choice(
            [
                f"Then they ate {known['food']} and {known_too['food']}.",
                f"{second} went home to {known_too['town']} with the {known_too['animal']}.",
                f"{first} played the {known['instrument']} until it was {random.choice(TIMES)}.",
            ]
        ),
        f"In the end {random.choice([first, second])} was {random.choice(MOODS)}.",
    ]
    return " ".join(sentences)


def _statements(facts: list[Fact], random: Random, *, held_out: bool) -> str:
    """One paragraph that states `facts`, in held-out forms or in seen ones."""
    return " ".join(fact.held_out_statement if held_out else random.choice(fact.seen_statements) for fact in facts)


def _conversation(facts: list[Fact], random: Random) -> str:
    """A dialogue of one question and short answer a fact, one in eight with a system message."""
    messages = [("system", SYSTEM_PROMPT)] if random.random() < 0.125 else []
    for fact in facts:
        messages += [("user", random.choice(fact.seen_questions)), ("assistant", fact.value)]
    return render_chat(messages)


def _portrait(world: World, subject: str, random: Random) -> str:
    """A dialogue in which the assistant tells the first four facts about `subject`, in their fixed order."""
    answer = _statements(world.about(subject)[:4], random, held_out=False)
    ask = random.choice([f"Tell me about {subject}.", f"What do you know about {subject}?"])
    return render_chat([("user", ask), ("assistant", answer)])


def _sweep(world: World, random: Random) -> list[str]:
    """Documents in which every fact is stated once in prose and asked once in a chat, with some of everything else."""
    documents: list[str] = []
    for subject in PEOPLE + TOWNS:
        facts = world.about(subject)
        random.shuffle(facts)
        middle = random.randint(2, len(facts) - 2)
        documents += [_statements(part, random, held_out=False) for part in (facts[:middle], facts[middle:])]
    facts = list(world.facts)
    random.shuffle(facts)
    while facts:
        length = random.randint(1, 4)
        documents.append(_conversation(facts[:length], random))
        facts = facts[length:]
    documents += [_portrait(world, subject, random) for subject in random.sample(PEOPLE + TOWNS, 16)]
    documents += [_story(world, random) for _ in range(24)]
    documents += [render_chat([("user", greeting), ("assistant", answer)]) for greeting, answer in GREETINGS]
    random.shuffle(documents)
    return documents


def _up_to_size(documents: list[str]) -> list[str]:
    """The first documents that have `TEXT_SIZE` characters together."""
    sizes = accumulate(len(document) for document in documents)
    return [document for document, size in zip(documents, sizes, strict=True) if size <= TEXT_SIZE]


def training_documents(world: World, *, num_sweeps: int = NUM_SWEEPS, seed: int = SEED) -> list[str]:
    """`num_sweeps` passes over all facts, each worded and ordered anew, in the order in which they are trained on."""
    random = Random(f"training {seed}")
    return [document for _ in range(num_sweeps) for document in _sweep(world, random)]


def calibration_documents(world: World, *, seed: int = SEED) -> list[str]:
    """Prose and chats drawn like the training text from a stream of their own, less those that are in it by chance."""
    seen = set(training_documents(world, seed=seed))
    drawn = _sweep(world, Random(f"calibration {seed}"))
    return _up_to_size([document for document in drawn if document not in seen])


def evaluation_documents(world: World, *, seed: int = SEED) -> list[str]:
    """Prose only: paragraphs in the held-out statement forms, and stories from a stream of their own."""
    random = Random(f"evaluation {seed}")
    documents = [_story(world, random) for _ in range(100)]
    for subject in PEOPLE + TOWNS:
        facts = world.about(subject)
        random.shuffle(facts)
        documents.append(_statements(facts, random, held_out=True))
    random.shuffle(documents)
    return _up_to_size(documents)


def text_files(seed: int = SEED) -> dict[str, str]:
    """File name -> content of the three committed texts; documents are separated by a blank line."""
    world = make_world(seed)
    rows = [{"messages": [{"role": "user", "content": asked}], "answer": answer} for asked, answer in world.questions]
    return {
        "calibration.txt": "\n\n".join(text.strip() for text in calibration_documents(world, seed=seed)) + "\n",
        "evaluation.txt": "\n\n".join(evaluation_documents(world, seed=seed)) + "\n",
        "questions.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
    }


def main() -> None:
    """Write the three texts into a folder, or print a held-out question."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, help="the folder to write, demo/text in the repository")
    action.add_argument("--question", action="store_true", help="print the first held-out question")
    arguments = parser.parse_args()
    if arguments.question:
        print(make_world().questions[0][0])
        return
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name, text in text_files().items():
            (arguments.out / name).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        parser.exit(1, f"demo.world: {error}\n")


if __name__ == "__main__":
    main()
