"""Answers of chat models, as they come: what is kept of them, and the cause by which the rest is refused."""

import pytest

from grain_jax.data.annotate import answers, chat

LONG = "a very " + "very " * 14 + "long beak"


@pytest.mark.parametrize(
    "text,subject,caption",
    [
        ("\n  subject : Two wrens.\n\n CAPTION: “They sing.”\n", "Two wrens", "They sing."),
        ("1. Subject: a wren\n2. Caption: A wren\tsings.", "a wren", "A wren sings."),
        ("- **Subject:** a wren\n- **Caption:** A wren, 3.5 cm.", "a wren", "A wren, 3.5 cm."),
        ("Subject: a sign\nCaption: It says I'm sorry, I can't.", "a sign", "It says I'm sorry, I can't."),
        ("Subject: une mésange\nCaption: 一只鸟在树上。", "une mésange", "一只鸟在树上。"),
    ],
)
def test_a_caption_in_the_form_that_was_asked_for(text, subject, caption):
    assert answers.parse_caption(text) == {"subject": subject, "caption": caption}


CAPTION, DESCRIPTIONS = answers.parse_caption, answers.parse_descriptions


@pytest.mark.parametrize(
    "parse,text,cause",
    [
        (CAPTION, "", "empty answer"),
        (CAPTION, "Sure! Here it is:\nSubject: a wren\nCaption: A wren sings.", "run-on"),
        (CAPTION, "Subject: a wren\nCaption: A wren sings.\nIt is spring and all is well.", "run-on"),
        (CAPTION, "Subject: a wren\nCaption:", "no caption"),
        (CAPTION, "Subject: 1234\nCaption: A wren sings.", "no subject"),
        (CAPTION, "Subject: a wren\nCaption: \ufffd\ufffd wren", "no caption"),
        (CAPTION, "Subject: a wren\nSubject: a tit\nCaption: Birds sing.", "repeated line"),
        (CAPTION, "Subject: " + "bird " * 13 + "\nCaption: A wren sings.", "run-on"),
        (CAPTION, "I’m really sorry, I can’t see any image.", "refusal"),
        (CAPTION, "Subject: As an AI language model I see nothing\nCaption: none", "refusal"),
        (DESCRIPTIONS, "Here are the features:\n", "empty answer"),
        (DESCRIPTIONS, LONG, "run-on"),
        (DESCRIPTIONS, "...\n---", "no words"),
        (DESCRIPTIONS, "I'm sorry, I cannot.\nred wings", "refusal"),
        (DESCRIPTIONS, "There is no picture provided.", "refusal"),
    ],
)
def test_what_is_refused(parse, text, cause):
    refused = parse(text)
    assert isinstance(refused, answers.Refused) and refused.cause == cause
    assert "\n" not in refused.detail and len(refused.detail) < 250


@pytest.mark.parametrize(
    "line,description",
    [
        ("a long beak", "a long beak"),
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


def test_what_the_limit_of_tokens_cut_is_not_taken_for_whole():
    assert answers.parse_descriptions("a long beak\na red", cut_off=True) == ["a long beak"]
    assert answers.parse_descriptions("a long be", cut_off=True).cause == "cut off"
    assert answers.parse_caption("Subject: a wren\nCaption: A wr", cut_off=True).cause == "cut off"


def test_the_prompts_say_the_form_that_is_parsed():
    caption, describe = map(chat.prompt, ("caption", "describe"))
    assert "Subject:" in caption and "Caption:" in caption and chat.SUBJECT not in caption
    assert "up to 10" in describe and chat.SUBJECT in describe
