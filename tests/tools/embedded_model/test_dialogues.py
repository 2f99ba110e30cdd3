"""The dialogues that the embedded model is trained on: the same for the same seed, and right about what was told."""

from tools.embedded_model.dialogues import UNKNOWN_ANSWER, Turn, generate_dialogue


def test_same_seed_same_dialogue() -> None:
    assert generate_dialogue(5, 40) == generate_dialogue(5, 40)
    assert generate_dialogue(5, 40).turns[:10] == generate_dialogue(5, 10).turns
    assert generate_dialogue(5, 40) != generate_dialogue(6, 40)
    # The literal text: a change of wording must come with weights trained on it.
    assert generate_dialogue(3, 1, filler_words=(0, 0)).turns[0] == Turn(
        "hello, my name is Norsch", "ok, your name is Norsch.", "tell", "name", "Norsch"
    )


def test_dialogues_are_consistent() -> None:
    """Every ask is answered with the latest value told, every unknown was never told."""
    for seed in range(30):
        told: dict[str, str] = {}
        for turn in generate_dialogue(seed, 60).turns:
            if turn.kind == "tell":
                assert turn.value in turn.user
                assert turn.value in turn.assistant
                told[turn.subject] = turn.value
            elif turn.kind == "ask":
                assert turn.value == told[turn.subject]
                assert turn.value in turn.assistant
            elif turn.kind == "unknown":
                assert turn.subject not in told
                assert turn.assistant == UNKNOWN_ANSWER
