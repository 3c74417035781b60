"""The grammar, its errors and the tokens of prompts."""

import pytest

from fastvideo.models.sprites.prompts import (
    BACKGROUNDS,
    DIRECTIONS,
    MAX_TOKENS,
    NULL_ID,
    PAD_ID,
    SPRITES,
    VOCABULARY,
    MovingSprite,
    ScenePrompt,
    parse_prompt,
    tokenize,
)

HEART, TREE = SPRITES.index("red heart"), SPRITES.index("green tree")
HEART_AND_TREE = ScenePrompt((MovingSprite(HEART, "left"), MovingSprite(TREE, "up")), "white")


@pytest.mark.parametrize(
    "sentence",
    [
        "red heart moving left, green tree moving up on a white background",
        "red heart moving left, green tree moving up, on a white background",
        "A red heart moving left and a green tree moving up",
        "  the HEART moves left,tree moves up on white.",
    ],
)
def test_wordings_of_one_scene_parse_alike(sentence):
    assert parse_prompt(sentence) == HEART_AND_TREE


def test_every_scene_survives_its_canonical_sentence():
    for sprite in range(len(SPRITES)):
        for place, direction in enumerate(DIRECTIONS):
            background = list(BACKGROUNDS)[place % len(BACKGROUNDS)]
            scene = ScenePrompt((MovingSprite(sprite, direction),), background)
            assert parse_prompt(str(scene)) == scene


def test_a_word_outside_the_vocabulary_lists_the_words():
    with pytest.raises(ValueError, match=r"outside the vocabulary: 'hart'.*did you mean 'heart'") as caught:
        parse_prompt("red hart moving left")
    message = str(caught.value)
    assert all(word in message for word in (*SPRITES, *DIRECTIONS, *BACKGROUNDS))


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        ("", "one or two moving sprites, got 0"),
        ("heart left", "SPRITE moving DIRECTION"),
        ("heart moving", "one direction"),
        ("heart moving left up", "one direction"),
        ("moving left", "one sprite"),
        ("red moving left", "one sprite"),
        ("red green tree moving left", "one sprite"),
        ("blue heart moving left", "there is no 'blue heart', only a 'red heart'"),
        ("heart moving left, tree moving up, pig moving down", "got 3"),
        ("heart moving left, red heart moving up", "must differ"),
        ("heart moving left on a background", "on a BACKGROUND background"),
        ("heart moving left on a white background moving", "on a BACKGROUND background"),
    ],
)
def test_malformed_prompts_say_what_is_wrong(sentence, reason):
    with pytest.raises(ValueError, match=reason):
        parse_prompt(sentence)


def test_a_prompt_that_is_no_string_is_a_type_error():
    with pytest.raises(TypeError, match="got int"):
        parse_prompt(3)


def test_tokens_sit_in_their_slots():
    ids = tokenize([HEART_AND_TREE, "pig moving up-left on a navy background", None])
    assert ids.shape == (3, MAX_TOKENS)
    assert [VOCABULARY[index] for index in ids[0].tolist()] == [
        "colour:red",
        "noun:heart",
        "direction:left",
        "colour:green",
        "noun:tree",
        "direction:up",
        "background:white",
    ]
    assert ids[1, 3:6].tolist() == [PAD_ID] * 3
    assert ids[2].tolist() == [NULL_ID] + [PAD_ID] * (MAX_TOKENS - 1)


def test_nouns_and_tokens_are_unique():
    assert len({name.split()[1] for name in SPRITES}) == len(SPRITES)
    assert len(set(VOCABULARY)) == len(VOCABULARY)
