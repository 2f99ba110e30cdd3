"""Makes the embedded model: `dialogues` generates what it is trained on, `train` trains and measures it."""
