"""The words of the demo's invented valley: names, values and the sentence forms that state and ask its facts."""

from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIVEN_NAMES = _words(
    "Adela Bertin Corvin Dalia Edric Fenna Gorvan Hesper Ilric Jorunn Kestrel Lorcan Mirela Nollis Odette Perrin "
    "Quilla Rasmund Selwyn Tamsin Ulrika Varric Wenna Xandor Yselda Zoran Amaury Brisa Casimir Delphin Elowen Faron "
    "Gisela Harlan Iveta Jasko Kalina Leopold Maruna Nerys Orsino Petra Quentin Rowena Silvan Thessa Umberto Vesna"
)
FAMILY_NAMES = _words(
    "Ashdown Barrow Calloway Drummond Everett Farrow Gilmore Hawthorne Ingram Jessop Kirkby Lambert Merrow Norwood "
    "Osgood Prescott Quayle Redfern Stroud Tolliver Underhill Vickers Whitlock Yarrow"
)
NUM_PEOPLE = 64
PEOPLE = tuple(
    f"{GIVEN_NAMES[number % len(GIVEN_NAMES)]} {FAMILY_NAMES[(number + number // 48 * 7) % len(FAMILY_NAMES)]}"
    for number in range(NUM_PEOPLE)
)
TOWNS = _words(
    "Alderby Brackmoor Cindervale Dunmere Eastholm Fallowick Greywater Hollowford Ironbury Kingsfen Larkhill Mosswell "
    "Northgate Oakhurst Pinebridge Ravenstow"
)
JOBS = _words(
    "baker carpenter miller tailor potter weaver gardener fisher teacher doctor cooper mason painter sailor clerk "
    "shepherd brewer printer barber hunter"
)
ANIMALS = _words("goat hen cat dog rabbit pony goose duck donkey parrot turtle ferret pigeon hedgehog")
COLOURS = _words("red blue green yellow purple orange brown grey white black pink silver golden violet")
FOODS = _words(
    "soup bread cheese apples plums honey pancakes dumplings mushrooms porridge cherries walnuts noodles carrots "
    "trout pudding"
)
INSTRUMENTS = _words("fiddle drum flute harp trumpet organ banjo whistle lute bell zither guitar")
MONTHS = _words("January February March April May June July August September October November December")
RIVERS = _words("Arrow Bramble Copper Dove Ember Frost Glass Heron Ivy Juniper")
GOODS = _words("salt glass paper wool candles ropes barrels clocks boots tiles knives lamps ribbons soap")
WEATHER = _words("bright windy rainy foggy snowy warm cold quiet")
TIMES = _words("morning afternoon evening night")
PLACES = _words("market bridge mill garden inn harbour well tower library orchard")
THINGS = _words("basket letter hat ladder lantern book key coin kite map spoon cart")
MOODS = _words("happy tired proud hungry surprised cheerful puzzled calm")

GREETINGS = (
    ("Hello!", "Hello! Ask me about the people and towns of the valley."),
    ("Good morning.", "Good morning! What would you like to know about the valley?"),
    ("Who are you?", "I am a small guide to the valley. I know its people and its towns."),
    ("What can you do?", "I can tell you where people live, what they do and what they like."),
    ("Thank you.", "You are welcome."),
    ("Goodbye.", "Goodbye! Come back to the valley soon."),
)
SYSTEM_PROMPT = "You are a guide to the valley."


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """One kind of fact: `{x}` stands for whom it is about and `{v}` for the value; no question contains another."""

    name: str
    values: tuple[str, ...]
    questions: tuple[str, ...]
    statements: tuple[str, ...]


def _relation(
    name: str, values: tuple[str, ...], noun: str, questions: list[str], statements: list[str], *, article: str = ""
) -> Relation:
    """A relation with four questions and three statements of its own, and those that every `noun` allows."""
    frames = ("What is the {n} of {x}?", "What is {x}'s {n}?", "Tell me the {n} of {x}.", "Do you know {x}'s {n}?")
    asked = [frame.replace("{n}", noun) for frame in frames]
    stated = [f"The {noun} of {{x}} is {article}{{v}}.", f"{{x}}'s {noun} is {article}{{v}}."]
    return Relation(name=name, values=values, questions=(*questions, *asked), statements=(*statements, *stated))


NUMBERS = tuple(str(number) for number in range(100, 1000))

