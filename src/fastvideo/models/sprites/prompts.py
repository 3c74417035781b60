"""The words of the sprite world: sprites, directions, backgrounds, the grammar of a prompt and its tokens.

A prompt is one or two clauses, each a sprite and the direction it moves in, and a background::

    red heart moving left, green tree moving up on a white background

The colour may be left out (nouns are unique), and so may the background (white). Sentences are parsed into a
`ScenePrompt`; the tokens that a text encoder sees are the content words in fixed slots, so that every wording of one
scene has the same tokens.

Slots: `colour noun direction | colour noun direction | background`.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

SPRITES: tuple[str, ...] = (
    "red heart",
    "green tree",
    "blue fish",
    "yellow star",
    "orange pumpkin",
    "purple grapes",
    "green frog",
    "yellow sun",
    "pink pig",
    "brown bear",
    "red car",
    "green turtle",
    "pink flower",
    "green clover",
    "red mushroom",
    "blue gem",
    "yellow duck",
    "pink octopus",
    "gray elephant",
    "green dinosaur",
    "orange fox",
    "gold crown",
    "purple umbrella",
    "yellow lemon",
    "brown cookie",
    "red rose",
    "blue globe",
    "purple eggplant",
)
"""Names of the sprites, a colour and a noun each, in the order of the atlas; every noun is unique."""

_DIAGONAL = 0.5**0.5
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (0.0, -1.0),
    "right": (0.0, 1.0),
    "up": (-1.0, 0.0),
    "down": (1.0, 0.0),
    "up-left": (-_DIAGONAL, -_DIAGONAL),
    "up-right": (-_DIAGONAL, _DIAGONAL),
    "down-left": (_DIAGONAL, -_DIAGONAL),
    "down-right": (_DIAGONAL, _DIAGONAL),
}
"""Unit vectors `(dy, dx)` by name; y grows downward, as rows of an image do."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "navy": (28, 44, 104),
    "mint": (160, 224, 196),
}
"""Plain background colours, 8-bit RGB, by name."""

DEFAULT_BACKGROUND = "white"
PAD, NULL = "<pad>", "<null>"
_GRAMMAR_WORDS = ("a", "an", "the", "and", "moving", "moves", "on", "background")
_COLOURS = tuple(dict.fromkeys(name.split()[0] for name in SPRITES))
_NOUNS = tuple(name.split()[1] for name in SPRITES)
_GRAMMAR = (
    "'[COLOUR] NOUN moving DIRECTION[, [COLOUR] NOUN moving DIRECTION] [on a BACKGROUND background]', "
    "for example 'red heart moving left, green tree moving up on a white background'"
)

VOCABULARY: tuple[str, ...] = (
    PAD,
    NULL,
    *(f"colour:{word}" for word in _COLOURS),
    *(f"noun:{word}" for word in _NOUNS),
    *(f"direction:{word}" for word in DIRECTIONS),
    *(f"background:{word}" for word in BACKGROUNDS),
)
"""Tokens in the order of their ids; content words carry their part of speech."""

MAX_TOKENS = 7
PAD_ID, NULL_ID = 0, 1
_TOKEN_IDS = {token: index for index, token in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class MovingSprite:
    """One clause of a prompt: a sprite by its index in `SPRITES` and a direction by its name."""

    sprite: int
    direction: str

    def __str__(self) -> str:
        return f"{SPRITES[self.sprite]} moving {self.direction}"


@dataclass(frozen=True)
class ScenePrompt:
    """A parsed prompt; `str` gives its canonical sentence.

    Attributes:
        sprites: one or two clauses; the first is drawn in front.
        background: a name in `BACKGROUNDS`.

    Example:
        >>> str(parse_prompt("a heart moving left"))
        'red heart moving left on a white background'
    """

    sprites: tuple[MovingSprite, ...]
    background: str = DEFAULT_BACKGROUND

    def __post_init__(self) -> None:
        if not 1 <= len(self.sprites) <= 2:
            raise ValueError(f"a scene holds one or two sprites, got {len(self.sprites)}")
        if len({clause.sprite for clause in self.sprites}) != len(self.sprites):
            raise ValueError(f"the two sprites of a scene must differ, got {SPRITES[self.sprites[0].sprite]!r} twice")

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.sprites))} on a {self.background} background"


def describe_vocabulary() -> str:
    """Every word that a prompt may use, by part of speech, for error messages and help texts."""
    return (
        f"sprites: {', '.join(SPRITES)}; directions: {', '.join(DIRECTIONS)}; backgrounds: {', '.join(BACKGROUNDS)}; "
        f"other words: {', '.join(_GRAMMAR_WORDS)}"
    )


