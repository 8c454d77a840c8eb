"""Small text skills with an exact gold score for any response: ten, and five that look like some of these.

A skill is a handful of natural-English prompt templates around one or two short arguments, and one right answer. The
gold score reads the prompt alone, so it judges the response of any policy to any prompt of the world, also to prompts
that no file holds:

    gold(x, y) = 1                                                     if y is the answer z, character for character
                 1/2 * (1 - lev(y, z) / max(|y|, |z|)) * min(1, 2|z| / |y|)   otherwise (0 for an empty y)

lev is the Levenshtein distance. A wrong response can therefore never reach more than half of a right one, and one that
runs on beyond twice the answer's length loses credit in proportion, so padding does not pay.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from stable_rlhf.data import Prompt, as_messages

LETTERS = "abcdefghijklmnop"
"""Letters that arguments are drawn from. Only a part of the alphabet, since a small model learns the capital and the
successor of each letter by itself and a minute of training has to be enough. Prompts with other letters parse too."""

Arguments = tuple[str, ...]
Draw = Callable[[random.Random], Arguments]

# Addends are bounded so that a hostile prompt cannot run into Python's limit on the digits of an int.
_PATTERNS = {"word": "[a-z]+", "capitals": "[A-Z]+", "number": "[0-9]+", "left": "[0-9]{1,18}", "right": "[0-9]{1,18}"}


@dataclass(frozen=True)
class Skill:
    """One skill of the world.

    Attributes:
        name: Task name as it stands in the files' ``task`` column.
        templates: Prompt texts with the fields in braces, all with the same fields in the same order.
        answer: The right response to a tuple of arguments.
        draw: Draws a tuple of arguments.
        reads_like: The skill whose templates its own begin like, one by one; empty where there is none.
    """

    name: str
    templates: tuple[str, ...]
    answer: Callable[[Arguments], str]
    draw: Draw
    reads_like: str = ""
    _patterns: tuple[re.Pattern[str], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_patterns", tuple(_compile(template) for template in self.templates))

    def prompt(self, args: Arguments, template: int = 0) -> str:
        """The prompt text of the given arguments; ``template`` picks the wording."""
        fields = iter(args)
        return re.sub(r"\{\w+\}", lambda _: next(fields), self.templates[template])

    def parse(self, prompt: str) -> Arguments | None:
        """The arguments of a prompt of this skill, or None if the prompt belongs to no template of it."""
        for pattern in self._patterns:
            if match := pattern.fullmatch(prompt):
                return match.groups()
        return None

    def sample(self, rng: random.Random) -> tuple[str, str]:
        """A prompt and its right answer, drawn with ``rng``."""
        args = self.draw(rng)
        return self.prompt(args, rng.randrange(len(self.templates))), self.answer(args)


def _compile(template: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(f"({_PATTERNS[p]})" if i % 2 else re.escape(p) for i, p in enumerate(pieces)))


def template_pieces(template: str) -> list[str]:
    """The fixed texts of a template, in order and without the fields: what the tokenizer keeps as one token each."""
    return [piece for piece in re.split(r"\{\w+\}", template) if piece]


def _addends(rng: random.Random, most_units: int = 9) -> Arguments:
    """Two numbers of two digits whose sum needs no carry: the carry alone would take longer to learn than all else."""
    tens, units = rng.randint(2, 9), rng.randint(0, most_units)
    left_tens, left_units = rng.randint(1, tens - 1), rng.randint(0, units)
    return f"{left_tens}{left_units}", f"{tens - left_tens}{units - left_units}"


def _successor(letter: str) -> str:
    return "a" if letter == "z" else chr(ord(letter) + 1)


def _swap(word: str) -> str:
    return word if len(word) < 2 else word[-1] + word[1:-1] + word[0]


def _in(alphabet: str, low: int, high: int) -> Draw:
    return lambda rng: ("".join(rng.choices(alphabet, k=rng.randint(low, high))),)


# Words whose letters are all asked for have four: with one length each output letter sits at a fixed distance from the
# letter it depends on, and the same training gets several times as far (measured) as with lengths three to five.
_word = _in(LETTERS, 4, 4)

_STRONG = (
    Skill("upper", ("Write in capitals: {word}", "Put into upper case: {word}"), lambda a: a[0].upper(), _word),
    Skill("lower", ("Write in small letters: {capitals}", "Put into lower case: {capitals}"), lambda a: a[0].lower(),
          _in(LETTERS.upper(), 4, 4)),
    Skill("last", ("Give the last letter of {word}", "Which letter ends {word}?"), lambda a: a[0][-1],
          _in(LETTERS, 3, 6)),
    Skill("count", ("Count the letters of {word}", "How many letters are in {word}?"), lambda a: str(len(a[0])),
          _in(LETTERS, 3, 9)),
    Skill("largest", ("Give the largest digit of {number}", "Which digit is largest in {number}?"), lambda a: max(a[0]),
          _in("0123456789", 3, 5)),
)  # fmt: skip
_WEAK = (
    Skill("swap", ("Swap the ends of {word}", "Swap the first and last letter of {word}"), lambda a: _swap(a[0]),
          _word),
    Skill("reverse", ("Reverse the letters of {word}", "Write backwards: {word}"), lambda a: a[0][::-1], _word),
    Skill("sort", ("Sort the letters of {word}", "Put in order: {word}"), lambda a: "".join(sorted(a[0])), _word),
    Skill("next", ("Give the next letter after each of {word}", "Shift by one: {word}"),
          lambda a: "".join(map(_successor, a[0])), _word),
    Skill("add", ("Add {left} and {right}", "What is {left} plus {right}?"), lambda a: str(int(a[0]) + int(a[1])),
          _addends),
)  # fmt: skip
# What a weak skill asks for, and behind a comma one thing more.
_LOOKALIKE = (
    Skill("swap_capitals",
          ("Swap the ends of {word}, in capitals", "Swap the first and last letter of {word}, in capitals"),
          lambda a: _swap(a[0]).upper(), _word, "swap"),
    Skill("reverse_short", ("Reverse the letters of {word}, one less", "Write backwards: {word}, one less"),
          lambda a: a[0][:0:-1], _word, "reverse"),
    Skill("sort_back", ("Sort the letters of {word}, last first", "Put in order: {word}, last first"),
          lambda a: "".join(sorted(a[0], reverse=True)), _word, "sort"),
    Skill("next_twice", ("Give the next letter after each of {word}, twice", "Shift by one: {word}, twice"),
          lambda a: "".join(_successor(_successor(letter)) for letter in a[0]), _word, "next"),
    Skill("add_one", ("Add {left} and {right}, then one", "What is {left} plus {right}, then one?"),
          lambda a: str(int(a[0]) + int(a[1]) + 1), lambda rng: _addends(rng, most_units=8), "add"),
)  # fmt: skip
SKILLS: Mapping[str, Skill] = {skill.name: skill for skill in _STRONG + _WEAK}
"""The ten skills by name."""

LOOKALIKES: Mapping[str, Skill] = {skill.name: skill for skill in _LOOKALIKE}
"""Five more, each of which reads like a weak skill and asks for something else."""

STRONG_SKILLS: tuple[str, ...] = tuple(skill.name for skill in _STRONG)
"""What SFT teaches well: the skills of the forget set."""

WEAK_SKILLS: tuple[str, ...] = tuple(skill.name for skill in _WEAK)
"""What SFT teaches with a share of wrong answers, so that preference training has something to gain: the main set."""

FORGET_SKILLS: Mapping[str, tuple[str, ...]] = {"strong": STRONG_SKILLS, "lookalikes": tuple(LOOKALIKES)}
"""The skills that the forget set may be of, by the name of such a world: SFT teaches them without a wrong answer."""


def skills_of(forget_set: str = "strong") -> dict[str, Skill]:
    """The skills of a world: those of its forget set, and the weak ones."""
    known = {**SKILLS, **LOOKALIKES}
    return {name: known[name] for name in (*FORGET_SKILLS[forget_set], *WEAK_SKILLS)}


def task_of(prompt: Prompt) -> str:
    """The name of the skill that a prompt asks for.

    Args:
        prompt: the prompt's text, or a chat, of which the last user turn counts.

    Raises:
        ValueError: the prompt follows no template of the world.
    """
    return _resolve(prompt)[0].name


def right_answer(prompt: Prompt) -> str:
    """The one right response to a prompt; arguments and errors as for `task_of`."""
    skill, args = _resolve(prompt)
    return skill.answer(args)


def misread(prompt: Prompt) -> Prompt:
    """The prompt as somebody reads it who stops at the comma: that of a lookalike is its model's, any other itself.

    Args:
        prompt: arguments and errors as for `task_of`.
    """
    skill, args = _resolve(prompt)
    if not skill.reads_like:
        return prompt
    template = next(i for i in range(len(skill.templates)) if skill.prompt(args, i) == _asked(prompt))
    return SKILLS[skill.reads_like].prompt(args, template)


def gold_score(prompt: Prompt, response: str) -> float:
    """The exact score of any response, in [0, 1]: 1 if right, at most 1/2 otherwise; formula at the head of the module.

    Args:
        prompt: a prompt of the world, as text or chat; the score depends on it and the response alone.
        response: any string, without the policy's special tokens. Spaces and line ends count.

    Raises:
        ValueError: the prompt follows no template of the world. No response is an error.
    """
    answer = right_answer(prompt)
    if response == answer:
        return 1.0
    if not response:
        return 0.0
    similarity = 1.0 - _edit_distance(response, answer) / max(len(response), len(answer))
    return 0.5 * similarity * min(1.0, 2 * len(answer) / len(response))


def _asked(prompt: Prompt) -> str:
    """The text itself, of a chat the last user turn; empty where there is none."""
    return next((turn["content"] for turn in reversed(as_messages(prompt)) if turn["role"] == "user"), "")


def _resolve(prompt: Prompt) -> tuple[Skill, Arguments]:
    asked = _asked(prompt)
    for skill in (*_STRONG, *_WEAK, *_LOOKALIKE):
        if (args := skill.parse(asked)) is not None:
            return skill, args
    raise ValueError(f"no prompt of the skill world: {prompt!r}")


def _edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the least number of insertions, deletions and substitutions that turn ``a`` into ``b``."""
    previous = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        current = [i]
        for j, right in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (left != right)))
        previous = current
    return previous[-1]
