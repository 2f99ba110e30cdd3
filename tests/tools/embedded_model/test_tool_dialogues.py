"""The dialogues that the tools model is trained on: the same for the same seed, and right about what is called and found."""

from tools.embedded_model.tool_dialogues import BETWEEN, FOUND, generate_tool_dialogue


def test_same_seed_same_dialogue() -> None:
    assert generate_tool_dialogue(5, 12) == generate_tool_dialogue(5, 12)
    assert generate_tool_dialogue(5, 12) != generate_tool_dialogue(6, 12)


def test_calls_are_of_offered_tools_with_values_that_were_asked_for() -> None:
    num_calls = 0
    for seed in range(60):
        dialogue = generate_tool_dialogue(seed, 12)
        tools = {tool.name: tool for tool in dialogue.tools}
        messages = dialogue.messages
        assert messages[-1]["role"] == "assistant"
        for i, message in enumerate(messages):
            calls = message.get("tool_calls", ())
            for call in calls:
                function = call["function"]
                assert list(function["arguments"]) == [name for name, _ in tools[function["name"]].parameters]
                for value in function["arguments"].values():
                    assert str(value).lower() in messages[i - 1]["content"].lower()
            if calls:
                results = [each["content"] for each in messages[i + 1 : i + 1 + len(calls)]]
                assert messages[i + 1 + len(calls)] == {"role": "assistant", "content": FOUND + BETWEEN.join(results)}
                num_calls += len(calls)
    assert num_calls > 100
