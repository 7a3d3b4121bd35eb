"""Files that are almost right, made by seeded changes of valid ones, and what must become of them."""
