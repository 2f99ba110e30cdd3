"""Seeded synthetic dialogues in which a user tells facts and later asks for them.

Owns the wording of the language that the embedded model speaks: statements, questions, answers and small
talk. The same seed gives the same dialogue on every machine. Standard library only; knows nothing of tokens
or models.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

TurnKind = Literal["tell", "ask", "unknown", "chat"]
Message = dict[str, str]

UNKNOWN_ANSWER = "you have not told me that."
SMALL_TALK_ANSWER = "I see. tell me more."


@dataclass(frozen=True, slots=True)
class Turn:
    """One user message and the only right answer to it.

    kind:    "tell" states a fact, "ask" asks for one told, "unknown" for one never told, "chat" neither.
    subject: what a tell, ask or unknown is about, e.g. "cat"; empty for chat.
    value:   the fact as the user spelled it, for tell and ask; else empty.
    """

    user: str
    assistant: str
    kind: TurnKind
    subject: str = ""
    value: str = ""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """An optional system message and the turns after it."""

    system: str | None
    turns: tuple[Turn, ...]

    def messages(self, num_turns: int | None = None) -> list[Message]:
        """The first `num_turns` turns (all by default) as chat messages, each with the right answer."""
        messages: list[Message] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        for turn in self.turns[:num_turns]:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": turn.assistant})
        return messages

    def prompt(self, turn_index: int) -> list[Message]:
        """What the model is given for turn `turn_index`: all before it, answered rightly, and its message."""
        return [*self.messages(turn_index), {"role": "user", "content": self.turns[turn_index].user}]


@dataclass(frozen=True, slots=True)
class FactKind:
    """A family of facts. `{s}` is the subject, `{v}` the value.

    Every template puts a space before the value, so that it is made of the same tokens wherever it stands.
    """

    subjects: tuple[str, ...]
    draw_value: Callable[[random.Random], str]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_SYLLABLES = _words(
    "ba be bi bo da de di do fa fe fi ga go ka ke ki ko la le li lo lu ma me mi mo mu na ne ni no nu pa "
    "pe pi po ra re ri ro ru sa se si so su ta te ti to tu va ve vi vo za ze zi zo bra chi dra fri gul "
    "hen jas kar lin mar nor pla qui ros sch ste tor urs vin wil xan yor zel"
)
_ONSETS = _words(
    "b bl br c ch cl cr d dr f fl fr g gl gr h j k kl kn l m n p ph pl pr qu r s sch sh sk sl sm sn sp st "
    "str sw t th tr tw v w wh x y z"
)
_VOWELS = _words("a a e e i i o o u u y ai au ea ee ei eu ia ie io oa oe oo ou ue")
_CODAS = (
    "",
    "",
    "",
    *_words("b ck d ff g l ld ll lm lt m mp n nd ng nk nn nt p r rd rk rm rn rt s ss st t th x z"),
)
_NAMES = _words(
    "Mia Tom Luna Max Bella Leo Oscar Ruby Felix Rocky Coco Milo Nala Simba Ziggy Pepper Ginger Shadow "
    "Misty Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Liam Maria Nora Oliver Paul Quinn "
    "Rosa Sam Tina Uma Victor Wendy Xavier Yara Zoe Alice Bob Carol Dan Eve Fred"
)
_TOWNS = _words(
    "Paris London Berlin Rome Madrid Vienna Oslo Athens Cairo Tokyo Lima Delhi Boston Denver Dublin "
    "Geneva Zurich Prague Warsaw Lisbon Milan Kyoto Seoul Sydney Toronto Chicago Austin Munich Porto "
    "Bergen"
)
_FAVOURITES = _words(
    "red blue green yellow purple orange black white pink brown pizza rice soup bread cheese pasta salad "
    "tea coffee milk juice water tennis chess football hockey golf rugby summer winter spring autumn "
    "apple pear plum cherry mango rose tulip lily daisy tiger lion bear wolf fox eagle owl whale shark"
)
_JOBS = _words("baker nurse pilot farmer painter singer writer lawyer driver cook tailor builder judge clerk plumber")


def invented(rng: random.Random) -> str:
    """A word that no list holds: the model has to copy it, it cannot have learnt it."""
    if rng.random() < 0.6:
        return "".join(rng.choice(_SYLLABLES) for _ in range(rng.choice((2, 2, 3))))
    # Rarer spellings, so that any name a person types is copied right, not only those made of common tokens.
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.choice((1, 2, 2))))


def _proper_noun(rng: random.Random, known: tuple[str, ...], known_share: float) -> str:
    word = rng.choice(known) if rng.random() < known_share else invented(rng).capitalize()
    return word.lower() if rng.random() < 0.15 else word


def draw_name(rng: random.Random) -> str:
    first = _proper_noun(rng, _NAMES, 0.4)
    return f"{first} {_proper_noun(rng, _NAMES, 0.4)}" if rng.random() < 0.05 else first


def draw_town(rng: random.Random) -> str:
    return _proper_noun(rng, _TOWNS, 0.6)


def draw_favourite(rng: random.Random) -> str:
    return rng.choice(_FAVOURITES) if rng.random() < 0.75 else invented(rng)


def _job(rng: random.Random) -> str:
    return rng.choice(_JOBS) if rng.random() < 0.8 else invented(rng)


def draw_code(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(4))


FACT_KINDS: tuple[FactKind, ...] = (
    FactKind(
        _words("cat dog parrot hamster rabbit horse turtle goldfish snake lizard pony duck goat sheep"),
        draw_name,
        (
            "my {s} is called {v}",
            "my {s} is named {v}",
            "I have a {s} called {v}",
            "the name of my {s} is {v}",
            "my {s}'s name is {v}",
        ),
        (
            "what is my {s} called?",
            "what is my {s}'s name?",
            "what is the name of my {s}?",
            "do you remember what my {s} is called?",
        ),
        "your {s} is called {v}.",
    ),
    FactKind(
        _words("brother sister mother father uncle aunt cousin friend boss neighbour teacher doctor"),
        draw_name,
        (
            "my {s} is called {v}",
            "my {s} is named {v}",
            "I have a {s} called {v}",
            "the name of my {s} is {v}",
            "my {s}'s name is {v}",
        ),
        (
            "what is my {s} called?",
            "what is my {s}'s name?",
            "what is the name of my {s}?",
            "who is my {s}?",
        ),
        "your {s} is called {v}.",
    ),
    FactKind(
        _words("office school hotel museum bakery garage garden studio shop farm gym library"),
        draw_town,
        ("my {s} is in {v}", "did I tell you that my {s} is in {v}?"),
        ("where is my {s}?", "in which town is my {s}?"),
        "your {s} is in {v}.",
    ),
    FactKind(
        _words("colour food drink song sport animal season fruit flower book film"),
        draw_favourite,
        ("my favourite {s} is {v}", "I like {v}, it is my favourite {s}", "the {s} I like best is {v}"),
        ("what is my favourite {s}?", "which {s} do I like best?"),
        "your favourite {s} is {v}.",
    ),
    FactKind(
        _words("bike locker phone car house safe laptop suitcase boat gate"),
        draw_code,
        ("the code of my {s} is {v}", "please remember that the code of my {s} is {v}", "my {s} code is {v}"),
        ("what is the code of my {s}?", "what is my {s} code?", "I forgot the code of my {s}, what is it?"),
        "the code of your {s} is {v}.",
    ),
    FactKind(
        ("name",),
        draw_name,
        ("my name is {v}", "hello, my name is {v}", "hi, I am {v}", "hi! my name is {v}"),
        ("what is my name?", "who am I?", "do you remember my name?"),
        "your name is {v}.",
    ),
    FactKind(
        ("home",),
        draw_town,
        ("I live in {v}", "my home is in {v}"),
        ("where do I live?", "where is my home?", "in which town do I live?"),
        "you live in {v}.",
    ),
    FactKind(
        ("job",),
        _job,
        ("I work as a {v}", "my job is {v}"),
        ("what is my job?", "what do I do for work?"),
        "you work as a {v}.",
    ),
)

SMALL_TALK = (
    ("hello", "hello! how can I help you?"),
    ("hi", "hello! how can I help you?"),
    ("how are you?", "I am fine, thank you."),
    ("thanks", "you are welcome."),
    ("thank you", "you are welcome."),
    ("what can you do?", "I can remember what you tell me."),
    ("who are you?", "I am a very small model. I remember what you tell me."),
    ("tell me a joke", "I only know how to remember things."),
    ("good morning", "good morning!"),
    ("good night", "good night!"),
    ("bye", "good bye!"),
    ("ok", "great."),
)

_SYSTEM = (
    "You are a helpful assistant.",
    "You are a friendly assistant that remembers what it is told.",
    "Answer in one short sentence.",
    "Be polite and brief.",
    "Remember the facts that the user tells you.",
    "If you do not know something, say so.",
)

# Small talk never uses a word that is a subject or a listed value: what was told stays unambiguous.
_WHO = ("we", "they", "I", "everyone", "the children", "some people", "two old men", "the people next to me")
_DID = (
    "went for a long walk",
    "talked about the news",
    "waited for the train",
    "looked out of the window",
    "had a quiet time",
    "sat down near the river",
    "played a game of cards",
    "did not sleep very well",
    "cleaned the kitchen",
    "read the paper",
    "listened to the radio",
    "had to laugh a lot",
    "moved the table to the other room",
    "took the wrong bus",
    "wanted to stay longer",
)
_WHEN = (
    "today",
    "yesterday",
    "this morning",
    "last week",
    "in the evening",
    "after lunch",
    "for an hour",
    "again",
    "",
)
_REMARKS = (
    "it was {a} outside",
    "the weather is {a} today",
    "my day was {a}",
    "the street was {a} and the shops were closed",
    "that was {a}, I think",
    "my train was late and the station was {a}",
    "there was a {a} noise in the night",
    "nothing much happened",
    "it is raining",
    "I am tired",
    "time goes by so fast",
)
_ADJECTIVES = _words("cold warm nice strange quiet busy long dark lovely boring loud calm")
_AMERICAN = (("favourite", "favorite"), ("colour", "color"), ("neighbour", "neighbor"))
_OPENERS = ("well, ", "anyway, ", "you know, ", "so, ", "and ", "then ")


def small_talk_sentence(rng: random.Random) -> str:
    if rng.random() < 0.6:
        sentence = f"{rng.choice(_WHO)} {rng.choice(_DID)} {rng.choice(_WHEN)}".rstrip()
    else:
        sentence = rng.choice(_REMARKS).format(a=rng.choice(_ADJECTIVES))
    return rng.choice(_OPENERS) + sentence if rng.random() < 0.25 else sentence


def _small_talk(rng: random.Random, num_words: int) -> list[str]:
    """Sentences without a fact, about `num_words` words together."""
    sentences: list[str] = []
    while num_words > 0:
        sentences.append(small_talk_sentence(rng))
        num_words -= len(sentences[-1].split())
    return sentences


def spell(rng: random.Random, sentences: list[str]) -> str:
    """Joins sentences the way one user types: with or without capitals and a last punctuation mark."""
    capitals, lower_i = rng.random() < 0.5, rng.random() < 0.2
    spelled: list[str] = []
    for sentence in sentences:
        if capitals:
            sentence = sentence[0].upper() + sentence[1:]
        elif lower_i:
            sentence = " ".join("i" if word == "I" else word for word in sentence.split(" "))
        spelled.append(sentence if sentence.endswith(("?", "!")) else sentence + ".")
    text = " ".join(spelled)
    if rng.random() < 0.35:
        text = text.rstrip("?.!")
    if rng.random() < 0.2:
        for british, american in _AMERICAN:
            text = text.replace(british, american)
    if rng.random() < 0.2:
        text = text.replace("What is ", "What's ").replace("what is ", "what's ")
    return text


def draw_message(rng: random.Random, sentence: str, num_words: int) -> str:
    """Places the sentence that matters mostly after the small talk, sometimes before it or inside."""
    talk = _small_talk(rng, num_words)
    position = len(talk) if rng.random() < 0.7 else rng.randint(0, len(talk))
    return spell(rng, [*talk[:position], sentence, *talk[position:]])


def generate_turns(
    rng: random.Random,
    filler_words: tuple[int, int],
    *,
    ask_share: float = 0.5,
    unknown_share: float = 0.15,
    most_facts: int = 40,
) -> Iterator[Turn]:
    """Endless turns of one user.

    filler_words:  least and most words of small talk around each message (a word is about 1.2 tokens).
    ask_share:     how often a turn asks rather than tells, once there is something to ask for.
    unknown_share: how many of the asks are for something never told.
    most_facts:    how many facts the user has to tell; with these told, the turns only ask.

    A fact told twice is rare; its latest value is the right answer.
    """
    # Shuffled, but name, home and job often come first, as people begin with them.
    untold = [(kind, subject) for kind in FACT_KINDS for subject in kind.subjects]
    rng.shuffle(untold)
    untold.sort(key=lambda fact: len(fact[0].subjects) > 1 or rng.random() < 0.7)
    told: dict[tuple[FactKind, str], str] = {}

    while True:
        num_words = rng.randint(*filler_words)
        if rng.random() < 0.06:
            if num_words and rng.random() < 0.7:
                yield Turn(spell(rng, _small_talk(rng, num_words)), SMALL_TALK_ANSWER, "chat")
            else:
                user, answer = rng.choice(SMALL_TALK)
                yield Turn(spell(rng, [user]), answer, "chat")
            continue
        has_told_all = len(told) >= most_facts or not untold
        if told and (has_told_all or rng.random() < ask_share):
            if untold and rng.random() < unknown_share:
                kind, subject = rng.choice(untold)
                question = rng.choice(kind.questions).format(s=subject)
                yield Turn(draw_message(rng, question, num_words), UNKNOWN_ANSWER, "unknown", subject)
            else:
                kind, subject = rng.choice(list(told))
                value = told[kind, subject]
                question = rng.choice(kind.questions).format(s=subject)
                answer = kind.answer.format(s=subject, v=value)
                yield Turn(draw_message(rng, question, num_words), answer, "ask", subject, value)
        else:
            is_update = bool(told) and rng.random() < 0.05
            kind, subject = rng.choice(list(told)) if is_update else untold.pop(0)
            value = told[kind, subject] = kind.draw_value(rng)
            statement = rng.choice(kind.statements).format(s=subject, v=value)
            answer = "ok, " + kind.answer.format(s=subject, v=value)
            yield Turn(draw_message(rng, statement, num_words), answer, "tell", subject, value)


def draw_system(rng: random.Random) -> str | None:
    """A system message in three dialogues of ten; it never changes an answer."""
    if rng.random() >= 0.3:
        return None
    sentences = rng.sample(_SYSTEM, rng.randint(1, 4))
    if rng.random() < 0.3:
        # A long one, as applications have: its text does not matter here, its length does.
        sentences.append(spell(rng, _small_talk(rng, rng.randint(20, 200))))
    return " ".join(sentences)


def draw_filler_words(rng: random.Random) -> tuple[int, int]:
    """How talkative the user of one dialogue is: from not at all to about 200 tokens a message."""
    return rng.choices(((0, 0), (0, 20), (0, 70), (0, 170), (120, 170)), weights=(30, 30, 20, 14, 6))[0]


def generate_dialogue(seed: int, num_turns: int, filler_words: tuple[int, int] | None = None) -> Dialogue:
    """The dialogue of this seed. Without `filler_words` the seed also decides how talkative its user is."""
    rng = random.Random(seed)
    system = draw_system(rng)
    if filler_words is None:
        filler_words = draw_filler_words(rng)
    return Dialogue(system, tuple(islice(generate_turns(rng, filler_words), num_turns)))
