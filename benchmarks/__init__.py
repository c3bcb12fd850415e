"""What prints the figures; each command shows progress, prints a table, and prints one JSON object as its last line."""
