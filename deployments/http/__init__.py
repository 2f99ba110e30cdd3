"""The HTTP edge that all endpoints share: bodies, limits, admission, errors and event streams."""
