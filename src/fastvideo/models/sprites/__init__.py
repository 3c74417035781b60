"""A small world of moving sprites: prompts, pictures, clips made by code, and a check of clips against prompts."""

from fastvideo.models.sprites.prompts import (
    BACKGROUNDS,
    DIRECTIONS,
    MAX_TOKENS,
    SPRITES,
    VOCABULARY,
    MovingSprite,
    ScenePrompt,
    describe_vocabulary,
    parse_prompt,
    tokenize,
)

__all__ = [
    "BACKGROUNDS",
    "DIRECTIONS",
    "MAX_TOKENS",
    "SPRITES",
    "VOCABULARY",
    "MovingSprite",
    "ScenePrompt",
    "describe_vocabulary",
    "parse_prompt",
    "tokenize",
]