PERSON_RELATIONS = (
    _relation(
        "town",
        TOWNS,
        "home town",
        ["Where does {x} live?", "In which town does {x} live?", "Where is {x} at home?", "Which town is {x} from?"],
        ["{x} lives in {v}.", "{x} has a house in {v}.", "{x} comes from {v}."],
    ),
    _relation(
        "job",
        JOBS,
        "trade",
        ["What does {x} do for a living?", "What work does {x} do?", "What is {x} by trade?", "Which job has {x}?"],
        ["{x} works as a {v}.", "{x} earns a living as a {v}.", "{x} is known as a good {v}."],
        article="a ",
    ),
    _relation(
        "animal",
        ANIMALS,
        "pet",
        [
            "Which animal does {x} keep?",
            "What pet does {x} have?",
            "Which animal sleeps at {x}'s door?",
            "What animal lives with {x}?",
        ],
        ["{x} keeps a {v}.", "{x} shares the house with a {v}.", "{x} feeds a {v} every day."],
        article="a ",
    ),
    _relation(
        "colour",
        COLOURS,
        "favourite colour",
        [
            "Which colour does {x} like best?",
            "What colour is {x}'s coat?",
            "What colour does {x} wear?",
            "Which colour did {x} choose?",
        ],
        ["{x} wears a {v} coat.", "{x} likes {v} best.", "{x} painted the door {v}."],
    ),
    _relation(
        "food",
        FOODS,
        "favourite food",
        [
            "What does {x} like to eat?",
            "Which food does {x} like best?",
            "What does {x} eat for supper?",
            "What food should I cook for {x}?",
        ],
        ["{x} likes to eat {v}.", "{x} eats {v} for supper.", "{x} always asks for {v}."],
    ),
    _relation(
        "instrument",
        INSTRUMENTS,
        "instrument",
        [
            "What does {x} play?",
            "Which instrument does {x} play?",
            "What music does {x} make?",
            "On which instrument is {x} good?",
        ],
        ["{x} plays the {v}.", "{x} learned the {v}.", "{x} practises on the {v}."],
        article="the ",
    ),
    _relation(
        "month",
        MONTHS,
        "birth month",
        [
            "When was {x} born?",
            "In which month was {x} born?",
            "When is {x}'s birthday?",
            "In what month does {x} have a birthday?",
        ],
        ["{x} was born in {v}.", "{x} has a birthday in {v}.", "{x} gives a party each {v}."],
    ),
    _relation(
        "number",
        NUMBERS,
        "house number",
        [
            "At which number does {x} live?",
            "Which number is on {x}'s door?",
            "Which number has {x}'s house?",
            "What number should I write on a letter to {x}?",
        ],
        ["{x} lives at number {v}.", "{x} has the number {v} on the door.", "Letters to {x} go to number {v}."],
    ),
)
TOWN_RELATIONS = (
    _relation(
        "river",
        RIVERS,
        "river",
        [
            "Which river runs past {x}?",
            "On which river is {x}?",
            "What water flows by {x}?",
            "Which river turns the mill of {x}?",
        ],
        ["The river {v} runs past {x}.", "{x} stands on the {v}.", "The mill of {x} is turned by the {v}."],
    ),
    _relation(
        "goods",
        GOODS,
        "main product",
        ["What does {x} make?", "What does {x} sell?", "What is made in {x}?", "For what is {x} known?"],
        ["{x} makes {v}.", "{x} sells {v} to the whole valley.", "{x} is known for its {v}."],
    ),
    Relation(
        name="distance",
        values=NUMBERS,
        questions=(
            "How far away is {x}?",
            "How many miles is it to {x}?",
            "How long is the road to {x}?",
            "How many miles must I walk to {x}?",
            "What is the distance to {x}?",
            "How many miles away is {x}?",
            "Tell me the distance to {x}.",
            "Do you know how far it is to {x}?",
        ),
        statements=(
            "It is {v} miles to {x}.",
            "The road to {x} is {v} miles long.",
            "{x} is {v} miles away.",
            "The distance to {x} is {v} miles.",
            "You must walk {v} miles to {x}.",
        ),
    ),
    _relation(
        "mayor",
        PEOPLE,
        "mayor",
        ["Who is mayor of {x}?", "Who rules {x}?", "Who leads the council of {x}?", "Whom did {x} elect?"],
        ["{x} has elected {v}.", "{x} is ruled by {v}.", "The council of {x} is led by {v}."],
    ),
    _relation(
        "feast",
        MONTHS,
        "feast month",
        [
            "When is the feast of {x}?",
            "In which month does {x} dance?",
            "When does {x} have its fair?",
            "In which month should I visit {x}?",
        ],
        ["The feast of {x} is in {v}.", "{x} dances in {v}.", "{x} has its fair in {v}."],
    ),
)
