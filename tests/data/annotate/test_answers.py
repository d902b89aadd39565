"""Answers of chat models, as they come: what is kept of them, and the cause by which the rest is refused."""

import pytest

from grain_jax.data.annotate import answers, chat

LONG = "a very " + "very " * 14 + "long beak"


@pytest.mark.parametrize(
    "text,subject,caption",
    [
        ("Subject: a wren\nCaption: A wren sings.", "a wren", "A wren sings."),
        ("\n  subject : Two wrens.\n\n CAPTION: “They sing.”\n", "Two wrens", "They sing."),
        ("1. Subject: a wren\n2. Caption: A wren\tsings.", "a wren", "A wren sings."),
        ("- **Subject:** a wren\n- **Caption:** A wren, 3.5 cm.", "a wren", "A wren, 3.5 cm."),
        ("Subject: une mésange\nCaption: 一只鸟在树上。", "une mésange", "一只鸟在树上。"),
    ],
)
def test_a_caption_in_the_form_that_was_asked_for(text, subject, caption):
    assert answers.parse_caption(text) == {"subject": subject, "caption": caption}


@pytest.mark.parametrize(
    "text,cause",
    [
        ("", "empty answer"),
        ("Sure! Here it is:\nSubject: a wren\nCaption: A wren sings.", "run-on"),
        ("Subject: a wren\nCaption: A wren sings.\nIt is spring and all is well.", "run-on"),
        ("Subject: a wren\nCaption:", "no caption"),
        ("Subject: 1234\nCaption: A wren sings.", "no subject"),
        ("Subject: a wren\nCaption: \ufffd\ufffd wren", "no caption"),
        ("Subject: a wren\nSubject: a tit\nCaption: Birds sing.", "repeated line"),
        ("Subject: " + "bird " * 13 + "\nCaption: A wren sings.", "run-on"),
        ("I'm sorry, but I cannot help with that.", "refusal"),
        ("I’m really sorry, I can’t see any image.", "refusal"),
        ("Subject: As an AI language model I see nothing\nCaption: none", "refusal"),
    ],
)
def test_a_caption_that_is_refused(text, cause):
    refused = answers.parse_caption(text)
    assert isinstance(refused, answers.Refused) and refused.cause == cause
    assert "\n" not in refused.detail and len(refused.detail) < 250


def test_a_sign_in_the_picture_that_says_sorry_is_no_refusal():
    text = "Subject: a sign\nCaption: A sign says that I'm sorry and I can't."
    assert isinstance(answers.parse_caption(text), dict)


@pytest.mark.parametrize(
    "line,description",
    [
        ("a long beak", "a long beak"),
        ("- a long beak.", "a long beak"),
        ("1. a long beak", "a long beak"),
        ("4: a long beak", "a long beak"),
        ("- 1. **a long** beak", "a long beak"),
        ("3.5 cm long beak", "3.5 cm long beak"),
        ("no picture on the wall", "no picture on the wall"),
        ("a clock that shows 12:30", "a clock that shows 12:30"),
    ],
)
def test_what_stands_around_a_description_is_taken_off(line, description):
    assert answers.parse_descriptions(line) == [description]


def test_lines_that_are_no_descriptions_are_dropped_by_cause():
    text = f"Here are the features:\n\na long beak\nA LONG BEAK.\n{LONG}\n---\n12345\nred wings"
    assert answers.parse_descriptions(text) == ["a long beak", "red wings"]
    lines = [f"feature {letter}" for letter in "abcdefghijklm"]  # more than are asked for
    assert answers.parse_descriptions("\n".join(lines)) == lines[:10]


@pytest.mark.parametrize(
    "text,cause",
    [
        ("", "empty answer"),
        ("Here are the features:\n", "empty answer"),
        (LONG, "run-on"),
        ("...\n---", "no words"),
        ("I'm sorry, I cannot.\nred wings", "refusal"),
        ("There is no picture provided.", "refusal"),
    ],
)
def test_descriptions_that_are_refused(text, cause):
    refused = answers.parse_descriptions(text)
    assert isinstance(refused, answers.Refused) and refused.cause == cause


def test_what_the_limit_of_tokens_cut_is_not_taken_for_whole():
    assert answers.parse_descriptions("a long beak\na red", cut_off=True) == ["a long beak"]
    assert answers.parse_descriptions("a long be", cut_off=True).cause == "cut off"
    assert answers.parse_caption("Subject: a wren\nCaption: A wr", cut_off=True).cause == "cut off"


def test_the_prompts_say_the_form_that_is_parsed():
    caption, describe = map(chat.prompt, ("caption", "describe"))
    assert "Subject:" in caption and "Caption:" in caption and chat.SUBJECT not in caption
    assert "up to 10" in describe and chat.SUBJECT in describe
