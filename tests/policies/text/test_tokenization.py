from policies.text.tokenization import prompt_text


def test_messages_as_text_for_people() -> None:
    assert prompt_text([{"role": "user", "content": "name a colour."}]) == "user: name a colour."
    assert prompt_text("as it is") == "as it is"
