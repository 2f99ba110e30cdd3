"""From a session to the engine replica that holds its cache."""
