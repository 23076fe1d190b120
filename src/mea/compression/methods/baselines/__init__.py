"""Published methods to compare with; one method is one file."""
