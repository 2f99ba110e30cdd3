"""Low-rank adapters (LoRA): read from peft's folders, and added to the rows of a step that ask for them."""