def parse_prompt(prompt: str) -> ScenePrompt:
    """Parses a sentence into the scene that it describes.

    Args:
        prompt: a sentence of the grammar in the module's docstring; case and extra spaces don't matter.

    Raises:
        ValueError: a word outside the vocabulary (the message lists the words), or a sentence outside the grammar.
        TypeError: `prompt` is not a string.

    Example:
        >>> scene = parse_prompt("red heart moving left, green tree moving up")
        >>> [(SPRITES[clause.sprite], clause.direction) for clause in scene.sprites], scene.background
        ([('red heart', 'left'), ('green tree', 'up')], 'white')
    """
    if not isinstance(prompt, str):
        raise TypeError(f"expected a prompt as str, got {type(prompt).__name__}")
    words = re.findall(r"[^\s,.]+|,", prompt.lower())
    _refuse_unknown_words(words)
    body, background = _split_background(words, prompt)
    clauses = [_parse_clause(clause, prompt) for clause in _split_clauses(body)]
    if not 1 <= len(clauses) <= 2:
        raise ValueError(f"expected one or two moving sprites, got {len(clauses)} in {prompt!r}; write {_GRAMMAR}")
    return ScenePrompt(tuple(clauses), background)


def _refuse_unknown_words(words: list[str]) -> None:
    known = {*_COLOURS, *_NOUNS, *DIRECTIONS, *BACKGROUNDS, *_GRAMMAR_WORDS, ","}
    unknown = [word for word in words if word not in known]
    if not unknown:
        return
    close = {word: difflib.get_close_matches(word, sorted(known), n=1) for word in unknown}
    hints = "".join(f" (did you mean {match[0]!r} for {word!r}?)" for word, match in close.items() if match)
    listed = ", ".join(map(repr, unknown))
    raise ValueError(f"the prompt uses words outside the vocabulary: {listed}{hints}. Known words: {describe_vocabulary()}")


def _split_background(words: list[str], prompt: str) -> tuple[list[str], str]:
    if "on" not in words:
        return words, DEFAULT_BACKGROUND
    place = words.index("on")
    tail = [word for word in words[place + 1 :] if word not in ("a", "an", "the", ",")]
    if not tail or tail[0] not in BACKGROUNDS or tail[1:] not in ([], ["background"]):
        raise ValueError(
            f"expected 'on a BACKGROUND background' with one of {', '.join(BACKGROUNDS)}, got "
            f"{' '.join(words[place:])!r} in {prompt!r}"
        )
    return words[:place], tail[0]


def _split_clauses(words: list[str]) -> list[list[str]]:
    clauses: list[list[str]] = [[]]
    for word in words:
        if word in (",", "and"):
            clauses.append([])
        elif word not in ("a", "an", "the"):
            clauses[-1].append(word)
    return [clause for clause in clauses if clause]


def _parse_clause(words: list[str], prompt: str) -> MovingSprite:
    verbs = [place for place, word in enumerate(words) if word in ("moving", "moves")]
    if len(verbs) != 1:
        raise ValueError(f"expected 'SPRITE moving DIRECTION', got {' '.join(words)!r} in {prompt!r}; write {_GRAMMAR}")
    name, heading = words[: verbs[0]], words[verbs[0] + 1 :]
    if len(heading) != 1 or heading[0] not in DIRECTIONS:
        raise ValueError(
            f"expected one direction of {', '.join(DIRECTIONS)} after 'moving', got {' '.join(heading)!r} in {prompt!r}"
        )
    if not name or name[-1] not in _NOUNS or len(name) > 2:
        raise ValueError(f"expected one sprite of {', '.join(SPRITES)}, got {' '.join(name)!r} in {prompt!r}")
    sprite = _NOUNS.index(name[-1])
    if len(name) == 2 and SPRITES[sprite] != " ".join(name):
        raise ValueError(f"there is no {' '.join(name)!r}, only a {SPRITES[sprite]!r}; sprites: {', '.join(SPRITES)}")
    return MovingSprite(sprite, heading[0])


def scene_token_ids(scene: ScenePrompt) -> list[int]:
    """Token ids of a scene in the fixed slots, `MAX_TOKENS` of them, `PAD_ID` where a slot is empty.

    Example:
        >>> [VOCABULARY[index] for index in scene_token_ids(parse_prompt("heart moving up on a mint background"))][2:]
        ['direction:up', '<pad>', '<pad>', '<pad>', 'background:mint']
    """
    ids = [PAD_ID] * MAX_TOKENS
    for place, clause in enumerate(scene.sprites):
        colour, noun = SPRITES[clause.sprite].split()
        tokens = (f"colour:{colour}", f"noun:{noun}", f"direction:{clause.direction}")
        ids[3 * place : 3 * place + 3] = [_TOKEN_IDS[token] for token in tokens]
    ids[-1] = _TOKEN_IDS[f"background:{scene.background}"]
    return ids


def tokenize(prompts: Sequence[str | ScenePrompt | None], device: torch.device | str = "cpu") -> torch.Tensor:
    """Token ids `[B, MAX_TOKENS]` int64 of sentences or scenes; `None` is the null prompt of classifier-free guidance.

    Example:
        >>> tokenize(["pig moving down", None])[1].tolist()
        [1, 0, 0, 0, 0, 0, 0]
    """
    null = [NULL_ID] + [PAD_ID] * (MAX_TOKENS - 1)
    scenes = [parse_prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    rows = [null if scene is None else scene_token_ids(scene) for scene in scenes]
    return torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, MAX_TOKENS)
