"""See method.py."""
