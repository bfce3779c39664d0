"""What an answer says: a letter, yes or no, a number, the words that VQA compares. `None` where it cannot be told."""

import re
from collections.abc import Mapping, Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def parse_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer names.

    In this order: the letter alone, with or without brackets or a mark after it; a letter with a mark at the start
    ("B. a dog", "(B) a dog"); the one letter that "answer is" or "option" names (a small "a", which could be an
    article, where a mark or the end follows); the text of one option.

    Args:
        answer: what the model said.
        options: the text of each letter.
    """
    answer = answer.strip()
    letters = "".join(options)
    for pattern in (rf"\(?([{letters}])\)?[.:,]?", rf"\(([{letters}])\)\s.*|([{letters}])[.:)]\s?.*"):
        found = re.fullmatch(pattern, answer, re.IGNORECASE | re.DOTALL)
        if found:
            return next(group for group in found.groups() if group).upper()
    article = r"a\b(?![ \t]*(?:[).,:;!?\n]|[-–]\s|$))"
    letter = rf"(?!{article})[{letters}{letters.lower()}]\b"
    named = re.findall(rf"(?i:answer is|answer:|option)\s*:?\s*\(?({letter})", answer)
    if len({letter.upper() for letter in named}) == 1:
        return named[0].upper()
    said = _words_of(answer)
    same = [letter for letter, text in options.items() if said and _words_of(text) == said]
    return same[0] if len(same) == 1 else None


def _words_of(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()


def is_right(prediction: str, answer: str) -> bool:
    """Whether the prediction is the answer, apart from case, white space around it and a final period."""
    return _words_of(prediction) == _words_of(answer)


def parse_yes_no(answer: str) -> str | None:
    """`yes` or `no`: the first word, or the only one of the two that occurs ("not" counts as "no")."""
    words = ["no" if word == "not" or word.endswith("n't") else word for word in re.findall(r"[a-z']+", answer.lower())]
    if words and words[0] in ("yes", "no"):
        return words[0]
    said = {word for word in words if word in ("yes", "no")}
    return said.pop() if len(said) == 1 else None


def first_line(text: str) -> str:
    """What the authors' scripts hand to the instruction encoder of most prompts."""
    return text.split("\n")[0]


def lettered(options: Sequence[str]) -> dict[str, str]:
    """The options by their letters."""
    return dict(zip(LETTERS, options))


def option_lines(options: Mapping[str, str]) -> str:
    """A line for each option: "A. text"."""
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


# The words below are those of the VQA evaluation (Antol et al. 2015), as EvalAI applies them.
_NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBER_WORDS)}}
_ARTICLES = {"a", "an", "the"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _misspellings(word: str) -> list[str]:
    """A contraction with one of its apostrophes left out."""
    return [word[:place] + word[place + 1 :] for place, mark in enumerate(word) if mark == "'"]


_CONTRACTIONS = {spelling: word for word in _CONTRACTED.split() for spelling in _misspellings(word)}


def process_answer(answer: str) -> str:
    """An answer as EvalAI's processor of VQA leaves it: lower case, no marks and articles, digits, contractions."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = re.sub(r"[\n\t]", " ", text).strip()
    spaced = text
    for mark in _MARKS:
        # A mark between two words parts them; one at the edge of a word goes.
        text = text.replace(mark, "" if f"{mark} " in spaced or f" {mark}" in spaced else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


__all__ = ["LETTERS", "first_line", "lettered", "option_lines", "parse_letter", "parse_yes_no", "process_answer"]
