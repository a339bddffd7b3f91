"""Doors into other libraries: each module here serves one of them, and imports it only when it is asked to."""
