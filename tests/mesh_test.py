"""The same search on one device and on many, and what lies where."""
