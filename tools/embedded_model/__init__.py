"""Makes the embedded models: `dialogues` generates what the recall model is trained on, `train` trains and measures it.

`tool_dialogues` and `train_tools` do that for the tools model, which begins as the recall model.
"""
