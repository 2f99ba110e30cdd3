"""`pensieve chat`: conversations at a terminal, with an engine of its own or a server."""
