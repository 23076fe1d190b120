"""One file for what records of one kind show."""
