"""What models say and what is said to them, as texts and values. Knows no HTTP and no KV."""
