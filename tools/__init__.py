"""What makes the things that the packages ship. Not installed; run from a checkout."""
